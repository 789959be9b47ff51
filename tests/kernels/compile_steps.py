"""Compiles the step's variants for one architecture, and beside them deterministic DDIM as one would write it by hand.

`python compile_steps.py 90` prints the facts of both as JSON; with `forms` behind it, those of the step's other forms
instead of the second. In a process of its own: the suite has loaded Triton's interpreter, with which nothing can be
compiled.
"""

import itertools
import json
import sys
from dataclasses import asdict

import triton
import triton.language as tl
from kernel_inspection import DTYPES, VARIANTS, inspect_kernel, inspect_step

from skipstep.export.cubins import compile_for, step_pointers
from skipstep.kernels.launch import DEFAULT_LAUNCH, step_constants
from skipstep.kernels.layout import NUM_COLUMNS, Column
from skipstep.kernels.step_kernel import ddim_step_kernel

ROW = tl.constexpr(NUM_COLUMNS)
X0_X = tl.constexpr(int(Column.X0_X))
X0_OUT = tl.constexpr(int(Column.X0_OUT))
EPS_X = tl.constexpr(int(Column.EPS_X))
EPS_OUT = tl.constexpr(int(Column.EPS_OUT))
C_X0 = tl.constexpr(int(Column.C_X0))
C_EPS = tl.constexpr(int(Column.C_EPS))


@triton.jit
def bare_ddim_kernel(
    state_ptr, next_ptr, output_ptr, network_input_ptr, table_ptr, num_elements, stage, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    elements = tl.program_id(1).to(tl.int64) * num_elements + offsets
    row_ptr = table_ptr + tl.cast(stage, tl.int64) * ROW
    x = tl.load(state_ptr + elements, mask=mask)
    out = tl.load(output_ptr + elements, mask=mask).to(tl.float32)
    x0 = tl.load(row_ptr + X0_X) * x + tl.load(row_ptr + X0_OUT) * out
    eps = tl.load(row_ptr + EPS_X) * x + tl.load(row_ptr + EPS_OUT) * out
    x_next = tl.load(row_ptr + C_X0) * x0 + tl.load(row_ptr + C_EPS) * eps
    tl.store(next_ptr + elements, x_next, mask=mask)
    tl.store(network_input_ptr + elements, x_next.to(network_input_ptr.dtype.element_ty), mask=mask)


def bare_facts(arch: int, dtype: str):
    pointers = {
        "state_ptr": "*fp32",
        "next_ptr": "*fp32",
        "output_ptr": f"*{dtype}",
        "network_input_ptr": f"*{dtype}",
        "table_ptr": "*fp32",
    }
    made = compile_for(bare_ddim_kernel, arch, pointers, {}, wide=True, launch=DEFAULT_LAUNCH)
    return inspect_kernel(made, arch=arch, variant="plain", dtype=dtype)


def facts_with(arch: int, variant: str, dtype: str, **options: int):
    constants = step_constants(VARIANTS[variant], per_sample=False, store_x0=False, **options)
    made = compile_for(ddim_step_kernel, arch, step_pointers(dtype), constants, wide=True, launch=DEFAULT_LAUNCH)
    return inspect_kernel(made, arch=arch, variant=variant, dtype=dtype)


if __name__ == "__main__":
    arch = int(sys.argv[1])
    steps = [inspect_step(arch, *case) for case in itertools.product(VARIANTS, DTYPES)]
    found = {"steps": steps}
    if sys.argv[2:] != ["forms"]:
        found["bare"] = [bare_facts(arch, dtype) for dtype in DTYPES]
    else:
        # Some of the samples that are kept, each at its own stage.
        found["placed"] = [facts_with(arch, *case, placed=True) for case in itertools.product(VARIANTS, DTYPES)]
        drawing = ("plain", "everything", "learned_variance")
        found["channels_last"] = [facts_with(arch, *c, channels=3) for c in itertools.product(drawing, DTYPES)]
    print(json.dumps({name: [asdict(facts) for facts in each] for name, each in found.items()}))

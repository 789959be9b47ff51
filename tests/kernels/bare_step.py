"""Deterministic DDIM and nothing else, as one would write it by hand: what plain DDIM in the general kernel may cost.

Run as a program it compiles this kernel for the architectures given and prints the facts as JSON.
"""

import json
import sys
from dataclasses import asdict

import triton
import triton.language as tl

from skipstep.export.kernel_inspection import compile_kernel, inspect_kernel
from skipstep.kernels.layout import NUM_COLUMNS, Column

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
    here = tl.program_id(1).to(tl.int64) * num_elements + offsets
    row_ptr = table_ptr + tl.to_tensor(stage).to(tl.int64) * ROW
    x = tl.load(state_ptr + here, mask=mask)
    out = tl.load(output_ptr + here, mask=mask).to(tl.float32)
    x0 = tl.load(row_ptr + X0_X) * x + tl.load(row_ptr + X0_OUT) * out
    eps = tl.load(row_ptr + EPS_X) * x + tl.load(row_ptr + EPS_OUT) * out
    x_next = tl.load(row_ptr + C_X0) * x0 + tl.load(row_ptr + C_EPS) * eps
    tl.store(next_ptr + here, x_next, mask=mask)
    tl.store(network_input_ptr + here, x_next.to(network_input_ptr.dtype.element_ty), mask=mask)


if __name__ == "__main__":
    facts = []
    for arch in map(int, sys.argv[1:]):
        for dtype in ("fp16", "fp32"):
            pointers = {
                "state_ptr": "*fp32",
                "next_ptr": "*fp32",
                "output_ptr": f"*{dtype}",
                "network_input_ptr": f"*{dtype}",
                "table_ptr": "*fp32",
            }
            ptx, cubin = compile_kernel(bare_ddim_kernel, arch, pointers, {})
            facts.append(asdict(inspect_kernel(ptx, cubin, arch=arch, variant="plain", dtype=dtype)))
    print(json.dumps(facts))

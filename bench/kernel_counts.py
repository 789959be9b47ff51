"""Kernels that an evaluation launches on a GPU: `python -m skipstep.bench.kernel_counts --out FILE`. None is needed.

torch: every operation that it dispatches on tensors in host memory, taken apart as torch does, by this rule:
    views and allocations    0
    a convolution            1, and 1 for its bias: cuDNN's does not add it; and 1 for an image that is in another
                             order in memory than its weights
    torch's own group norm   3: statistics, a scale and shift for each channel, the result; and 2 for values in
                             channels-last order, which it puts in the other order, and the next convolution back
    a group norm of ours     1, or 2 for groups that are split (skipstep.kernels.group_norm_launch), and 1 for each
                             operand that is copied because it is in another order in memory
    every other operation    1
"operations" counts each of them once.

TensorRT-RTX: what the plan in an engine launches (skipstep.export.engine_plan), for sm_89.

Without the step kernel, which is one more everywhere. What follows from timesteps and conditioning is computed before
the loop, but for torch's whole module, which computes it at every evaluation.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skipstep.backends.denoiser import StepInput, Target
from skipstep.backends.torch import module_on
from skipstep.backends.torch_cuda import TorchDeviceDenoiser, denoisers
from skipstep.bench.models import Subject, open_subject
from skipstep.bench.record import write_finding
from skipstep.model_source import ModelSource

MODELS = ("fashion-mnist", "cifar10-architecture")
_ATEN = torch.ops.aten
_FREE = frozenset(
    {
        _ATEN.empty.memory_format,
        _ATEN.empty_strided.default,
        _ATEN.empty_like.default,
        _ATEN.new_empty.default,
        _ATEN._unsafe_view.default,
        _ATEN.sym_size.int,
    }
)
# Torch takes them apart for compilers only; dropout that is off launches nothing.
_WHOLE = frozenset({_ATEN.upsample_nearest2d.vec, _ATEN.dropout.default})


class KernelCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`operations` that are dispatched while it is entered, by name, and the `kernels` that they launch by the rule."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Without gradients operators arrive as they were called, and not as what they are made of.
        if func not in _WHOLE:
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        launched = kernels_of(func, args)
        if launched:
            self.operations[str(func)] += 1
            self.kernels[str(func)] += launched
        return func(*args, **(kwargs or {}))


def kernels_of(operation: Any, args: Any) -> int:
    """How many kernels an operation launches on a GPU, by the rule above."""
    schema = operation._schema
    is_view = not schema.is_mutable and any(each.alias_info is not None for each in schema.returns)
    if is_view or operation in _FREE:
        return 0
    if operation is _ATEN.dropout.default:
        return int(args[2])
    if operation is _ATEN.convolution.default:
        x, weight = args[:2]
        last = weight.ndim == 4 and not weight.is_contiguous()
        return 1 + (args[2] is not None) + (last and not x.is_contiguous(memory_format=torch.channels_last))
    if operation is _ATEN.native_group_norm.default:
        return 3 if args[0].is_contiguous() else 5
    if operation.namespace == "skipstep":
        return _kernels_of_norm(operation, args)
    return 1


def _kernels_of_norm(operation: Any, args: Any) -> int:
    from skipstep.kernels.group_norm import dense, launch_for, same_order

    with_image = operation is torch.ops.skipstep.add_group_norm.default
    x, num_groups = args[0], args[2] if with_image else args[1]
    copied = int(dense(x) is not x)
    if with_image:
        copied += not same_order(dense(x), args[1])
    return launch_for(x, num_groups).launches + copied


def count(denoiser: TorchDeviceDenoiser) -> KernelCount:
    """Of one evaluation whose stage the host knows, as in a graph of a whole loop."""
    enqueue, values = denoiser.new_context(), {n: _zeros(denoiser, each) for n, each in denoiser.step_inputs.items()}
    # torch lays out convolutions anew when it first meets them.
    enqueue(values, 0)
    counted = KernelCount()
    with counted:
        enqueue(values, 0)
    return counted


def _zeros(denoiser: TorchDeviceDenoiser, each: StepInput) -> Tensor:
    stages = (1,) if each.per_stage else ()
    return torch.zeros(*stages, denoiser.batch_size, *each.shape, dtype=getattr(torch, each.dtype))


def torch_counts(subject: Subject, *, precision: str = "float16", batch_size: int = 1) -> dict[str, KernelCount]:
    """Of the whole module, and of what is left of it at a stage, with torch's norms and as the backend launches it."""
    module, spec = subject.prepared
    dtype, cpu = getattr(torch, precision), torch.device("cpu")
    whole = module_on(module, cpu, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = ModelSource(subject.name, spec, module, None)
    target = Target("cpu", precision)  # type: ignore[arg-type]
    steps: list[Any] = [denoisers(source, target, fuse_norms=fused)(batch_size) for fused in (False, True)]
    return {
        "torch, the whole module": count(
            TorchDeviceDenoiser(whole, spec, batch_size=batch_size, device=cpu, dtype=dtype)
        ),
        "torch, the step with torch's norms": count(steps[0]),
        "torch, the step": count(steps[1]),
    }


def rtx_counts(subject: Subject) -> Iterator[tuple[str, int]]:
    """Of TensorRT-RTX in each precision; nothing where it is not installed."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return
    from skipstep.export.engine_plan import kernels
    from skipstep.export.partition import partition
    from skipstep.export.precision import lower_precision
    from skipstep.export.tensorrt_engine import build_engine

    step = partition(subject.exported).graphs.step
    graphs = {
        "float32": step,
        "float16": lower_precision(step, "float16"),
    }
    for name, graph in graphs.items():
        built = build_engine(graph, library="tensorrt_rtx", compute_capability=89, batch_sizes=(1,), channels_last=True)
        yield f"TensorRT-RTX, {name}", kernels(built.engine)[0].total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    rows, operations = [], {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            subject = open_subject(name, folder=Path(folder))
            for form, counted in torch_counts(subject).items():
                rows.append([name, form, str(counted.operations.total()), str(counted.kernels.total())])
                operations[f"{name}: {form}"] = dict(counted.kernels.most_common())
            rows += [[name, form, "–", str(launched)] for form, launched in rtx_counts(subject)]
    for row in rows:
        print(*row, sep="  ")
    write_finding(
        options.out,
        command=f"python -m skipstep.bench.kernel_counts --out {options.out}",
        header=["network", "form", "operations", "kernels"],
        rows=rows,
        note="One evaluation at batch 1, torch in float16. Counted, not run on a GPU.",
        operations=operations,
    )


if __name__ == "__main__":
    main()

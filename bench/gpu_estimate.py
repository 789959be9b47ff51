"""What a step should take on a GPU that nobody has run it on: `python -m skipstep.bench.gpu_estimate --out FILE`.

    floor      = max(bytes / bandwidth, operations / rate)   of the whole step, everything through memory once
    launches   = kernels · t                                 every kernel takes t at least
    estimate   = Σ over kernels of max(t, bytes / bandwidth, operations / rate)

Counted from the exported networks in float16, never measured; the first real run confirms or refutes it. Kernels are
those of skipstep.bench.fused_kernels and one for the step itself; a captured loop has nothing else in a step. The
estimate is a range. Its best end is t = 1.5 µs and the data sheet's rates. Its worst is t = 2.5 µs, the share of those
rates that large kernels sustain, and for a matrix product the rate of only so many multiprocessors as there are 64×64
tiles of its result (no product is split along its sum). What stays in the cache between kernels, as most of a small
batch's activations may, is not accounted for.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skipstep.backends.torch import DenoisingModule, prepare_module
from skipstep.bench.fused_kernels import Kernel, fused_kernels
from skipstep.bench.gpu_models import GPU_MODELS
from skipstep.bench.markdown import describe_environment, markdown
from skipstep.bench.models import BenchModel, shipped_model
from skipstep.bench.record import write_json
from skipstep.export.onnx_model import export_onnx
from skipstep.export.partition import partition
from skipstep.networks.spec import NetworkSpec

MODELS: Final[Mapping[str, Callable[[], BenchModel]]] = {
    "fashion-mnist": shipped_model,
    **{name: make for name, (make, _) in GPU_MODELS.items()},
}
BATCH_SIZES: Final = (1, 8, 64)
_ITEM_SIZE: Final = 2
# State in and out in float32, the network's output and next input in float16 (skipstep.bench.step_codegen counts it).
_STEP_BYTES: Final = 12
_TILE: Final = 64

# A small kernel that waits for the one before it, inside a CUDA graph: an assumption, best and worst.
KERNEL_SECONDS: Final = (1.5e-6, 2.5e-6)
# What large kernels make of the data sheet's bandwidth and of its rate, at worst: an assumption too.
SUSTAINED: Final = (0.8, 0.6)

# Calls of a network that launch nothing on a GPU.
_NO_KERNEL: Final = frozenset(
    {"transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "slice", "expand", "chunk", "dropout", "to"}
)


@dataclass(frozen=True, slots=True)
class Device:
    """Peak numbers of the vendor's data sheet: bytes and dense float16 operations per second."""

    bandwidth: float
    rate: float
    multiprocessors: int


DEVICES: Final[Mapping[str, Device]] = {
    "H100 SXM": Device(bandwidth=3.35e12, rate=990e12, multiprocessors=132),
    "H200": Device(bandwidth=4.8e12, rate=990e12, multiprocessors=132),
}


@dataclass(frozen=True, slots=True)
class Aim:
    """What a step is to take, and the floor that it was set against."""

    model: str
    batch_size: int
    ms: float
    floor_us: tuple[float, float]


AIM: Final = Aim("cifar10-architecture", batch_size=1, ms=0.4, floor_us=(23.0, 33.0))


def estimate(kernels: Sequence[Kernel], batch_size: int, device: Device, *, step_bytes: int) -> dict[str, Any]:
    """Milliseconds of a step with `step_bytes` moved by the step kernel itself: the floor, and ranges."""
    work = [(_ITEM_SIZE * (k.weights + batch_size * k.elements), batch_size * k.flops, k) for k in kernels]
    num_bytes = sum(moved for moved, _, _ in work) + step_bytes
    flops = sum(operations for _, operations, _ in work)
    best, worst = KERNEL_SECONDS
    bandwidth, rate = SUSTAINED[0] * device.bandwidth, SUSTAINED[1] * device.rate
    low = max(best, step_bytes / device.bandwidth)
    high = max(worst, step_bytes / bandwidth)
    for moved, operations, kernel in work:
        low += max(best, moved / device.bandwidth, operations / device.rate)
        high += max(worst, moved / bandwidth, operations / (rate * occupied(kernel, batch_size, device)))
    return {
        "floor_ms": 1e3 * max(num_bytes / device.bandwidth, flops / device.rate),
        "launches_ms": [1e3 * (len(kernels) + 1) * seconds for seconds in KERNEL_SECONDS],
        "estimate_ms": [1e3 * low, 1e3 * high],
    }


def occupied(kernel: Kernel, batch_size: int, device: Device) -> float:
    """The share of a device's multiprocessor time that a matrix product's tiles fill, in whole waves of tiles."""
    if kernel.result is None:
        return 1.0
    rows, columns = kernel.result
    waves = math.ceil(batch_size * rows / _TILE) * math.ceil(columns / _TILE) / device.multiprocessors
    return waves / math.ceil(waves)


def describe(name: str, batch_sizes: Sequence[int] = BATCH_SIZES) -> dict[str, Any]:
    """One network: what is counted, and the estimates from it."""
    model = MODELS[name]()
    spec = NetworkSpec.of_module(model.unet, null_label=10 if model.conditional else None)
    prepared, spec = prepare_module(model.unet, spec)
    operators = count_operators(prepared, spec)
    kernels = fused_kernels(onnx.load_from_string(partition(export_onnx(prepared, spec)).graphs.step))
    step_bytes = _STEP_BYTES * math.prod(spec.sample_shape)
    cases = [
        {
            "batch_size": batch_size,
            "flops": batch_size * sum(kernel.flops for kernel in kernels),
            "activation_bytes": _ITEM_SIZE * batch_size * sum(kernel.elements for kernel in kernels),
            "step_kernel_bytes": batch_size * step_bytes,
            "devices": {
                device: estimate(kernels, batch_size, facts, step_bytes=batch_size * step_bytes)
                for device, facts in DEVICES.items()
            },
        }
        for batch_size in batch_sizes
    ]
    return {
        "model": name,
        "sample_shape": list(spec.sample_shape),
        "kernels_per_step": len(kernels) + 1,
        "kernels": dict(Counter(kernel.name for kernel in kernels)),
        "operators_in_torch": operators,
        "operators_ms": [1e3 * operators * seconds for seconds in KERNEL_SECONDS],
        "weight_bytes": _ITEM_SIZE * sum(kernel.weights for kernel in kernels),
        "cases": cases,
    }


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count: int = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function.overloadpacket.__name__ not in _NO_KERNEL
        return function(*args, **(kwargs or {}))


def count_operators(module: DenoisingModule, spec: NetworkSpec) -> int:
    """Operators that PyTorch launches for one evaluation, each at least one kernel, as the module is written."""
    labels = [] if spec.num_classes is None else [torch.zeros(1, dtype=torch.int64)]
    # In inference mode operators arrive as they were called and not in the parts that differentiation needs.
    with torch.inference_mode(), _Counting() as counting:  # type: ignore[no-untyped-call]
        module(torch.zeros(1, *spec.sample_shape), torch.zeros(1, dtype=torch.int64), *labels)
    count: int = counting.count
    return count


def verdict(networks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The aim beside the estimates for it, by device: "within reach" if the worst is, "possible" if the best is."""
    network = next(each for each in networks if each["model"] == AIM.model)
    case = next(each for each in network["cases"] if each["batch_size"] == AIM.batch_size)
    devices = {}
    for name, numbers in case["devices"].items():
        best, worst = numbers["estimate_ms"]
        judged = "within reach" if worst <= AIM.ms else "possible" if best <= AIM.ms else "out of reach"
        devices[name] = {"estimate_ms": [best, worst], "floor_us": 1e3 * numbers["floor_ms"], "aim_is": judged}
    best, _ = network["operators_ms"]
    return {
        **asdict(AIM),
        "devices": devices,
        "most_microseconds_a_kernel": 1e3 * AIM.ms / network["kernels_per_step"],
        "unfused_aim_is": "possible" if best <= AIM.ms else "out of reach",
    }


def estimate_table(results: Path) -> str:
    """What a step is made of and should take, one line a network and batch size, and how the aim stands beside it."""
    result = json.loads((results / "gpu-estimate.json").read_text(encoding="utf-8"))
    rows = []
    for network in result["networks"]:
        for case in network["cases"]:
            devices = [
                f"{numbers['floor_ms']:.3f}; {_range(numbers['estimate_ms'])}" for numbers in case["devices"].values()
            ]
            megabytes = f"{network['weight_bytes'] / 1e6:.1f} + {case['activation_bytes'] / 1e6:.1f}"
            cells = [str(case["batch_size"]), str(network["kernels_per_step"]), f"{case['flops'] / 1e9:.1f}", megabytes]
            rows.append([network["model"], *cells, *devices])
    names = list(result["networks"][0]["cases"][0]["devices"])
    header = [
        "network, float16",
        "batch",
        "kernels a step, counted",
        "GFLOP, counted",
        "MB of weights + activations, counted",
        *(f"{name}, ms a step: floor; range (estimate, not measured)" for name in names),
    ]
    aim, assumed = result["aim"], result["assumptions"]
    low, high = (1e6 * seconds for seconds in assumed["kernel_seconds"])
    bandwidth, rate = assumed["sustained_share_of_bandwidth_and_rate"]
    stands = "; ".join(
        f"{name}: {_range(facts['estimate_ms'])} ms with a floor of {facts['floor_us']:.0f} µs, so the aim is "
        f"{facts['aim_is']}"
        for name, facts in aim["devices"].items()
    )
    unfused = next(each for each in result["networks"] if each["model"] == aim["model"])
    operators, most = unfused["operators_in_torch"], aim["most_microseconds_a_kernel"]
    return markdown(header, rows) + (
        f"\n\n**Estimates, not measured.** A kernel is assumed to take {low:g} to {high:g} µs at least, bytes and "
        f"operations to go at the data sheet's rates, or at worst at {bandwidth:.0%} and {rate:.0%} of them. For "
        f"{aim['ms']:g} ms a step of {aim['model']} at batch {aim['batch_size']} kernels may take {most:.1f} µs on "
        f"average. {stands} (estimate, not measured). Unfused, as PyTorch runs the module, it has {operators} "
        f"operators of a kernel or more, {_range(unfused['operators_ms'])} ms at least (estimate, not measured): "
        f"{aim['unfused_aim_is']}. {describe_environment(result['environment'])}."
    )


def _range(numbers: Sequence[float]) -> str:
    return "–".join(f"{number:.2f}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    networks = [describe(name) for name in MODELS]
    assumptions = {
        "dtype": "float16",
        "kernel_seconds": KERNEL_SECONDS,
        "sustained_share_of_bandwidth_and_rate": SUSTAINED,
        "tile": _TILE,
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
    }
    write_json(
        options.out,
        {"measured": False, "assumptions": assumptions, "aim": verdict(networks), "networks": networks},
    )


if __name__ == "__main__":
    main()

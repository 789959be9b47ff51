"""The strongest that torch itself offers on a CPU, in the textbook loop: the network compiled ahead of time by
AOTInductor, with its weights frozen into the code, and the network in bfloat16 with channels last."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from skipstep.bench.contenders import textbook
from skipstep.bench.contenders.pipeline import lacks_compiler, time_boxed
from skipstep.bench.contenders.workload import BuiltContender, Contender, Draw, Setup, Workload
from skipstep.bench.models import Subject


def build_inductor(subject: Subject, setup: Setup) -> BuiltContender:
    folder = tempfile.TemporaryDirectory(prefix="skipstep-bench-")
    networks: dict[int, Any] = {}

    def prepare(workload: Workload) -> Draw:
        size = workload.batch_size
        if size not in networks:
            networks[size] = _compiled(subject, workload, Path(folder.name) / f"{size}.pt2")
        return _looped(networks[size], workload, torch.float32)

    boxed = time_boxed(prepare, setup)
    return BuiltContender(boxed.prepare, close=folder.cleanup)


def _compiled(subject: Subject, workload: Workload, path: Path) -> Any:
    # It moves the module's parameters about, and the subject's belongs to all contenders.
    network = copy.deepcopy(subject.prepared[0]).eval()
    given = (
        torch.from_numpy(workload.x_T),
        torch.zeros(workload.batch_size, dtype=torch.int64),
        *_conditions(workload),
    )
    with torch.no_grad():
        exported = torch.export.export(network, given)
        frozen = {"freezing": True}
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=frozen)
        return torch._inductor.aoti_load_package(package)


def build_bfloat16(subject: Subject, setup: Setup) -> BuiltContender:
    network: Any = copy.deepcopy(subject.prepared[0]).eval().to(torch.bfloat16)
    network = network.to(memory_format=torch.channels_last)

    def channels_last(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = network(x.to(memory_format=torch.channels_last), *others)
        return predicted

    return BuiltContender(lambda workload: _looped(channels_last, workload, torch.bfloat16))


def _conditions(workload: Workload) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in workload.conditioning().values())


def _looped(network: Callable[..., torch.Tensor], workload: Workload, dtype: torch.dtype) -> Draw:
    x_T = torch.from_numpy(workload.x_T)
    given = tuple(each.to(dtype) if each.is_floating_point() else each for each in _conditions(workload))
    return lambda: textbook.ddim(network, workload.plan, x_T, given, dtype)


def _on_cpu(lacks: Callable[[Subject, Setup], str | None]) -> Callable[[Subject, Setup], str | None]:
    def found(subject: Subject, setup: Setup) -> str | None:
        if setup.on_gpu or setup.dtype != "float32":
            return f"measured on the CPU beside float32; this run measures {setup.dtype} on {setup.device}"
        return lacks(subject, setup)

    return found


AHEAD_OF_TIME = (
    Contender("aot-inductor", build_inductor, _on_cpu(lacks_compiler)),
    Contender("torch-bfloat16", build_bfloat16, _on_cpu(textbook.lacks), precision="bfloat16"),
)

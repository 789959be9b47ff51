"""What a call on a GPU costs the host: `python -m skipstep.bench.host_work --out FILE`.

The engine is the real one, from `sample` down to the copies and the launch; the device is one that takes work and does
none: it has a stream, and a graph whose launch is empty. So the time is Python's and torch's own, without a driver's
part (a few microseconds for each copy and launch). It is the calling thread's time on a processor, which programs
beside it lengthen less than the time by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from skipstep import Engine, NoiseSchedule, building
from skipstep.bench.record import environment, write_json
from skipstep.cuda import device as cuda
from skipstep.loops import workspace

_CLASSES = 1 << 20
# Arguments, and how many labels calls take turns with.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "the same label": ({}, 1),
    "another label every call, guided": ({"guidance_scale": 2.0}, 10),
    "a label never seen before, guided": ({"guidance_scale": 2.0}, _CLASSES),
}
_ROUNDS, _CALLS = 9, 300


class IdleStream:
    """Work is issued as it comes."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def record(self, again: IdleStream | None = None) -> IdleStream:
        return self

    def follow(self, other: IdleStream) -> None:
        """Nothing runs late."""

    def wait(self, event: Any) -> None:
        """Nothing runs late."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing runs late."""


class IdleGraph:
    num_nodes, num_bytes = 1, 0

    def replay(self) -> None:
        """One launch, and nothing behind it."""


class IdleDevice:
    """What skipstep.cuda.device.Device asks for."""

    torch_device = torch.device("cpu")
    name, num_multiprocessors, compute_capability = "idle", 132, 90

    def __init__(self, torch_device: object = None) -> None:
        self.stream = IdleStream()

    def caller_stream(self) -> IdleStream:
        return self.stream

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def staging(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def warm_up(self, work: Callable[[], object]) -> int:
        work()
        return 1

    def capture(self, work: Callable[[], object]) -> IdleGraph:
        return IdleGraph()

    def free_bytes(self) -> int:
        return 1 << 34

    def release_memory(self) -> None:
        """There is none."""

    def range(self, name: str) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def is_lost(self) -> bool:
        return False


class Network(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + 0.01 * labels.view(-1, 1, 1, 1)


@contextlib.contextmanager
def idle_engine(steps: int) -> Iterator[Engine]:
    """An engine on the idle device, at batch size 1."""
    with (
        mock.patch.object(building, "resolve_device", return_value=torch.device("cuda")),
        mock.patch.object(cuda, "CudaDevice", IdleDevice),
        mock.patch.object(workspace, "ddim_step"),
        mock.patch.object(workspace, "initial_noise"),
        Engine.build(
            Network(),
            plans=[steps],
            schedule=NoiseSchedule.linear(1000),
            sample_shape=(3, 32, 32),
            num_classes=_CLASSES,
            null_label=_CLASSES,
            backend="torch",
        ) as engine,
    ):
        yield engine


def microseconds(engine: Engine, arguments: dict[str, Any], labels: int, *, calls: int = _CALLS) -> float:
    """Of one call into memory of the caller's, the median over rounds of their mean."""
    out = torch.zeros(1, 3, 32, 32)
    means, turn = [], itertools.count()
    for _ in range(_ROUNDS):
        started = time.thread_time()
        for call in range(calls):
            engine.sample(seeds=[call], out=out, class_labels=next(turn) % labels, **arguments)
        means.append((time.thread_time() - started) / calls)
    return 1e6 * statistics.median(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = {}
    for steps in (10, 50, 1000):
        with idle_engine(steps) as engine:
            for name, (arguments, labels) in CASES.items():
                call = {"steps": steps, **arguments}
                microseconds(engine, call, min(labels, 10), calls=20)
                found[f"{steps} steps, {name}"] = round(microseconds(engine, call, labels), 1)
    facts = environment()
    command = f"python -m skipstep.bench.host_work --out {options.out}"
    write_json(options.out, {"commit": facts["commit"], "command": command, "machine": facts, "microseconds": found})
    for name, value in found.items():
        print(f"{name}: {value:.1f} µs")


if __name__ == "__main__":
    main()

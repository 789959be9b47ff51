"""Latency of whole calls: contenders at every network, batch size and step count, each checked before it is timed.

A check compares the fewest steps with the same loop in float32. Then come calls at each step count, as many as fit into
a second, with all work finished inside the timed call; the line a + b·S through them tells fixed and per-step costs
apart (skipstep.bench.fits). A task writes what it has after every contender, so one that is stopped keeps it.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from skipstep.bench.gpu.contenders import (
    CONTENDERS,
    GpuContender,
    Ready,
    network_graph,
    sample_shape,
    scheduler_loop,
    timed,
)
from skipstep.bench.gpu.device import BenchDevice
from skipstep.bench.gpu.latency_file import Found, write_found
from skipstep.bench.gpu.tasks import CAPTURED, Verdict
from skipstep.bench.gpu_models import DRY_RUN_MODELS, GPU_MODELS
from skipstep.bench.models import BenchModel
from skipstep.bench.results import Contender
from skipstep.plans.plan import Plan
from skipstep.plans.scheduler_config import read_scheduler_config

# All divide the thousand timesteps of training: of other grids diffusers pairs the timesteps wrongly.
STEPS: Final = (10, 20, 50)
DRY_STEPS: Final = (2, 4, 5)
# Largest difference from the float32 loop, over its largest value. Activations round by 2^-11 and the first step
# magnifies that by 1/sqrt(a) = 157 before it clips; a state in half precision rounds at every step besides: on a CPU
# the CIFAR-10 architecture is off by 0.06 then. A wrong loop is off by about 1.
TOLERANCES: Final = {torch.float16: 0.1, torch.float32: 1e-3}
_HALF_STATE_TOLERANCE: Final = 0.2
_SECONDS_PER_POINT: Final = 1.0
_MIN_CALLS, _MAX_CALLS = 3, 50
_JITTER_CALLS: Final = 1000
_NETWORK_CALLS: Final = 30
_NOT_REACHED: Final = "not reached before the task's time was up"


def measure_latency(device: BenchDevice, task: str, out: Path, *, spoil: bool = False) -> Verdict:
    """Measure a task's contenders and write them to `out`. `spoil` makes their samples wrong, to test the check."""
    models = DRY_RUN_MODELS if device.simulated else GPU_MODELS
    contenders = CONTENDERS[task]
    lacking = {each.name: lacks for each in contenders if (lacks := each.lacks())}
    all_steps = DRY_STEPS if device.simulated else STEPS
    found = Found(dtype=str(device.dtype).removeprefix("torch."))
    first = next(iter(models))
    for name, (_, batch_sizes) in models.items():
        for batch_size in batch_sizes:
            for each in contenders:
                if not each.only_first or (name == first and batch_size == batch_sizes[0]):
                    blank = Contender(each.name, "skipped", _NOT_REACHED, each.backend, each.loop)
                    if each.name in lacking:
                        blank = replace(blank, status="absent", reason=lacking[each.name])
                    found.put(name, batch_size, dict.fromkeys(all_steps, blank))
    write_found(out, found, dry_run=device.simulated)
    if len(lacking) == len(contenders):
        return Verdict("absent", "; ".join(lacking.values()))
    for name, (make, batch_sizes) in models.items():
        model = make()
        # Made whole before the network is placed elsewhere: the check's own.
        network = device.place(copy.deepcopy(model.unet), device.dtype)
        options = read_scheduler_config(dict(model.scheduler.config)).plan_options()
        plans = {steps: Plan(**options, steps=steps) for steps in all_steps}
        found.plans.update({(name, steps): plan.key for steps, plan in plans.items()})
        for batch_size in batch_sizes:
            bench = _Bench(device, model, network, batch_size, plans, found, spoil)
            for each in contenders:
                if each.name not in lacking and found.has(name, batch_size, each.name):
                    bench.measure(each)
                    write_found(out, found, dry_run=device.simulated)
    return found.verdict()


class _Bench:
    """One network at one batch size."""

    def __init__(
        self,
        device: BenchDevice,
        model: BenchModel,
        network: torch.nn.Module,
        batch_size: int,
        plans: Mapping[int, Plan],
        found: Found,
        spoil: bool,
    ) -> None:
        self._device, self._model, self._network = device, model, network
        self._batch_size, self._plans, self._found, self._spoil = batch_size, plans, found, spoil
        self._fewest = min(plans)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(batch_size, *sample_shape(model), generator=generator)
        self._x_T = noise.to(device.torch_device)
        self._expected = self._reference()

    def measure(self, contender: GpuContender) -> None:
        """Prepare, check, time; what went wrong is recorded and ends only this contender."""
        blank = Contender(contender.name, "failed", "", contender.backend, contender.loop)
        try:
            results = self._measure(contender, blank)
        except Exception as error:  # Whatever it was: it is reported, and the others go on.
            said = f"{type(error).__name__}: {error}".strip()[:500]
            results = dict.fromkeys(self._plans, replace(blank, reason=said))
        self._found.put(self._model.name, self._batch_size, results)

    def _measure(self, contender: GpuContender, blank: Contender) -> dict[int, Contender]:
        device = self._device
        device.forget_peak()
        arguments = device, self._model, self._network, self._batch_size, self._plans
        ready, build_seconds = timed(lambda: contender.prepare(*arguments), device)
        try:
            started = time.perf_counter()
            drawn = self._call(ready, self._fewest)()
            warmup_seconds = time.perf_counter() - started
            error = float((drawn - self._expected).abs().max() / self._expected.abs().max())
            tolerance = _HALF_STATE_TOLERANCE if contender.half_state else TOLERANCES[device.dtype]
            checked = replace(blank, error=error, tolerance=tolerance)
            # Not "error > tolerance": NaN must not pass.
            if not error <= tolerance:
                wrong = replace(checked, status="wrong", error=None if error != error else error)
                return dict.fromkeys(self._plans, replace(wrong, reason="its samples are not the float32 loop's"))
            results = {}
            for steps in self._plans:
                results[steps] = replace(
                    checked,
                    status="ok",
                    seconds=self._repeat(self._call(ready, steps)),
                    build_seconds=round(build_seconds, 3),
                    warmup_seconds=round(warmup_seconds, 3),
                    peak_memory_bytes=device.peak_bytes(),
                    nodes_per_step=_nodes_per_step(ready.captures, steps),
                )
            if contender.name == CAPTURED:
                self._measure_captured(ready)
            return results
        finally:
            ready.close()

    def _measure_captured(self, ready: Ready) -> None:
        """What is asked of the captured loop alone: its graphs, how steady it is, and what it adds to the network."""
        case = {"model": self._model.name, "batch_size": self._batch_size}
        self._found.captures += [{**case, **report} for report in ready.captures]
        _, _, _, replay = network_graph(self._device, self._network, sample_shape(self._model), self._batch_size)
        self._device.seconds(replay)
        alone = statistics.median(self._device.seconds(replay) for _ in range(_NETWORK_CALLS))
        self._found.networks.append({**case, "seconds": alone})
        if not self._found.jitter:
            call = self._call(ready, self._fewest)
            times = sorted(_seconds(call) for _ in range(20 if self._device.simulated else _JITTER_CALLS))
            ranks = {f"p{p}": times[-(-p * len(times) // 100) - 1] for p in (50, 90, 99)}
            self._found.jitter.append({**case, "steps": self._fewest, "calls": len(times), **ranks, "max": times[-1]})

    def _call(self, ready: Ready, steps: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            drawn = ready.draw(steps, self._x_T)
            self._device.synchronize()
            return drawn + 1 if self._spoil else drawn

        return call

    def _repeat(self, call: Callable[[], Tensor]) -> tuple[float, ...]:
        call()
        times: list[float] = []
        enough = 0.0 if self._device.simulated else _SECONDS_PER_POINT
        while len(times) < _MIN_CALLS or (sum(times) < enough and len(times) < _MAX_CALLS):
            times.append(_seconds(call))
        return tuple(times)

    def _reference(self) -> Tensor:
        """The loop in float32, with diffusers' scheduler, and without the rounding of TF32."""
        network = self._device.place(self._model.unet, torch.float32)
        timestep = torch.zeros(self._batch_size, device=self._device.torch_device, dtype=torch.int64)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

        def predict(x: Tensor, t: int) -> Tensor:
            predicted: Tensor = network(x, timestep.fill_(t)).sample
            return predicted

        return scheduler_loop(self._model, predict, torch.float32)(self._fewest, self._x_T)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _nodes_per_step(captures: list[dict[str, Any]], num_stages: int) -> int | None:
    """Of the graph for so many stages, where the engine says; a step graph is one step already."""
    for report in captures:
        nodes: int | None = report["num_nodes"]
        if nodes is not None and report["num_stages"] == num_stages:
            return round(nodes / (num_stages if report["loop"] == "captured" else 1))
    return None

"""Sampling by plan: which plan a call means, how its samples are split over batch sizes, and what comes back."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.backends import BackendName
from skipstep.calls.batching import split_batch
from skipstep.calls.destination import callers_memory, copy_samples, new_samples
from skipstep.calls.plan_set import PlanHolder
from skipstep.calls.request import Conditions, SampleRequest, resolve_request
from skipstep.calls.trajectory import Callback, Progress, Trajectory, Watch
from skipstep.errors import InputError, NonFiniteError
from skipstep.loops.lifecycle import Lifecycle
from skipstep.loops.stepwise import Finished, Loop, Pending, run_observed
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.plan import Plan
from skipstep.plans.stages import Stages

if TYPE_CHECKING:
    from skipstep.latency.calibration import Calibration
    from skipstep.latency.identity import DeviceIdentity
    from skipstep.loops.captured import Lane
    from skipstep.loops.programs import CaptureReport

OutputType = Literal["np", "pt", "pil"]


class Sampler(PlanHolder):
    """A network's loops and the plans that were made for it. Calls from several threads are safe.

    `plans` and `batch_sizes` say what it holds, `backend` and `device` where it runs. `loops` are by the network's
    batch size; with `any_batch` they are one, which takes every size, and the largest of batch_sizes is the most that
    it is given at once. `precision` is the network's, `num_threads` what it may use on the CPU (None: every core).
    `lane` is what its loops share on a GPU.
    """

    def __init__(
        self,
        network: NetworkSpec,
        *,
        loops: Mapping[int, Loop],
        batch_sizes: Sequence[int],
        backend: BackendName,
        device: str,
        plan_defaults: Mapping[str, Any],
        compile_on_miss: bool = False,
        any_batch: bool = False,
        precision: str = "float32",
        num_threads: int | None = None,
        lifecycle: Lifecycle | None = None,
        lane: Lane | None = None,
    ) -> None:
        super().__init__(network, plan_defaults=plan_defaults, compile_on_miss=compile_on_miss)
        self.any_batch = any_batch
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.backend = backend
        self.device = device
        self.precision, self.num_threads = precision, num_threads
        self.loops = loops
        # Latencies that were measured here, for deadlines; `calibrate` makes them, and bundles bring them.
        self.calibration: Calibration | None = None
        self._lifecycle = lifecycle or Lifecycle()
        self._lane = lane
        self._worker: ThreadPoolExecutor | None = None
        self._worker_lock = threading.Lock()

    def prepare(self) -> None:
        """Compile and record what the plans need, so that no call has to. Launches that were tuned here are used."""
        if self._lane is not None and self.calibration is not None:
            self._lane.launches.update({each.case: each.launch for each in self.calibration.launches})
        stages = [Stages.of([plan]) for plan in self.plans.values()]
        for loop in self.loops.values():
            loop.prepare(stages)

    def sample(
        self,
        *,
        steps: int | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        deadline_ms: float | None = None,
        seeds: int | Sequence[int] | None = None,
        x_T: Any = None,
        output_type: OutputType = "np",
        out: Any = None,
        trajectory: bool | int = False,
        callback: Callback | None = None,
        progress: Progress | None = None,
        **conditions: Unpack[Conditions],
    ) -> Any:
        """Draw samples with the plan of `steps` steps, with `plan`, or with the longest that meets a deadline.

        plan            one for all samples, or a list with one for each: of equal structure, but each with its own
                        timesteps and eta (skipstep.plans.stages.Stages).
        deadline_ms     milliseconds that the call may take: the plan with the most steps whose measured p99 fits, with
                        a margin (skipstep.latency.deadline). Needs `calibrate`, once on this device.
        seeds           an int for every sample, or one each, in [0, 2**64): a sample depends on its seed, not on its
                        place in the batch. They also key the noise that a plan adds.
        x_T             `[B, C, H, W]` NumPy, torch or DLPack, the initial noise instead of that of the seeds. A tensor
                        on the engine's GPU is read there, in the order of the caller's stream.
        conditions      class_labels, prompt_embeds, negative_prompt_embeds, guidance_scale and guidance_rescale
                        (skipstep.calls.request.Conditions).
        output_type     "np": float32 `[B, C, H, W]` in the network's range ([-1, 1] for pixels); "pt": the same as a
                        torch tensor, on the engine's device; "pil": a list of 8-bit pictures.
        out             float32 `[B, C, H, W]` to draw into, NumPy, torch or DLPack, in host memory or on the engine's
                        device; it is returned.
        trajectory      True, or a stride of steps: returns (samples, Trajectory) instead of the samples.
        callback        called as callback(StepEvent) after every step.
        progress        called as progress(done, total), in network evaluations.

        Who looks on, by trajectory, callback or progress, makes the loop run one evaluation at a time.
        Returns new memory every time, unless there is `out`. Raises InputError, PlanError, PlanNotFoundError,
        DeadlineError where no plan is fast enough, NonFiniteError where the network returned NaN, and EngineStateError
        for an engine that was closed or forked.
        """
        call = self._call(steps, plan, deadline_ms, seeds, x_T, output_type, out, conditions)
        if trajectory is not False:
            shape = (call.request.num_samples, *self.network.sample_shape)
            stride = 1 if trajectory is True else trajectory
            kept = Trajectory.empty(sum(call.stages.ends_step), stride, shape)
            return self._perform(call, progress=progress, callback=callback, trajectory=kept), kept
        return self._perform(call, progress=progress, callback=callback)

    def sample_async(
        self,
        *,
        steps: int | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        deadline_ms: float | None = None,
        seeds: int | Sequence[int] | None = None,
        x_T: Any = None,
        output_type: OutputType = "np",
        out: Any = None,
        **conditions: Unpack[Conditions],
    ) -> Future[Any]:
        """`sample` in the background, first come first served; what is wrong with the arguments is raised here.

        The future's result is what `sample` returns, complete on every stream; asyncio.wrap_future makes it awaitable.
        x_T and `out` are the engine's until then.
        """
        call = self._call(steps, plan, deadline_ms, seeds, x_T, output_type, out, conditions)
        # The worker has a stream of its own: what this thread has enqueued comes first.
        before = None if self._lane is None else self._lane.device.caller_stream().record()

        def work() -> Any:
            if self._lane is not None:
                self._lane.device.stream.wait(before)
            return self._perform(call)

        with self._worker_lock:
            self._lifecycle.check()
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="skipstep")
            return self._worker.submit(work)

    def close(self) -> None:
        """Give back memory and threads, after the calls that are under way. Later ones raise EngineStateError."""
        with self._worker_lock:
            self._lifecycle.close()
        if self._worker is not None:
            self._worker.shutdown()
        for loop in self.loops.values():
            loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, stages: Stages, request: SampleRequest) -> NDArray[np.float32]:
        """Walk a request to x_0 `[B, C, H, W]`. Arguments are taken as checked. Raises NonFiniteError."""
        result = np.empty((request.num_samples, *self.network.sample_shape), np.float32)
        self._draw(stages, request, result)
        return result

    def _call(
        self,
        steps: int | None,
        plan: Plan | Sequence[Plan] | None,
        deadline_ms: float | None,
        seeds: int | Sequence[int] | None,
        x_T: Any,
        output_type: OutputType,
        out: Any,
        conditions: Conditions,
    ) -> _Call:
        """Everything about a call that can be wrong is found here, before anything is drawn."""
        self._lifecycle.check()
        _check_output_type(output_type)
        if deadline_ms is None:
            plans = self.chosen_plans(steps, plan)
        elif steps is None and plan is None:
            plans = [self._plan_within(deadline_ms, seeds, x_T, conditions)]
        else:
            raise InputError(
                got="deadline_ms beside steps or plan", expected="one of them", remedy="leave the others out"
            )
        stages = Stages.of(plans)
        request = resolve_request(
            self.network,
            seeds=seeds,
            x_T=x_T,
            adds_noise=stages.adds_noise,
            num_plans=len(plans),
            device=self.device,
            **conditions,
        )
        shape = (request.num_samples, *self.network.sample_shape)
        if out is None:
            on_device = self.device if output_type == "pt" and self._lane is not None else None
            return _Call(stages, request, new_samples(shape, on_device=on_device), output_type, None)
        if output_type == "pil":
            raise InputError(got="out with output_type='pil'", expected="'np' or 'pt'", remedy="leave one of them out")
        return _Call(stages, request, callers_memory(out, shape, device=self.device), output_type, out)

    def _perform(
        self,
        call: _Call,
        *,
        progress: Progress | None = None,
        callback: Callback | None = None,
        trajectory: Trajectory | None = None,
    ) -> Any:
        self._draw(call.stages, call.request, call.samples, progress=progress, callback=callback, trajectory=trajectory)
        return self.as_output(call.samples, call.output_type) if call.out is None else call.out

    def _draw(
        self,
        stages: Stages,
        request: SampleRequest,
        samples: Any,
        *,
        progress: Progress | None = None,
        callback: Callback | None = None,
        trajectory: Trajectory | None = None,
    ) -> None:
        """Split a request over the batch sizes, enqueue them all, and wait once. Raises NonFiniteError."""
        self._lifecycle.check()
        runs = self.split(request.num_samples)
        watch = Watch(stages, len(runs), progress, callback, trajectory)
        pending: list[tuple[int, Pending]] = []
        start = 0
        for size in runs:
            loop = self.loop_for(size, request)
            part = samples[start : start + size]
            observer = watch.chunk(start, len(part))
            here, asked = stages.chunk(start, size), request.chunk(start, size)
            if observer is None:
                pending.append((start, loop.enqueue(here, asked, part)))
            else:
                drawn = np.empty((len(part), *self.network.sample_shape), np.float32)
                done = run_observed(loop, here, asked, drawn, observer=observer, keep_x0=watch.needs_x0)
                pending.append((start, done))
                copy_samples(drawn, part)
            start += size
        broken: dict[int, int | None] = {}
        for first, each in pending:
            broken |= {first + sample: stage for sample, stage in each.wait().items()}
        _check_finite(broken, request.num_samples, len(stages))

    def split(self, num_samples: int) -> list[int]:
        """The batch sizes of the runs that draw so many samples; the last may draw more than are left."""
        if not self.any_batch:
            return split_batch(num_samples, self.batch_sizes)
        largest = self.batch_sizes[-1]
        rest = num_samples % largest
        return [largest] * (num_samples // largest) + ([rest] if rest else [])

    def loop_for(self, batch_size: int, request: SampleRequest) -> Loop:
        """The loop that runs `batch_size` samples of this request; with guidance the network's batch is twice that."""
        return next(iter(self.loops.values())) if self.any_batch else self.loops[request.num_copies * batch_size]

    @property
    def captures(self) -> tuple[CaptureReport, ...]:
        """On a GPU: how each structure of plans runs, why it is no more, and what it takes. Empty on the CPU."""
        return tuple(report for loop in self.loops.values() for report in getattr(loop, "reports", ()))

    def describe(self) -> str:
        """What the engine holds and how it runs, one fact a line."""
        shape = "×".join(map(str, self.network.sample_shape))
        classes = "unconditional" if self.network.num_classes is None else f"{self.network.num_classes} classes"
        if self.network.prompt_shape is not None:
            classes = "prompts of {}×{}".format(*self.network.prompt_shape)
        guidance = ", with guidance" if self.network.can_guide else ""
        loop = next(iter(self.loops.values())).name
        sizes = self.batch_sizes
        latencies: list[str] = []
        if self.calibration is not None:
            from skipstep.latency.calibration import describe_latencies

            latencies = describe_latencies(self.calibration, self.plans)
        return "\n".join(
            [
                f"network     {shape}, {classes}{guidance}",
                f"backend     {self.backend} on {self.device}",
                f"loop        {loop}",
                f"batch sizes {f'up to {max(sizes)}' if self.any_batch else ', '.join(map(str, sizes))}",
                *(f"plan        {plan!r}" for plan in self.plans.values()),
                *(f"graph       {report}" for report in self.captures),
                *latencies,
            ]
        )

    def identity(self) -> DeviceIdentity:
        """What must be equal for latencies that were measured elsewhere to count here."""
        from skipstep.latency.identity import device_identity

        return device_identity(
            backend=self.backend,
            loop=next(iter(self.loops.values())).name,
            device=self.device,
            precision=self.precision,
            num_threads=self.num_threads,
            gpu_name=None if self._lane is None else self._lane.device.name,
        )

    def _plan_within(self, deadline_ms: float, seeds: Any, x_T: Any, conditions: Conditions) -> Plan:
        from skipstep.latency.deadline import choose_plan

        asked = resolve_request(self.network, seeds=seeds, x_T=x_T, device=self.device, **conditions)
        return choose_plan(
            self.calibration,
            self.plans.values(),
            self.split(asked.num_samples),
            deadline_ms=deadline_ms,
            guided=asked.guidance is not None,
            identity=self.identity(),
        )

    def as_output(self, result: Any, output_type: OutputType) -> Any:
        """x_0 `[B, C, H, W]`, NumPy or a tensor where it is one already, as the caller asked for it."""
        if output_type == "pil":
            from skipstep.calls.images import to_pil

            return to_pil(result)
        if output_type == "pt":
            import torch

            return torch.as_tensor(result, device=self.device)
        return result


def _check_output_type(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        raise InputError(got=f"output_type={output_type!r}", expected="'np', 'pt' or 'pil'", remedy="pick one of these")


@dataclass(frozen=True, slots=True)
class _Call:
    """A call whose arguments have been checked: `samples` is where they go, `out` what the caller gave for that."""

    stages: Stages
    request: SampleRequest
    samples: Any
    output_type: OutputType
    out: Any


def check_finite(result: NDArray[np.float32]) -> None:
    """Raise NonFiniteError naming the samples of `[B, C, H, W]` that hold NaN or infinity."""
    _check_finite(Finished(result).wait(), len(result), 0)


def _check_finite(broken: Mapping[int, int | None], num_samples: int, num_stages: int) -> None:
    if not broken:
        return
    first = min((stage for stage in broken.values() if stage is not None), default=None)
    since = "" if first is None else f", since evaluation {first + 1} of {num_stages}"
    raise NonFiniteError(
        got=f"NaN or infinity in samples {sorted(broken)[:8]} of {num_samples}{since}",
        expected="finite predictions from the network",
        remedy="check the weights and the inputs; a network that overflows in half precision needs float32",
    )

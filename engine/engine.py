"""The engine: a network and the plans that were made for it, behind one call.

engine = Engine.build("checkpoint-folder", plans=[10, 20, 50], batch_sizes=[1, 16])
images = engine.sample(steps=20, seeds=[0, 1, 2, 3], output_type="pil")

It has plans (skipstep.calls.plan_set), a runner (skipstep.loops.runner) and a source (skipstep.backends.denoiser);
editing, interpolation, calibration and tuning are functions over it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack

import numpy as np

from skipstep.calls.destination import callers_memory
from skipstep.calls.inputs import Inputs, split_inputs
from skipstep.calls.request import MAX_SAMPLES, Conditions, SampleRequest, resolve_request
from skipstep.calls.trajectory import Callback, Progress, Trajectory
from skipstep.delegates import Later
from skipstep.errors import EngineStateError, InputError, check_callable, check_integer
from skipstep.loops.observers import Blend, Observers
from skipstep.loops.runner import CompiledNetwork, OutputType, SampleArguments, check_output_type
from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.stages import Stages

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from skipstep import loras, saving
    from skipstep.building import BuildOptions
    from skipstep.editing import between, edit
    from skipstep.fitting import tune as fitting
    from skipstep.latency import description, identity, pareto, tuning
    from skipstep.latency.calibration import Calibration
    from skipstep.loops.contract import LoopReport
    from skipstep.pipelines import pipeline
else:
    fitting, saving, pipeline = map(Later, ("skipstep.fitting.tune", "skipstep.saving", "skipstep.pipelines.pipeline"))
    between, edit, loras = map(Later, ("skipstep.editing.between", "skipstep.editing.edit", "skipstep.loras"))
    latency = (Later(f"skipstep.latency.{name}") for name in ("description", "identity", "pareto", "tuning"))
    description, identity, pareto, tuning = latency


class Engine:
    """A compiled sampler. Calls from several threads are safe.

    `plans` by key and `batch_sizes` say what it holds, `backend`, `device` and `precision` where and how it runs.
    `calibration`: latencies that were measured here or came with a bundle, for deadlines.
    """

    invert = edit.invert
    reconstruct = edit.reconstruct
    edit = edit.edit
    interpolate = between.interpolate
    interpolate_grid = between.interpolate_grid
    calibrate = tuning.calibrate
    autotune = tuning.autotune
    tune = fitting.tune
    pareto = pareto.pareto
    describe = description.describe
    identity = identity.engine_identity
    save = saving.save
    swap_loras = loras.swap_loras
    encode = pipeline.encode
    decode = pipeline.decode
    preview = pipeline.preview

    def __init__(self, compiled: CompiledNetwork) -> None:
        if not isinstance(compiled, CompiledNetwork):
            raise InputError(
                got=f"a network of type {type(compiled).__name__}",
                expected="one that was compiled",
                remedy="make engines with Engine.build(model, plans=[20]) or skipstep.load(bundle)",
            )
        self.source, self.plans, self.runner = compiled.source, compiled.plans, compiled.runner
        self.backend, self.precision, self.num_threads = compiled.backend, compiled.precision, compiled.num_threads
        self.network, self.loras = compiled.source.spec, compiled.loras
        self.calibration: Calibration | None = None
        if compiled.calibrations is not None:
            from skipstep.latency.tuning import use_stored

            self.calibration = use_stored(compiled.calibrations, self.identity(), self.runner.loop)
        self._worker: ThreadPoolExecutor | None = None
        self._worker_lock = threading.Lock()

    @classmethod
    def build(
        cls,
        model: Any,
        *,
        plans: Iterable[int | Plan],
        batch_sizes: Iterable[int] = (1,),
        schedule: NoiseSchedule | None = None,
        prediction_type: str | None = None,
        compile_on_miss: bool = False,
        compatibility: Literal["diffusers"] | None = None,
        **options: Unpack[BuildOptions],
    ) -> Engine:
        """Compile `model` for the given plans and batch sizes.

        model           the path of a diffusers folder, an .onnx file or a .safetensors file (with config=); a diffusers
                        pipeline with a unet; or an nn.Module called as network(x [N, *sample_shape], t [N], …) with its
                        conditions, which is put into eval mode.
        plans           step counts, made into DDIM plans with what the folder's scheduler configuration says, or Plans.
        batch_sizes     the numbers of samples to compile for; requests of any size are split over them.
        schedule        instead of the folder's scheduler configuration, which is then not read: prediction_type= and
                        clipping come from the arguments. Needed for step counts where there is no configuration.
        prediction_type overrides the folder's; "epsilon" where neither says.
        compile_on_miss compile a plan that is requested and not held, instead of raising PlanNotFoundError.
        compatibility   "diffusers": step counts visit exactly the noise levels that its DDIMScheduler visits, also
                        where its stride is off (`linspace`, and `trailing` where the steps do not divide T). Where that
                        makes a difference and this is left out, the logger "skipstep" warns once.
        options         backend, loop, device and so on: skipstep.building.BuildOptions.

        Raises InputError, PlanError, ModelFormatError, ExportError, MissingDependencyError, DeviceUnavailableError.
        """
        from skipstep.building import PlanRequest, build_network  # The only part that needs torch.

        request = PlanRequest(plans, schedule, prediction_type, compile_on_miss, compatibility)
        engine = cls(build_network(model, request, sampler=cls, batch_sizes=batch_sizes, **options))
        engine.prepare()
        return engine

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self.runner.batch_sizes

    @property
    def device(self) -> str:
        return self.runner.loop.device

    @property
    def plan_defaults(self) -> Mapping[str, Any]:
        """The options of a plan that is requested by step count."""
        return self.plans.defaults

    @property
    def captures(self) -> tuple[LoopReport, ...]:
        """On a GPU: how each structure of plans runs, why a faster form was not possible, and what it takes."""
        return self.runner.loop.reports

    def add_plan(self, plan: int | Plan, *, eta: float = 0.0, allow_mismatch: bool = False) -> Plan:
        """Hold one more plan and return it; `eta` is that of a step count. Raises PlanError where it does not fit.

        A plan that was fitted to another network is refused, and so are calls whose guidance scale is far from that of
        the fit, unless `allow_mismatch`.
        """
        return self.plans.add(plan, eta=eta, allow_mismatch=allow_mismatch)

    def select_plan(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan:
        """The held plan with that step count, or the given one. Raises PlanNotFoundError, listing what is held."""
        return self.plans.select(steps=steps, plan=plan)

    def split(self, num_samples: int) -> list[int]:
        """The batch sizes of the runs that draw so many samples; the last may draw more than are left."""
        return self.runner.split(check_integer("num_samples", num_samples, low=1, high=MAX_SAMPLES))

    def prepare(self) -> None:
        """Compile and record what the plans need, so that no call has to."""
        self.runner.loop.prepare([Stages.of([plan]) for plan in self.plans.values()])

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
        **inputs: Unpack[Inputs],
    ) -> Any:
        """Draw samples with the plan of `steps` steps, with `plan`, or with the best that meets a deadline.

        plan            one for all samples, or a list with one for each: of equal structure, but each with its own
                        timesteps and eta (skipstep.plans.stages.Stages).
        deadline_ms     milliseconds that the call may take: of the plans whose measured p99 fits, with a margin, the
                        one with the best measured quality, else with the most steps (skipstep.latency.deadline). Needs
                        `calibrate`, once on this device.
        seeds           an int for every sample, or one each, in [0, 2**64): a sample depends on its seed, not on its
                        place in the batch. They also key the noise that a plan adds.
        x_T             `[B, *sample_shape]` NumPy, torch or DLPack, instead of the seeds' noise. A tensor on the
                        engine's GPU is read there, in the order of the caller's stream.
        inputs          class_labels, prompt_embeds, negative_prompt_embeds, guidance_scale, guidance_rescale, and
                        conditions= and negative_conditions= by name (skipstep.calls.request.Conditions); with a
                        pipeline prompt, negative_prompt, image, mask and strength (skipstep.calls.inputs.Inputs).
        output_type     "np": float32 `[B, *sample_shape]` in the network's range, [-1, 1] for pixels; "pt": the same as
                        a torch tensor, on the engine's device; "pil": a list of 8-bit pictures. Of a pipeline its
                        pictures, and "latent" what its network drew.
        out             float32 `[B, *sample_shape]`, NumPy, torch or DLPack, on the host or the device: is returned.
        trajectory      True, or a stride of steps: returns (samples, Trajectory) instead of the samples.
        callback        called as callback(StepEvent) after every step; progress as progress(evaluations done, total).

        With a trajectory, callback or progress the loop runs one evaluation at a time. New memory every time, unless
        `out` is given. Raises InputError, PlanError, PlanNotFoundError, DeadlineError where no plan is fast enough,
        NonFiniteError where the network returned NaN, and EngineStateError for an engine that was closed or forked.
        """
        check_callable("callback", callback, "StepEvent")
        check_callable("progress", progress, "done, total")
        with self.runner.gate:
            call = self._call(
                steps=steps,
                plan=plan,
                deadline_ms=deadline_ms,
                seeds=seeds,
                x_T=x_T,
                output_type=output_type,
                out=out,
                **inputs,
            )
            kept = None
            if trajectory is not False:
                shape = (call.request.num_samples, *self.network.sample_shape)
                kept = Trajectory.empty(sum(call.stages.ends_step), 1 if trajectory is True else trajectory, shape)
            samples = self._draw(call, progress, callback, kept)
        return samples if kept is None else (samples, kept)

    def sample_async(self, **arguments: Unpack[SampleArguments]) -> Future[Any]:
        """`sample` in the background, first come first served; errors in the arguments are raised here.

        The future's result is what `sample` returns, complete on every stream; asyncio.wrap_future makes it awaitable.
        x_T and `out` belong to the engine until then.
        """
        from concurrent.futures import ThreadPoolExecutor  # Slow to import.

        with self.runner.gate:
            call = self._call(**arguments)
        # The worker has its own stream: what this thread has enqueued comes first.
        order = self.runner.loop.caller_order()

        def work() -> Any:
            order()
            return self._draw(call)

        with self._worker_lock:
            self.runner.check()
            self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="skipstep")
            return self._worker.submit(work)

    def close(self) -> None:
        """Release memory and threads, after the calls that are under way. Later calls raise EngineStateError."""
        with self._worker_lock:
            self.runner.close()
        if self._worker is not None:
            self._worker.shutdown()
        self.runner.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise EngineStateError(
            got="an engine to be pickled or copied",
            expected="one engine in each process: it holds threads, locks and a runtime's session",
            remedy="save it with engine.save(path, license=...) and call skipstep.load(path) in the other process",
        )

    def _call(
        self,
        *,
        steps: int | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        deadline_ms: float | None = None,
        seeds: int | Sequence[int] | None = None,
        x_T: Any = None,
        output_type: OutputType = "np",
        out: Any = None,
        **inputs: Unpack[Inputs],
    ) -> _Call:
        """Everything about a call that can be wrong is found here, before anything is drawn."""
        self.runner.check()
        check_output_type(output_type)
        conditions, starts = split_inputs(self.runner.pipeline, self.network, inputs)
        if deadline_ms is None:
            plans = self.plans.choose(steps, plan)
        elif steps is None and plan is None:
            plans = [self._plan_within(deadline_ms, seeds, x_T, conditions)]
        else:
            raise InputError(got="deadline_ms beside steps or plan", expected="one of them", remedy="pass only one")
        blend = None
        if starts:
            from skipstep.pipelines.start import begin

            begun = begin(self.runner.pipeline, self.network, plans, conditions, seeds=seeds, x_T=x_T, **starts)
            plans, x_T, conditions, blend = begun.plans, begun.x_T, begun.conditions, begun.blend
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
        self.plans.check_guidance(plans, request.guidance)
        shape = (request.num_samples, *self.network.sample_shape)
        if out is None:
            new = self.runner.loop.new_samples(shape) if output_type == "pt" else np.empty(shape, np.float32)
            return _Call(stages, request, new, output_type, None, blend)
        if output_type == "pil":
            raise InputError(got="out with output_type='pil'", expected="'np' or 'pt'", remedy="leave one of them out")
        return _Call(stages, request, callers_memory(out, shape, device=self.device), output_type, out, blend)

    def _draw(self, call: _Call, progress: Any = None, callback: Any = None, kept: Any = None) -> Any:
        observers = None
        if (call.blend, progress, callback, kept) != (None, None, None, None):
            num_runs = len(self.split(call.request.num_samples))
            observers = Observers(call.stages, num_runs, progress, callback, kept, call.blend)
        self.runner.draw(call.stages, call.request, call.samples, observers=observers)
        return self.runner.as_output(call.samples, call.output_type) if call.out is None else call.out

    def _plan_within(self, deadline_ms: float, seeds: Any, x_T: Any, conditions: Conditions) -> Plan:
        from skipstep.latency.deadline import choose_plan

        request = resolve_request(self.network, seeds=seeds, x_T=x_T, device=self.device, **conditions)
        return choose_plan(
            self.calibration,
            [plan for plan in self.plans.values() if self.plans.fits_guidance(plan, request.guidance)],
            self.split(request.num_samples),
            deadline_ms=deadline_ms,
            guided=request.guidance is not None,
            identity=self.identity(),
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """A checked call: `samples` is where they go, `out` what the caller gave for that; `blend` changes the state."""

    stages: Stages
    request: SampleRequest
    samples: Any
    output_type: OutputType
    out: Any
    blend: Blend | None

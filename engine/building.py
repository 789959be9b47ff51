"""From a model to a network that is ready to be sampled: check the options, read it, choose backend and loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack, cast, get_args

from skipstep.backends.denoiser import EIGHT_BITS, Denoiser, Precision, Target
from skipstep.backends.registry import BACKENDS, check_device, check_library, resolve_backend
from skipstep.backends.tensorrt_library import choose_library
from skipstep.backends.tensorrt_options import DEFAULTS, OPTIONS_REMEDY, TensorRTOptions, check_library_options
from skipstep.calls.plan_set import PlanSet, make_plan
from skipstep.cuda.probe import resolve_device
from skipstep.errors import (
    InputError,
    PlanError,
    check_choice,
    check_flag,
    check_integer,
    check_items,
    check_type,
)
from skipstep.loops.agreement import NetworkProbe
from skipstep.loops.choice import FORMS, make_loop, resolve_form
from skipstep.loops.contract import Lifecycle, Sampler
from skipstep.loops.runner import BatchRunner, CompiledNetwork
from skipstep.model_source import NO_TORCH_BACKEND, ModelOptions
from skipstep.networks.spec import MAX_BATCH_SIZE, network_batch_sizes
from skipstep.opening import is_onnx_path, open_model
from skipstep.pipelines.building import PartsOptions, find_parts
from skipstep.pipelines.exporting import export_parts
from skipstep.plans.parameterization import PREDICTION_TYPES, TIME_INPUTS
from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule, check_schedule
from skipstep.plans.scheduler_config import SchedulerConfig
from skipstep.quantizing import check_calibration, quantize_source
from skipstep.reporting import LOGGER, Report, reporter


class BuildOptions(ModelOptions, PartsOptions, total=False):
    """How a network is compiled; each may be left out. Those of a pipeline's folder: PartsOptions.

    backend           "torch", "onnxruntime", "openvino", "webgpu", "tensorrt" or "auto" (skipstep.backends.registry
                      has the table).
    loop              on a GPU "captured", "step_graph" or "stepwise" (skipstep.loops.programs), on the CPU "stepwise".
                      "auto": the one with the fewest launches from the host. `Engine.describe` says which was possible.
    require_captured  on a GPU: raise CaptureError where a loop cannot run as `loop` says, instead of a simpler one.
    device            "cpu", "cuda", "cuda:1", or "auto": the GPU where there is one.
    precision         of the network: "float32" (also "auto"), on a GPU "tf32" (float32, products rounded to ten
                      bits), "float16" and "bfloat16", with TensorRT "int8" and "fp8"; on the CPU "int8", with openvino
                      "bfloat16" on a processor that has it; the state is always float32.
    library           of the tensorrt backend: "tensorrt" or "tensorrt_rtx"; None: full TensorRT where it is installed.
    tensorrt          TensorRTOptions of the tensorrt backend: optimisation level, workspace, timing cache and so on.
    compile_network   run torch's module through torch.compile first (torch on a GPU).
    calibration       with "int8" and "fp8": seeds to draw with, or a folder of .npz files, each with the arguments of
                      one call of `sample`, "conditions/NAME" for those by name (skipstep.quantizing).
    num_threads       of ONNX Runtime and OpenVINO on the CPU; None: all that the process may use. torch keeps its own.
    loras             LoRA files of diffusers or kohya, [("style.safetensors", 0.8)], added to the network's weights
                      and those of a pipeline's text encoders.
    lora_rank         keep them beside the weights instead, for Engine.swap_loras, up to this rank (onnxruntime and
                      torch on the CPU, float32).
    progress          called as progress(phase), in words, which the logger "skipstep" gets too.
    """

    backend: str
    loop: str
    require_captured: bool
    device: str
    precision: str
    calibration: Iterable[int] | str | os.PathLike[str] | None
    library: str | None
    tensorrt: TensorRTOptions
    compile_network: bool
    num_threads: int | None
    loras: Iterable[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] | None
    lora_rank: int | None
    progress: Report | None


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The arguments of Engine.build about plans."""

    plans: Iterable[int | Plan]
    schedule: NoiseSchedule | None
    prediction_type: str | None
    compile_on_miss: bool
    compatibility: str | None = None

    def made(
        self, scheduler: SchedulerConfig | None, time_input: str | None = None, sigma_data: float | None = None
    ) -> tuple[list[Plan], dict[str, Any]]:
        """The plans, and the defaults of later ones. Needs no network, so that what is wrong is said at once."""
        check_flag("compile_on_miss", self.compile_on_miss)
        remedy = "pass plans=[20], or compile_on_miss=True"
        given = check_items("plans", self.plans, expected="step counts or Plans", remedy=remedy, error=PlanError)
        defaults = {} if scheduler is None else scheduler.plan_options()
        if self.schedule is not None:
            defaults["schedule"] = check_schedule(self.schedule)
        if self.prediction_type is not None:
            defaults["prediction_type"] = check_choice(
                "prediction_type", self.prediction_type, PREDICTION_TYPES, error=PlanError
            )
        if time_input is not None:
            defaults["time_input"] = check_choice("time_input", time_input, TIME_INPUTS, error=PlanError)
        if defaults.get("prediction_type") == "edm" and sigma_data is not None:
            defaults["sigma_data"] = sigma_data
        # Of other families the next level is where diffusers steps to.
        strides = scheduler is None or scheduler.state == "vp"
        if self.compatibility is not None:
            check_choice("compatibility", self.compatibility, ("diffusers",), error=PlanError)
            if strides:
                defaults["stride"] = self.compatibility
        plans = [make_plan(each, defaults) for each in given]
        if scheduler is not None and strides and self.compatibility is None:
            _warn_of_other_images([plan for plan, asked in zip(plans, given, strict=True) if plan is not asked])
        if not plans and not self.compile_on_miss:
            raise PlanError(got="no plans", expected="at least one", remedy=remedy)
        return plans, defaults


def _warn_of_other_images(plans: Iterable[Plan]) -> None:
    """Say once for which of the step counts diffusers draws other images from the same folder."""
    others = [plan.steps for plan in plans if plan.spacing is not None and plan.pairs != _diffusers_pairs(plan)]
    if others:
        LOGGER.warning(
            "with %s steps diffusers steps to other noise levels than those it visits next, and draws other images; "
            "for its images pass compatibility='diffusers'",
            ", ".join(map(str, others)),
        )


def _diffusers_pairs(plan: Plan) -> object:
    try:
        return replace(plan, timesteps=(), stride="diffusers").pairs
    except PlanError:
        return None


def build_network(
    model: Any,
    request: PlanRequest,
    *,
    sampler: Callable[[CompiledNetwork], Sampler],
    batch_sizes: Iterable[int],
    backend: str = "auto",
    loop: str = "auto",
    require_captured: bool = False,
    device: str = "auto",
    precision: str = "float32",
    calibration: Iterable[int] | str | os.PathLike[str] | None = None,
    library: str | None = None,
    tensorrt: TensorRTOptions = DEFAULTS,
    compile_network: bool = False,
    num_threads: int | None = None,
    loras: Iterable[Any] | None = None,
    lora_rank: int | None = None,
    progress: Report | None = None,
    height: int | None = None,
    width: int | None = None,
    tile: int | None = None,
    prompt_chunks: int | None = None,
    preview: str | os.PathLike[str] | None = None,
    safety_checker: bool | None = None,
    **model_options: Unpack[ModelOptions],
) -> CompiledNetwork:
    """See Engine.build and BuildOptions. What can be refused without torch and the network is refused before them."""
    report = reporter(progress)
    sizes = _checked_batch_sizes(batch_sizes)
    check_choice("precision", precision, ("auto", *get_args(Precision)))
    precision = "float32" if precision == "auto" else precision
    calibration = check_calibration(precision, calibration)
    check_choice("backend", backend, ("auto", *dict.fromkeys(each.name for each in BACKENDS)))
    check_choice("loop", loop, ("auto", *dict.fromkeys(form for forms in FORMS.values() for form in forms)))
    check_device(device, auto=True)
    check_flag("compile_network", compile_network)
    check_flag("require_captured", require_captured)
    check_type("tensorrt", tensorrt, TensorRTOptions, remedy=OPTIONS_REMEDY)
    target = Target("cpu", cast(Precision, precision), num_threads, compile_network, library=check_library(library))
    if backend == "torch" and is_onnx_path(model):
        raise InputError(
            got="backend='torch' for an .onnx file", expected="a backend that runs graphs", remedy=NO_TORCH_BACKEND
        )
    shape = model_options.get("sample_shape")
    of_parts: PartsOptions = {"height": height, "width": width, "tile": tile, "prompt_chunks": prompt_chunks}
    of_parts |= {"preview": preview, "safety_checker": safety_checker}
    parts = find_parts(model, shape, **of_parts)
    if parts is not None:
        model_options["sample_shape"] = parts.sample_shape
        if parts.prompt_shape is not None:
            model_options["prompt_shape"] = parts.prompt_shape
        if model_options.get("controlnet") is None:
            model_options["controlnet"] = parts.controlnets
        model_options["conditions"] = {**parts.conditions, **(model_options.get("conditions") or {})}
        if parts.scheduler is not None:
            if model_options.get("scheduler") is not None or request.schedule is not None:
                raise InputError(
                    got="scheduler= or schedule= for an upscaler",
                    expected="the levels of its folder's scheduler_config.json",
                    remedy="change that file; Plans may have a schedule of their own, with prediction_type='edm', "
                    "time_input='c_noise' and sigma_data=1.0",
                )
            model_options["scheduler"] = parts.scheduler
    opened = open_model(model, with_scheduler=request.schedule is None, **model_options)
    plans, defaults = request.made(opened.scheduler, model_options.get("time_input"), model_options.get("sigma_data"))
    report("read the model" + "".join(f"; {each}" for each in opened.guessed))
    resolved = resolve_device(device, needs_torch=opened.is_torch)
    kind = "cpu" if resolved is None else resolved.type
    chosen = resolve_backend(backend, device=kind, exports=True, precision=precision, from_graph=not opened.is_torch)
    form = resolve_form(loop, device=kind)
    _check_options(target, tensorrt, kind, chosen.name, require_captured)
    if loras is None and lora_rank is None:
        source, fitted = opened.read(), None
    else:
        from skipstep.loras import read_with_loras

        texts = () if parts is None else tuple(name for name, _ in parts.texts)
        where = (chosen.name, kind, precision)
        source, fitted = read_with_loras(opened, loras, lora_rank, where=where, texts=texts)
    held = PlanSet(
        source.spec,
        plans,
        defaults=defaults,
        compile_on_miss=request.compile_on_miss,
        network_digest=source.digest,
    )
    if precision in EIGHT_BITS:
        wanted = f"int8-{chosen.name}" if kind == "cpu" else precision
        quantized = quantize_source(source, plans, calibration, [wanted], sampler=sampler, report=report)
        source = replace(source, steps={wanted: quantized[wanted].graph})
    source.tensorrt = tensorrt
    lifecycle = Lifecycle()
    if fitted is not None:
        target = replace(target, lora=fitted.inputs.get("unet", {}))
    cuda = None
    if kind == "cuda" or chosen.compiles_late:
        from skipstep.bundles.kept import CacheSlot

        target = replace(target, keep=CacheSlot)
    if kind == "cuda":
        from skipstep.cuda.device import CudaDevice

        cuda = CudaDevice(resolved)
        stream = getattr(cuda.stream, "torch_stream", None)
        target = replace(target, device=str(cuda.torch_device), stream=stream)
    network = source.spec
    report(
        f"make the network ready for {chosen.name}"
        + (": export it to ONNX" if chosen.loads_bundles and opened.is_torch else "")
    )
    target = replace(target, batch_sizes=tuple(network_batch_sizes(network, sizes)))

    def reference() -> Denoiser:
        report("compare it with the model on the CPU")
        return source.reference()

    compared_in = source.computes_in if precision == "float32" else precision
    if chosen.compiles_late:
        probe = NetworkProbe.of(reference(), network)

        def check(denoiser: Denoiser) -> None:
            with source.blamed():
                probe.check(denoiser, precision=compared_in)

        target = replace(target, check=lambda: check)
    make = chosen.denoisers(source, target)
    if chosen.loads_bundles and cuda is None and not chosen.compiles_late:
        with source.blamed(), target.splits.undivided():
            NetworkProbe.of(reference(), network).check(make(2), precision=compared_in)
    made = make_loop(
        make,
        network,
        sizes,
        form=form,
        required=require_captured,
        lifecycle=lifecycle,
        device=cuda,
        precision=compared_in,
        reference=reference,
        ready=chosen.compiles_late,
        splits=target.splits,
    )
    pipeline = (
        None if parts is None else export_parts(parts, network, partial(chosen.part, target=target), report, fitted)
    )
    swapped = fitted if lora_rank else None
    runner = BatchRunner(made, network, sizes, lifecycle, pipeline, None if swapped is None else swapped.gate)
    if fitted is not None:
        fitted.begin()
    return CompiledNetwork(source, held, runner, chosen.name, precision, num_threads, loras=swapped)


def _check_options(
    target: Target, tensorrt: TensorRTOptions, device: str, backend: str, require_captured: bool
) -> None:
    if tensorrt != DEFAULTS and backend == "tensorrt":
        check_library_options(tensorrt, choose_library((), target.library))
    only_on_gpu = {
        "require_captured=True": require_captured,
        "compile_network=True": target.compiled,
        f"library={target.library!r}": target.library is not None,
        "tensorrt=": tensorrt != DEFAULTS,
    }
    for option, given in only_on_gpu.items():
        if given and device == "cpu":
            raise InputError(
                got=f"{option} on the CPU", expected="a CUDA device", remedy="leave it out, or see device="
            )
    for option, given, needed, why in (
        ("compile_network=True", target.compiled, "torch", "torch.compile takes its modules"),
        (f"library={target.library!r}", target.library is not None, "tensorrt", "no other has such libraries"),
        ("tensorrt=", tensorrt != DEFAULTS, "tensorrt", "these are its builder's options"),
    ):
        if given and backend != needed:
            raise InputError(
                got=f"{option} with the {backend} backend",
                expected=f"backend={needed!r}: {why}",
                remedy=f"leave it out, or pass backend={needed!r}",
            )


def _checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    expected = f"integers from 1 to {MAX_BATCH_SIZE}, at least one"
    remedy = "pass e.g. batch_sizes=[1, 16]; other request sizes are split over these"
    given = check_items("batch_sizes", batch_sizes, expected=expected, remedy=remedy)
    sizes = {check_integer("batch_sizes", size, low=1, high=MAX_BATCH_SIZE, remedy=remedy) for size in given}
    if not sizes:
        raise InputError(got="batch_sizes=[]", expected=expected, remedy=remedy)
    return tuple(sorted(sizes))

"""The network in 8 bits: calibrated on the trajectories of its plans, and with them measured to stay within a bound.

Each runtime has a form of its own, which the step network is named by:

    int8-onnxruntime   float32 around 8-bit layers, whose results are in 8 bits, too
    int8-openvino      float32 around 8-bit layers
    int8, fp8          float16 around 8-bit layers without zero points, for TensorRT
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import EIGHT_BITS, Denoiser, NetworkSource
from skipstep.calls.plan_set import PlanSet
from skipstep.calls.request import MAX_SEED, resolve_seeds
from skipstep.errors import InputError, check_items, check_path, shown
from skipstep.loops.choice import make_loop
from skipstep.loops.contract import Lifecycle, Sampler
from skipstep.loops.runner import BatchRunner, CompiledNetwork
from skipstep.networks.graphs import SAMPLE, Values
from skipstep.networks.large_graph import graph_sha256
from skipstep.networks.spec import NetworkSpec
from skipstep.version import __version__

if TYPE_CHECKING:
    from skipstep.bundles.bundle import Bundle
    from skipstep.export.quantize import Kind, Range
    from skipstep.export.request import QuantizedStep
    from skipstep.plans.plan import Plan

# By name: the type of the 8 bits, and whether the float around them is half precision.
_FORMS: Final[Mapping[str, tuple[Kind, bool]]] = {
    "int8-onnxruntime": ("int8", False),
    "int8-openvino": ("int8", False),
    "int8": ("int8", True),
    "fp8": ("fp8", True),
}
# Evaluations whose values set the ranges, and what a layer must have of the operations to be worth a measurement.
_EVALUATIONS: Final = 24
_LEAST_SHARE: Final = 0.005
_BATCH: Final = 16
# Between the seeds of calls with other numbers: other labels, too.
_APART: Final = 1_000_003
_NAMED: Final = "conditions/"
_REMEDY: Final = "pass calibration=range(8), seeds to draw with, or a folder of pictures or .npz files"

SamplerOf = Callable[[CompiledNetwork], Sampler]


def quantize_source(
    source: NetworkSource,
    plans: Sequence[Plan],
    calibration: Any,
    forms: Iterable[str],
    *,
    sampler: SamplerOf,
    report: Callable[[str], object],
) -> dict[str, QuantizedStep]:
    """The step network of `source` in these forms, from the user's cache if it was made there before.

    `calibration` is what check_calibration returns. Raises InputError and ExportError.
    """
    from skipstep.bundles.cache import ArtefactCache
    from skipstep.bundles.cache_key import cache_key
    from skipstep.export.bundle_files import package_version
    from skipstep.export.request import QuantizedStep
    from skipstep.export.weight_storage import expand_weights

    step, calls = expand_weights(source.step_graph("float32")), read_calls(calibration, source.spec)
    work = _Calibrated(source, step, tuple(plans), calibration, sampler, report)
    made = {}
    for form in forms:
        key = cache_key(
            kind="quantized.onnx 4",
            form=form,
            step=graph_sha256(step).hexdigest(),
            plans=tuple(plan.key for plan in plans),
            calls=json.dumps(calls, sort_keys=True, default=_digest),
            made_by=(__version__, package_version("onnx"), package_version("onnxruntime")),
        )
        packed = functools.partial(work.packed, form)
        head, _, graph = ArtefactCache().get_or_build(key, packed, f"step network in {form}").partition(b"\n")
        made[form] = QuantizedStep(graph, json.loads(head))
        facts = made[form].facts
        report(
            f"{form}: {facts['layers']} of {facts['candidates']} layers, {facts['share']:.0%} of the operations, "
            f"at most {facts['largest']:.2g} off in {facts['samples']} new samples of each plan"
            + "".join(f"; beyond the bound: {each}" for each in facts["tried"])
        )
    return made


def quantize_bundle(
    bundle: Bundle, precision: str, calibration: Any, *, sampler: SamplerOf, report: Callable[[str], object]
) -> QuantizedStep:
    """The step network of a bundle in "int8" or "fp8" for TensorRT, calibrated with its plans. Raises InputError and
    ExportError."""
    from skipstep.bundle_source import BundleSource, held_plans

    source = BundleSource(bundle)
    plans = list(held_plans(bundle, source, False).values())
    return quantize_source(source, plans, calibration, [precision], sampler=sampler, report=report)[precision]


def _digest(array: Any) -> str:
    array = np.asarray(array)
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def check_calibration(precision: object, calibration: object) -> list[int] | str | None:
    """The seeds or the folder. Raises InputError for what is wrong with them without the network: nothing to calibrate
    on where a precision needs it, or the other way round, and a folder without such files."""
    needed = isinstance(precision, str) and precision in EIGHT_BITS
    if needed != (calibration is not None):
        raise InputError(
            got=f"precision={precision!r} with calibration={shown(calibration)}",
            expected="calibration= with int8 and fp8, and with no other precision",
            remedy=_REMEDY if needed else "leave calibration out",
        )
    if calibration is None:
        return None
    if not isinstance(calibration, str | os.PathLike):
        expected = "seeds, or a folder"
        given = check_items("calibration", calibration, expected=expected, remedy=_REMEDY)
        if not given:
            raise InputError(got="calibration without seeds", expected=expected, remedy=_REMEDY)
        return [int(seed) for seed in resolve_seeds(given)]
    from skipstep.calls.images import PICTURES

    folder = check_path("calibration", calibration)
    if not any(file.suffix.lower() in (".npz", *PICTURES) for file in Path(folder).rglob("*")):
        raise InputError(
            got=f"neither a picture nor an .npz file in calibration={folder!r}",
            expected="a folder of pictures, or of .npz files, each with the arguments of one call by name",
            remedy="write them: numpy.savez(file, seeds=[0, 1], prompt_embeds=array)",
        )
    return folder


def read_calls(calibration: list[int] | str, network: NetworkSpec, number: int = 0) -> list[dict[str, Any]]:
    """The arguments of each call of sample() that the network is calibrated on; with another number than 0 the same
    with seeds that no other number has. Raises InputError."""

    def renewed(seeds: Iterable[int]) -> list[int]:
        return [(int(seed) + number * _APART) % (MAX_SEED + 1) for seed in seeds]

    if not isinstance(calibration, str):
        return [_seeded(network, renewed(calibration))]
    from skipstep.calls.images import read_pictures

    calls = [_arguments(file) for file in sorted(Path(calibration).rglob("*.npz"))]
    for call in calls if number else ():
        start = call.pop("x_T", ())
        call["seeds"] = renewed(np.atleast_1d(call.get("seeds", range(len(start)))))
    pictures = read_pictures(Path(calibration), network.sample_shape)
    if len(pictures):
        calls.append({**_seeded(network, renewed(range(len(pictures)))), "images": pictures, "strength": 1.0})
    return calls


def _seeded(network: NetworkSpec, seeds: Sequence[int]) -> dict[str, Any]:
    """A call with these seeds, with labels and conditions as for golden samples."""
    from skipstep.bundles.golden import call_conditions, describe_call

    entry, arrays = describe_call(network, "", tuple(seeds))
    return {"seeds": list(seeds), **call_conditions(entry, arrays)}


def _arguments(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            loaded = dict(arrays)
    except (OSError, ValueError) as error:
        raise InputError(
            got=f"{file}, which cannot be read ({error})",
            expected="an .npz file that numpy.savez wrote, without objects",
            remedy="write it again: numpy.savez(file, seeds=[0, 1], prompt_embeds=array)",
        ) from error
    conditions = {name.removeprefix(_NAMED): loaded.pop(name) for name in list(loaded) if name.startswith(_NAMED)}
    # Numbers, and one for each sample, as a caller gives them.
    plain = {
        name: array.tolist() if array.ndim == 0 or array.dtype.kind in "iu" else array for name, array in loaded.items()
    }
    return {**plain, "conditions": conditions} if conditions else plain


@dataclass(slots=True)
class _Calibrated:
    """A network with the calls to calibrate it on; ranges are measured once for all forms."""

    source: NetworkSource
    step: bytes
    plans: tuple[Plan, ...]
    calibration: list[int] | str
    sampler: SamplerOf
    report: Callable[[str], object]
    ranges: dict[str, dict[int, Range]] | None = None
    exact: dict[tuple[str, int], NDArray[np.float32]] = field(default_factory=dict)

    def packed(self, form: str) -> bytes:
        """The facts as a line of JSON, and the graph."""
        from skipstep.export.partition import partition_of
        from skipstep.export.precision_check import step_graph
        from skipstep.export.quantize import find_layers, quantize
        from skipstep.export.sensitivity import choose_layers

        step, (kind, half) = self.step, _FORMS[form]
        around = step_graph(partition_of({"step": step}), "float16") if half else step
        if self.ranges is None:
            self.ranges = self._measured()
        ranges, options = self.ranges, {"symmetric": half, "results": form == "int8-onnxruntime"}

        def quantized(layers: Sequence[str], base: bytes = step) -> bytes:
            return quantize(base, {name: ranges[name] for name in layers}, kind, **options)

        plans = {plan.key: plan for plan in sorted(self.plans, key=lambda plan: (plan.num_evaluations, plan.key))}
        choice = choose_layers(
            step,
            # TensorRT-RTX computes an attention in one kernel if both of its products are alike: they stay in half.
            [name for name, values in find_layers(around).items() if name in ranges and not (half and 1 in values)],
            quantized,
            lambda graph, key, number: self.draw(graph, plans[key], number),
            list(plans),
            report=self.report,
        )
        return json.dumps(choice.facts()).encode() + b"\n" + quantized(choice.layers, around)

    def _measured(self) -> dict[str, dict[int, Range]]:
        from skipstep.export.quantize import find_layers, measure_ranges
        from skipstep.export.sensitivity import operations

        self.report("calibrate on the float network's trajectories")
        found: list[Values] = []
        for plan in self.plans:
            self.draw(self.step, plan, 0, record=found.append)
        flops = operations(self.step)
        least = _LEAST_SHARE * sum(flops.values())
        layers = {name: values for name, values in find_layers(self.step).items() if flops[name] >= least}
        # Evenly from all evaluations of all plans.
        return measure_ranges(self.step, layers, found[:: math.ceil(len(found) / _EVALUATIONS)])

    def draw(
        self, step: bytes, plan: Plan, number: int, *, record: Callable[[Values], None] | None = None
    ) -> NDArray[np.float32]:
        """The samples of every call of this number (read_calls), with this step network; the float32 one's are kept."""
        from skipstep.editing.edit import edit

        if record is None and step is self.step and (plan.key, number) in self.exact:
            return self.exact[plan.key, number]
        calls = [{**call, "plan": plan} for call in read_calls(self.calibration, self.source.spec, number)]
        counts = {len(np.atleast_1d(call["seeds"] if "seeds" in call else call["x_T"])) for call in calls}
        sizes = sorted({min(count, _BATCH) for count in counts})
        engine = sampler_of(self.source, step, [plan], sizes, self.sampler, record=record)
        drawn = [edit(engine, **call) if "images" in call else engine.sample(**call) for call in calls]
        samples: NDArray[np.float32] = np.concatenate(drawn)
        if step is self.step:
            self.exact[plan.key, number] = samples
        return samples


def sampler_of(
    source: NetworkSource,
    step: bytes,
    plans: Sequence[Plan],
    batch_sizes: Sequence[int],
    sampler: SamplerOf,
    *,
    record: Callable[[Values], None] | None = None,
) -> Sampler:
    """Draws with another step network of this source, on ONNX Runtime; `record` is given what each evaluation reads."""
    from skipstep.backends.onnxruntime import EarlyGraphs, LazySession, OnnxRuntimeDenoiser, make_session

    class Recorded(OnnxRuntimeDenoiser):
        def _run(self) -> None:
            if record is not None:
                record({name: array.copy() for name, array in {SAMPLE: self.input, **self._buffers}.items()})
            super()._run()

    network, session, lifecycle = source.spec, LazySession(lambda: make_session(step)), Lifecycle()
    early = EarlyGraphs(source.before_loop(), network, tables=source.tables)

    def make(batch_size: int) -> Denoiser:
        return Recorded(session, early, network, batch_size=batch_size)

    loop = make_loop(make, network, batch_sizes, form="stepwise", required=False, lifecycle=lifecycle)
    held = PlanSet(network, plans, defaults={}, compile_on_miss=False)
    runner = BatchRunner(loop, network, tuple(batch_sizes), lifecycle)
    return sampler(CompiledNetwork(source, held, runner, "onnxruntime", "int8", None))

"""The network in 8 bits: calibrated on the trajectories of its plans, and with them measured to stay within a bound.

Each runtime has a form of its own, which the step network is named by:

    int8-onnxruntime   float32 around 8-bit layers, whose results are in 8 bits, too
    int8-openvino      float32 around 8-bit layers
    int8, fp8          float16 around 8-bit layers without zero points, for TensorRT
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import EIGHT_BITS, Denoiser, Enqueue, MakeDenoiser, Target
from skipstep.calls.conditioning import Conditioning
from skipstep.calls.plan_set import PlanSet
from skipstep.errors import InputError, check_items, shown
from skipstep.loops.choice import make_loop
from skipstep.loops.contract import Sampler
from skipstep.loops.lifecycle import Lifecycle
from skipstep.loops.runner import BatchRunner, CompiledNetwork
from skipstep.model_source import GraphSource
from skipstep.networks.graphs import SAMPLE, Rows, StepInputs, Values
from skipstep.networks.spec import NetworkSpec
from skipstep.version import __version__

if TYPE_CHECKING:
    from skipstep.export.quantize import Kind, LayerRanges
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
_REMEDY: Final = "pass calibration=range(8), seeds to draw with, or a folder of .npz files with arguments of sample()"

SamplerOf = Callable[[CompiledNetwork], Sampler]


def quantize_source(
    source: GraphSource,
    plans: Sequence[Plan],
    calibration: Any,
    forms: Iterable[str],
    *,
    sampler: SamplerOf,
    report: Callable[[str], object],
) -> dict[str, QuantizedStep]:
    """The step network of `source` in these forms, from the user's cache if it was made there before.

    `calibration`: seeds, or a folder (check_calibration). Raises InputError and ExportError.
    """
    from skipstep.bundles.cache import ArtefactCache
    from skipstep.bundles.cache_key import cache_key
    from skipstep.export.onnx_model import exporter_versions
    from skipstep.export.request import QuantizedStep

    calls = read_calls(calibration, source.spec)
    work = _Calibrated(source, tuple(plans), calls, sampler, report)
    made = {}
    for form in forms:

        def packed(form: str = form) -> bytes:
            return work.packed(form)

        key = cache_key(
            kind="quantized.onnx",
            form=form,
            step=hashlib.sha256(source.step_graph("float32")).hexdigest(),
            plans=tuple(plan.key for plan in plans),
            calls=_digest(calls),
            made_by=(__version__, *exporter_versions()),
        )
        stored = ArtefactCache().get_or_build(key, packed, f"step network in {form}")
        head, _, graph = stored.partition(b"\n")
        made[form] = QuantizedStep(graph, json.loads(head))
        facts = made[form].facts
        report(
            f"{form}: {facts['layers']} of {facts['candidates']} layers, {100 * facts['share']:.0f} % of the operations"
        )
    return made


def check_calibration(precision: object, calibration: object) -> None:
    """Raise InputError where a precision needs what to calibrate on and has none, or the other way round."""
    needed = isinstance(precision, str) and precision in EIGHT_BITS
    if needed != (calibration is not None):
        raise InputError(
            got=f"precision={precision!r} with calibration={shown(calibration)}",
            expected="calibration= with int8 and fp8, and with no other precision",
            remedy=_REMEDY if needed else "leave calibration out",
        )


def read_calls(calibration: Any, network: NetworkSpec) -> list[dict[str, Any]]:
    """The arguments of each call of sample() that the network is calibrated on. Raises InputError."""
    if not isinstance(calibration, str | os.PathLike):
        from skipstep.bundles.golden import call_conditions, describe_call

        expected = "seeds, or a folder"
        given = check_items("calibration", calibration, expected=expected, remedy=_REMEDY)
        if not given:
            raise InputError(got="calibration without seeds", expected=expected, remedy=_REMEDY)
        entry, arrays = describe_call(network, "", tuple(given))
        return [{"seeds": list(given), **call_conditions(entry, arrays)}]
    files = sorted(Path(calibration).glob("*.npz"))
    if not files:
        raise InputError(
            got=f"no .npz file in calibration={os.fspath(calibration)!r}",
            expected="a folder of .npz files, each with the arguments of one call by name",
            remedy="write them: numpy.savez(file, seeds=[0, 1], prompt_embeds=array)",
        )
    return [_arguments(file) for file in files]


def _arguments(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise InputError(
            got=f"{file}, which cannot be read ({error})",
            expected="an .npz file that numpy.savez wrote, without objects",
            remedy="write it again: numpy.savez(file, seeds=[0, 1], prompt_embeds=array)",
        ) from error
    named = {name: array for name, array in loaded.items() if not name.startswith("conditions/")}
    arguments = {
        name: array.tolist() if array.ndim == 0 or name in ("seeds", "class_labels") else array
        for name, array in named.items()
    }
    further = {name.removeprefix("conditions/"): array for name, array in loaded.items() if name not in named}
    return {**arguments, "conditions": further} if further else arguments


def _digest(calls: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for call in calls:
        for name, value in sorted(call.items()):
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for inner, each in parts:
                array = np.asarray(each if each is not None else "none")
                digest.update(f"{name} {inner} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


@dataclass(slots=True)
class _Calibrated:
    """A network with the calls to calibrate it on: it draws with any step network, and measures ranges once."""

    source: GraphSource
    plans: tuple[Plan, ...]
    calls: list[dict[str, Any]]
    sampler: SamplerOf
    report: Callable[[str], object]
    _ranges: dict[str, LayerRanges] = field(default_factory=dict)

    def packed(self, form: str) -> bytes:
        """The facts as a line of JSON, and the graph."""
        from skipstep.export.precision_check import step_graph
        from skipstep.export.quantize import find_layers, quantize
        from skipstep.export.sensitivity import choose_layers

        kind, half = _FORMS[form]
        step = self.source.step_graph("float32")
        around = step_graph(self.source.partition(), "float16") if half else step
        there = {layer.name for layer in find_layers(around)}
        ranges = {name: each for name, each in self._measured(step).items() if name in there}
        options = {"symmetric": half, "results": form == "int8-onnxruntime"}

        def quantized(layers: Sequence[str], base: bytes = step) -> bytes:
            return quantize(base, {name: ranges[name] for name in layers}, kind, **options)

        plans = {plan.key: plan for plan in sorted(self.plans, key=lambda plan: (plan.num_evaluations, plan.key))}
        choice = choose_layers(
            step,
            list(ranges),
            quantized,
            lambda graph, key: self.draw(graph, plans[key]),
            list(plans),
            report=self.report,
        )
        return json.dumps(choice.facts()).encode() + b"\n" + quantized(choice.layers, around)

    def _measured(self, step: bytes) -> dict[str, LayerRanges]:
        from skipstep.export.quantize import find_layers
        from skipstep.export.ranges import measure_ranges
        from skipstep.export.sensitivity import operations

        if not self._ranges:
            self.report("calibrate on the float network's trajectories")
            flops = operations(step)
            least = _LEAST_SHARE * sum(flops.values())
            layers = [layer for layer in find_layers(step) if flops[layer.name] >= least]
            self._ranges.update(measure_ranges(step, layers, self._recorded(step)))
        return self._ranges

    def _recorded(self, step: bytes) -> list[Values]:
        """Inputs of the step network, evenly from all evaluations of all plans."""
        found: list[Values] = []
        for plan in self.plans:
            self.draw(step, plan, record=found.append)
        return found[:: math.ceil(len(found) / _EVALUATIONS)]

    def draw(self, step: bytes, plan: Plan, *, record: Callable[[Values], None] | None = None) -> NDArray[np.float32]:
        """The samples of every call, with this step network on ONNX Runtime."""
        from skipstep.backends import onnxruntime
        from skipstep.export.graph_writer import load_graph

        source = replace(self.source, steps={"int8-onnxruntime": step})
        make = onnxruntime.denoisers(source, Target(precision="int8"))
        names = [each.name for each in load_graph(step).graph.input if each.name != SAMPLE]
        sizes, lifecycle = sorted({_num_samples(call) for call in self.calls}), Lifecycle()

        def recording(batch_size: int) -> Denoiser:
            denoiser = make(batch_size)
            return denoiser if record is None else _Recording(denoiser, names, record)

        loop = make_loop(
            cast("MakeDenoiser", recording), source.spec, sizes, form="stepwise", required=False, lifecycle=lifecycle
        )
        held = PlanSet(source.spec, [plan], defaults={}, compile_on_miss=False, network_digest=source.digest)
        runner = BatchRunner(loop, source.spec, tuple(sizes), lifecycle)
        engine = self.sampler(CompiledNetwork(source, held, runner, "onnxruntime", "int8", None))
        return np.concatenate([engine.sample(plan=plan, output_type="np", **call) for call in self.calls])


def _num_samples(call: Mapping[str, Any]) -> int:
    return len(np.atleast_1d(call["seeds"] if "seeds" in call else call["x_T"]))


class _Recording:
    """A denoiser that passes on what its step network is given."""

    def __init__(self, denoiser: Denoiser, names: Sequence[str], record: Callable[[Values], None]) -> None:
        self._denoiser, self._names, self._record = denoiser, names, record
        self.name, self.batch_size = denoiser.name, denoiser.batch_size
        self.input, self.output = denoiser.input, denoiser.output

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return self._denoiser.compute(timesteps, conditioning)

    def new_context(self) -> Enqueue:
        enqueue = self._denoiser.new_context()

        def recorded(values: Rows, stage: int) -> None:
            rows = {name: values.row(name, stage) for name in self._names}
            self._record({SAMPLE: self.input.copy(), **{name: table[index] for name, (table, index) in rows.items()}})
            enqueue(values, stage)

        return recorded

"""OpenVINO on the CPU: the network's parts that run before a loop, and its step, compiled for each batch size.

With fixed shapes the step is up to 1.6 times as fast as with an open batch size, so each batch size in use has a
compiled model of its own. A model that was compiled once is kept on disk, under what it depends on, and is compared
with the reference network before it is kept; one with weights beside its graph, a gigabyte and more, is not kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import Enqueue, MakeDenoiser, NetworkSource, RunPart, Target
from skipstep.backends.early import EarlyParts, graph_failed
from skipstep.backends.openvino_library import (
    capabilities,
    check_precision,
    compile_model,
    export_model,
    import_model,
    input_ports,
    key_parts,
    openvino,
    read_model,
    settings,
)
from skipstep.backends.prefetch import Lazy, Shared
from skipstep.calls.conditioning import Conditioning
from skipstep.networks.condition import MAX_ELEMENTS
from skipstep.networks.graphs import PREDICTION, SAMPLE, StepInputs, Values, fill_buffers
from skipstep.networks.large_graph import weights_of
from skipstep.networks.spec import NetworkSpec

__all__ = ["capabilities", "denoisers"]


@dataclass(slots=True)
class EarlyModels(EarlyParts):
    """A network's parts that run before the loop, in float32, by binding time (skipstep.backends.early)."""

    num_threads: int | None = None
    _compiled: dict[str, Lazy[Any]] = field(default_factory=dict)

    def _run(self, name: str, given: Mapping[str, NDArray[np.generic]]) -> Values:
        graph, config = self.graphs[name], settings("float32", self.num_threads)
        # setdefault: of two threads one entry stays, and that compiles once.
        made = self._compiled.setdefault(name, Lazy(lambda: compile_model(read_model(graph), "float32", config)))
        return _infer(made.get(), given)


class StepModels:
    """The step network, compiled at the batch sizes in use: a model lives as long as a denoiser of its size."""

    def __init__(self, source: NetworkSource, target: Target, early: EarlyModels) -> None:
        self._spec, self._target, self._early = source.spec, target, early
        self._config = settings(target.precision, target.num_threads)
        # A bundle verifies the graph when it is read, which is waited for: it is read in the background at once.
        self._graph = Lazy(lambda: source.step_graph("int8-openvino" if target.precision == "int8" else "float32"))
        self._graph.prefetch()
        self._compiled = Shared(self._kept_or_compiled)

    def at(self, batch_size: int) -> OpenVinoDenoiser:
        """A denoiser with buffers of its own. Raises ExportError and DeviceUnavailableError."""
        return self._denoiser(self._compiled.get(batch_size), batch_size)

    def _denoiser(self, compiled: Any, batch_size: int) -> OpenVinoDenoiser:
        return OpenVinoDenoiser(compiled, self._early, self._spec, batch_size=batch_size)

    def _kept_or_compiled(self, batch_size: int) -> Any:
        graph, precision, slot = self._graph.get(), self._target.precision, None
        if self._target.keep is not None and not weights_of(graph):
            parts = key_parts(hashlib.sha256(graph).digest(), self._config, batch_size)
            slot = self._target.keep(f"OpenVINO model in {precision}, batch size {batch_size}", parts)
            data = slot.get()
            compiled = None if data is None else import_model(data, precision, self._config)
            if compiled is not None:
                return compiled
        compare = self._target.check() if self._target.check is not None else None
        compiled = compile_model(read_model(graph, batch_size), precision, self._config)
        if compare is not None:
            compare(self._denoiser(compiled, batch_size))
        if slot is not None:
            slot.put(export_model(compiled))
        return compiled


class OpenVinoDenoiser:
    """The step network at one batch size (skipstep.backends.denoiser.Denoiser).

    Inputs and outputs are bound once to buffers that never move, so a run copies nothing in or out.
    """

    name = "openvino"

    def __init__(self, compiled: Any, early: EarlyModels, spec: NetworkSpec, *, batch_size: int) -> None:
        self._compiled, self._early, self.batch_size = compiled, early, batch_size
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float32)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float32)
        inputs = input_ports(compiled)
        prediction = next((each for each in compiled.outputs if PREDICTION in each.get_names()), None)
        _check_port(SAMPLE, inputs.get(SAMPLE), self.input)
        _check_port(PREDICTION, prediction, self.output)
        self._buffers: Values = {
            name: _zeros(name, each, batch_size) for name, each in inputs.items() if name != SAMPLE
        }
        self._request = compiled.create_infer_request()
        tensor = openvino().Tensor
        bound = {inputs[name]: array for name, array in {SAMPLE: self.input, **self._buffers}.items()}
        for port, array in {**bound, prediction: self.output}.items():
            self._request.set_tensor(port, tensor(array, shared_memory=True))

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        return self._early.compute(timesteps, conditioning)

    def new_context(self) -> Enqueue:
        return self._enqueue

    def _enqueue(self, values: StepInputs, stage: int) -> None:
        try:
            fill_buffers(self._buffers, values, stage)
            # What it returns is looked at nowhere; shared, it is not copied either.
            self._request.infer(share_outputs=True)
        except Exception as error:  # OpenVINO's own, and NumPy's for tables of another shape.
            raise graph_failed(error) from error


def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser:
    """Denoisers for any batch size; the first of a size compiles its model, or reads the one that is kept.

    Raises DeviceUnavailableError where the library does not run in the target's precision on this processor.
    """
    early = EarlyModels(source.before_loop(), source.spec, target.num_threads, tables=source.tables)
    models = StepModels(source, target, early)
    check_precision(target.precision)
    return models.at


def part(graph: bytes, target: Target, *, decodes: bool, tiled: bool) -> RunPart:
    """In float32, or where it `decodes` in the target's bfloat16 (skipstep.backends.registry.Backend.part)."""
    precision = "bfloat16" if decodes and target.precision == "bfloat16" else "float32"
    model = read_model(graph, 1 if tiled else None)
    compiled = compile_model(model, precision, settings(precision, target.num_threads))

    def run(outputs: Sequence[str], given: Mapping[str, NDArray[Any]]) -> Values:
        results = _infer(compiled, given)
        return {name: results[name] for name in outputs}

    return run


def _infer(compiled: Any, given: Mapping[str, NDArray[np.generic]]) -> Values:
    """All outputs by name, in a request of its own. Raises ExportError."""
    try:
        inputs = {each: given[name] for name, each in input_ports(compiled).items()}
        results = compiled.create_infer_request().infer(inputs)
        return {name: results[each] for each in compiled.outputs for name in each.get_names()}
    except Exception as error:  # OpenVINO's own; a KeyError is an input without a value.
        raise graph_failed(error) from error


def _check_port(name: str, port: Any, array: NDArray[Any]) -> None:
    """Raise ExportError for an input or output of the step graph that is not the network's."""
    found = "missing" if port is None else f"{port.element_type.get_type_name()} {port.partial_shape}"
    if found != f"f32 [{','.join(map(str, array.shape))}]":
        raise graph_failed(f"its {name!r} is {found}, not float32 {list(array.shape)}")


def _zeros(name: str, port: Any, batch_size: int) -> NDArray[Any]:
    shape, dtype = port.partial_shape, port.element_type.to_dtype()
    sizes = shape.to_shape() if shape.is_static else ()
    if tuple(sizes[:1]) != (batch_size,) or dtype.kind not in "iufb" or math.prod(sizes[1:]) > MAX_ELEMENTS:
        raise graph_failed(f"its input {name!r} is {port.element_type.get_type_name()} {shape}")
    return np.zeros(tuple(sizes), dtype)

"""A torch module whose step runs on a GPU, and whose earlier parts run on the host.

The module is traced once for each range of batch sizes that it treats alike. The step shares the module's weights on
the GPU; the earlier parts are computed in float32, from the weights in host memory, as for every other backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from skipstep.backends.device_step import HOST_DTYPES, StepTensor
from skipstep.backends.early import EarlyParts
from skipstep.backends.torch import DenoisingModule
from skipstep.backends.torch_graph import (
    NotTraceableError,
    Split,
    Trace,
    input_names,
    on_the_host,
    runnable,
    split,
    trace,
)
from skipstep.backends.torch_rules import simplify
from skipstep.calls.condition_rows import filled_rows
from skipstep.calls.conditioning import Conditioning
from skipstep.networks.graphs import SAMPLE, Values
from skipstep.networks.spec import NetworkSpec

# Rows computed together and alone differ by rounding: products of other sizes sum in another order.
_ROW_TOLERANCE = 1e-3


@dataclass(slots=True)
class TorchEarly(EarlyParts):
    """The earlier parts as torch graphs on the CPU; `crossing` names the outputs of each."""

    crossing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _inputs: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self._inputs = {name: input_names(part.graph) for name, part in self.graphs.items()}

    def _run(self, name: str, given: Mapping[str, NDArray[np.generic]]) -> Values:
        part: fx.GraphModule = self.graphs[name]
        # torch warns of memory that it may not write to.
        inputs = [torch.from_numpy(np.require(given[each], requirements="W")) for each in self._inputs[name]]
        with torch.inference_mode():
            return {each: value.numpy() for each, value in zip(self.crossing[name], part(*inputs), strict=True)}


@dataclass(frozen=True, slots=True)
class SplitNetwork:
    """`step(sample, *step inputs)` on the device, `inputs` by name in that order, the sample first; and what computes
    them. `channels_last`: the order of the sample in memory."""

    step: nn.Module
    early: TorchEarly
    inputs: Mapping[str, Tensor]
    channels_last: bool

    def step_tensors(self, batch_size: int) -> dict[str, StepTensor]:
        """The step inputs at this batch size."""
        return {
            name: StepTensor((batch_size, *value.shape[1:]), str(value.dtype).removeprefix("torch."))
            for name, value in self.inputs.items()
            if name != SAMPLE
        }


class SplitNetworks:
    """A module split for any batch size. `host` is the same module in float32 on the CPU; `fuse` rewrites the step.
    `channels_last`: it is to take samples in this order, if it can."""

    def __init__(
        self,
        module: DenoisingModule,
        host: DenoisingModule,
        spec: NetworkSpec,
        *,
        fuse: Callable[[fx.Graph], None] | None = None,
        channels_last: bool = False,
    ) -> None:
        self._module, self._host, self._spec, self._fuse = module, host, spec, fuse
        self._channels_last = channels_last
        self._made: list[tuple[Trace, SplitNetwork]] = []

    def at(self, batch_size: int) -> SplitNetwork:
        """Raises NotTraceableError where the module has to run as it is."""
        for traced, network in self._made:
            if traced.holds_for(batch_size):
                return network
        traced = self._trace(batch_size)
        if not traced.holds_for(batch_size):
            raise NotTraceableError(f"torch.export traces it for batch sizes from {traced.low} to {traced.high} only")
        simplify(traced.graph)
        parts = split(traced.graph)
        if self._fuse is not None:
            self._fuse(parts.step)
        step = runnable(parts.step, traced.tensors)
        network = SplitNetwork(step, self._early(traced, parts), _inputs(parts.step), self._channels_last)
        self._made.append((traced, network))
        return network

    def _trace(self, batch_size: int) -> Trace:
        if self._channels_last:
            with contextlib.suppress(NotTraceableError):
                return trace(self._module, self._spec, batch_size=batch_size, channels_last=True)
            # It views its sample as another shape, which only the plain order allows.
            self._channels_last = False
        return trace(self._module, self._spec, batch_size=batch_size)

    def _early(self, traced: Trace, parts: Split) -> TorchEarly:
        held = {**dict(self._host.named_parameters()), **dict(self._host.named_buffers())}

        def on_host(name: str) -> Tensor:
            tensor = held.get(traced.origins[name], traced.tensors[name]).detach().cpu()
            return tensor.float() if tensor.dtype == dtype else tensor

        dtype = parts.step.find_nodes(op="placeholder")[0].meta["val"].dtype
        graphs = {
            name: runnable(
                on_the_host(graph, dtype=dtype),
                {str(node.target): on_host(str(node.target)) for node in graph.find_nodes(op="get_attr")},
            )
            for name, graph in parts.early.items()
        }
        early = TorchEarly(graphs, self._spec, crossing=parts.crossing)
        _check_rows(early)
        return early


def _inputs(step: fx.Graph) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    for name, node in zip(input_names(step), step.find_nodes(op="placeholder"), strict=True):
        value: Tensor = node.meta["val"]
        if str(value.dtype).removeprefix("torch.") not in HOST_DTYPES or not all(
            isinstance(size, int) for size in value.shape[1:]
        ):
            raise NotTraceableError(f"a value of every stage is {value.dtype} {list(value.shape)}")
        inputs[name] = value
    return inputs


def _check_rows(early: TorchEarly) -> None:
    """Whether a row is the same alone and among others. Raises NotTraceableError for a module that mixes its samples,
    and for one that cannot be computed in float32 on the host."""
    spec, rng = early.spec, np.random.default_rng(0)
    rows = filled_rows(spec, 2, rng)
    timesteps = np.array([[999.0, 20.0], [500.0, 999.0]])
    try:
        together = early.compute(timesteps, Conditioning(rows, np.arange(2) * bool(rows)))
        for stage, sample in np.ndindex(2, 2):
            one = Conditioning({name: each[[sample]] for name, each in rows.items()}, np.zeros(1, np.int64))
            alone = early.compute(timesteps[[stage]][:, [sample]], one)
            for name in {**alone.plan, **alone.call, **alone.prompt}:
                place = (stage, sample) if together.per_stage(name) else (sample,)
                expected = alone.expanded(name)[(0,) * len(place)]
                scale = np.abs(np.nan_to_num(expected)).max(initial=0.0) or 1.0
                found = together.expanded(name)[place]
                if not np.allclose(found, expected, rtol=0, atol=_ROW_TOLERANCE * scale, equal_nan=True):
                    raise NotTraceableError(f"{name}, which does not follow from the state, depends on other samples")
    except (RuntimeError, NotImplementedError, TypeError) as error:
        first = str(error).split("\n")[0]
        raise NotTraceableError(f"its parts before the loop do not run on the host: {first:.200}") from error
    early.tables.clear()

"""A torch module as a graph, split by when its values become known: what skipstep.export.partition is for ONNX.

    trace(module)   the module as torch.export sees it, for a range of batch sizes
    split(trace)    plan, prompt, call: run before the loop;  step: runs at every stage, on what the three computed

The rule is data flow: a value follows from all that its inputs follow from (skipstep.networks.graphs). Earlier parts
run on many stages and samples at once, as rows of a batch; a value without rows for each sample, and one that is drawn
at random, stays in the step. Inside of a part each sample may have several rows, between parts it has one. The number
of samples is known from any input, so it holds nothing back.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor, fx

from skipstep.backends.torch import DenoisingModule, timestep_dtype, zero_conditioning
from skipstep.networks.graphs import SAMPLE, Binding
from skipstep.networks.spec import NetworkSpec

_ATEN = torch.ops.aten
_BATCH_SIZE: Final = _ATEN.sym_size.int


class NotTraceableError(Exception):
    """Why a module runs as it is, and not as a graph."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A module as a graph of its inputs and of `tensors` (parameters, buffers, constants), which it shares.

    `origins` are the module's own names of tensors. Values of the graph are described by `meta["val"]`; the batch size
    in their shapes is a symbol, and the graph holds for `low` to `high` samples, None: any number.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    origins: dict[str, str]
    low: int
    high: int | None

    def holds_for(self, batch_size: int) -> bool:
        return self.low <= batch_size and (self.high is None or batch_size <= self.high)


def trace(module: DenoisingModule, spec: NetworkSpec, *, batch_size: int, channels_last: bool = False) -> Trace:
    """Trace a module where it is, for this batch size and what others the module treats alike, and for samples in
    this order in memory.

    Raises NotTraceableError for control flow that depends on values, for a batch size that the module makes a
    constant, and for state that the module changes.
    """
    parameter = next(module.parameters(), torch.zeros(()))
    # A dimension of size 1 would be taken for a constant.
    traced = max(2, batch_size)
    sample = torch.zeros(traced, *spec.sample_shape, device=parameter.device, dtype=parameter.dtype)
    given = [sample.to(memory_format=torch.channels_last) if channels_last else sample]
    given.append(torch.zeros(traced, device=parameter.device, dtype=timestep_dtype(spec)))
    conditioning = zero_conditioning(spec, traced)
    for each in conditioning.values():
        dtype = parameter.dtype if each.is_floating_point() else each.dtype
        given.append(each.to(device=parameter.device, dtype=dtype))
    rows: Any = {0: torch.export.Dim.AUTO}
    # What the module takes as *conditioning is one entry of this tuple.
    shapes = (rows, rows, *(((rows,) * len(conditioning),) if conditioning else ()))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, tuple(given), dynamic_shapes=shapes, strict=False)
            if any(_is_mutable(node) for node in program.graph.nodes):
                # Operators that write to their input become their pure counterparts; no other is decomposed.
                program = program.run_decompositions({})
    except Exception as error:  # Whatever the module or torch.export raises; its errors share no public base class.
        first = str(error).strip().split("\n")[0]
        raise NotTraceableError(f"torch.export cannot trace it: {type(error).__name__}: {first:.200}") from error
    return _read(program, [SAMPLE, "timestep", *conditioning])


def _read(program: torch.export.ExportedProgram, inputs: Sequence[str]) -> Trace:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate or len(signature.user_outputs) != 1:
        raise NotTraceableError("it changes its buffers or its inputs, or returns several values")
    origins = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    origins |= signature.inputs_to_lifted_tensor_constants
    held = {**program.state_dict, **program.constants}
    tensors = {name: held[origin] for name, origin in origins.items()}
    names = dict(zip(signature.user_inputs, inputs, strict=True))
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            copies[node] = graph.placeholder(names[node.name])
        elif node.op == "placeholder":
            copies[node] = graph.get_attr(node.name)
        elif node.op in ("call_function", "output"):
            copies[node] = graph.node_copy(node, lambda used: copies[used])
        else:
            raise NotTraceableError(f"its graph has a part of its own, {node.target}")
        copies[node].meta = dict(node.meta)
    output = graph.output_node()
    results: Any = output.args[0]
    output.args = (results[0],)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    # What no operation brings together, a module's mean over its timesteps, has a symbol of its own.
    symbols = {_batch_symbol(node) for node in graph.find_nodes(op="placeholder")}
    if None in symbols:
        raise NotTraceableError("it makes the batch size a constant")
    ranges = [program.range_constraints[symbol] for symbol in symbols]
    # torch.export takes every symbolic size to be 2 at least.
    low = max(int(each.lower) if each.lower > 2 else 1 for each in ranges)
    high = min((int(each.upper) for each in ranges if each.upper < 1 << 31), default=None)
    return Trace(graph, tensors, origins, low, high)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _batch_symbol(node: fx.Node) -> Any:
    """The symbol in the leading dimension of a value; None where that is no plain symbol."""
    value = node.meta.get("val")
    leading = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
    expression = leading.node.expr if isinstance(leading, torch.SymInt) else None
    return expression if getattr(expression, "is_Symbol", False) else None


@dataclass(frozen=True, slots=True)
class Split:
    """`early`: graphs by name ("plan", "prompt", "call"), whose outputs are values by `crossing`; and the step."""

    early: dict[str, fx.Graph]
    crossing: dict[str, tuple[str, ...]]
    step: fx.Graph


def split(graph: fx.Graph) -> Split:
    """Raises NotTraceableError for an output that does not follow from the state."""
    bindings = _bindings(graph)
    output = graph.output_node().args[0]
    assert isinstance(output, fx.Node)
    if not bindings[output] & Binding.STEP:
        raise NotTraceableError("its output does not follow from its sample")

    def read_by(later: Binding, earlier: Binding) -> list[fx.Node]:
        found = (
            used
            for node in graph.nodes
            if node.op == "call_function" and bindings[node].time == later
            for used in node.all_input_nodes
            if used.op == "call_function" and bindings[used] == earlier
        )
        return list(dict.fromkeys(found))

    prompt, call = (read_by(Binding.STEP, earlier) for earlier in (Binding.PROMPT, Binding.CALL))
    plan = list(dict.fromkeys((*read_by(Binding.STEP, Binding.PLAN), *read_by(Binding.CALL, Binding.PLAN))))
    # The call graph computes values of the conditioning alone itself, on its own rows: often a look-up.
    parts = {"plan": (plan, []), "prompt": (prompt, []), "call": (call, plan)}
    return Split(
        {name: _slice(graph, outputs, known) for name, (outputs, known) in parts.items() if outputs},
        {name: tuple(node.name for node in outputs) for name, (outputs, _) in parts.items()},
        _slice(graph, output, (*plan, *prompt, *call), sample=True),
    )


def _bindings(graph: fx.Graph) -> dict[fx.Node, Binding]:
    of_inputs = {SAMPLE: Binding.STEP, "timestep": Binding.PLAN}
    # Values that a later part reads and that are no rows of a batch: they stay, and so does what follows from them.
    kept: set[fx.Node] = set()
    while True:
        bindings: dict[fx.Node, Binding] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                bindings[node] = of_inputs.get(str(node.target), Binding.PROMPT)
                continue
            binding = reduce(operator.or_, (bindings[used] for used in node.all_input_nodes), Binding.CONSTANT)
            moves = binding.time not in (Binding.CONSTANT, Binding.STEP)
            if _is_batch_size(node):
                binding = Binding.CONSTANT
            elif _is_random(node) or (moves and (node in kept or not _has_rows(node))):
                binding = Binding.STEP
            bindings[node] = binding
        found = {
            used
            for node in graph.nodes
            for used in node.all_input_nodes
            if _rows_each(used.meta.get("val")) > 1 and bindings[used].crosses(bindings[node])
        }
        if not found:
            return bindings
        kept |= found


def _rows_each(value: Any) -> int:
    """How many rows each sample has in the leading dimension of a value, one after the other; 0 where that is not a
    multiple of the batch size."""
    leading = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
    expression = leading.node.expr if isinstance(leading, torch.SymInt) else None
    symbols = getattr(expression, "free_symbols", ())
    if len(symbols) != 1:
        return 0
    several = expression / next(iter(symbols))
    return int(several) if several.is_Integer else 0


def _is_batch_size(node: fx.Node) -> bool:
    return bool(node.target is _BATCH_SIZE and node.args[1] == 0 and _batch_symbol(node.all_input_nodes[0]) is not None)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _has_rows(node: fx.Node) -> bool:
    """Whether a value has rows for each sample. Several values (of chunk, split) have them if their input has, and are
    not parts of its rows."""
    values = node.meta.get("val")
    if not isinstance(values, list | tuple):
        return _rows_each(values) > 0
    source = node.all_input_nodes[0].meta.get("val")
    return isinstance(source, Tensor) and all(each.shape[:1] == source.shape[:1] for each in values)


def _slice(
    graph: fx.Graph, outputs: fx.Node | Sequence[fx.Node], known: Iterable[fx.Node], *, sample: bool = False
) -> fx.Graph:
    """What leads to the outputs, down to inputs and to values that are `known` by then: these become its inputs.
    `sample`: it takes the sample first, whether or not it reads it."""
    known = set(known)
    needed = {outputs} if isinstance(outputs, fx.Node) else set(outputs)
    if sample:
        needed.update(graph.find_nodes(op="placeholder")[:1])
    for node in reversed(graph.nodes):
        if node in needed and node not in known and not _is_batch_size(node):
            needed.update(node.all_input_nodes)
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    wanted = [node for node in graph.nodes if node in needed]
    for node in wanted:
        if node.op == "placeholder" or node in known:
            copies[node] = part.placeholder(str(node.target) if node.op == "placeholder" else node.name)
            copies[node].meta = dict(node.meta)
    counted = next((copy for copy in copies.values() if _batch_symbol(copy) is not None), None)
    for node in wanted:
        if _is_batch_size(node):
            assert counted is not None, "every part has an input with a row for each sample"
            copies[node] = part.call_function(_BATCH_SIZE, (counted, 0))
        elif node not in copies:
            copies[node] = part.node_copy(node, lambda used: copies[used])
        copies[node].meta = dict(node.meta)
    part.output(fx.map_arg(outputs, lambda node: copies[node]))
    return part


def input_names(graph: fx.Graph) -> tuple[str, ...]:
    return tuple(str(node.target) for node in graph.find_nodes(op="placeholder"))


def runnable(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph as a module that shares these tensors, and takes its inputs in the order of input_names."""
    held: dict[str, Any] = {str(node.target): tensors[str(node.target)] for node in graph.find_nodes(op="get_attr")}
    return fx.GraphModule(held, graph)


def on_the_host(graph: fx.Graph, *, dtype: torch.dtype) -> fx.Graph:
    """The graph with float32 in place of `dtype`, and the CPU in place of any device."""

    def changed(argument: Any) -> Any:
        if argument is dtype:
            return torch.float32
        return torch.device("cpu") if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, changed)
        node.kwargs = fx.node.map_aggregate(node.kwargs, changed)
    return graph

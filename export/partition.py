"""Binding times in a network's graph, found by data flow: no names, no patterns.

    plan     values that follow from the timestep alone           evaluated once per plan, into tables
    prompt   values that follow from the conditioning alone       evaluated once per call, for each prompt or label
    call     values that follow from conditioning and timestep    evaluated once per call, for all stages in one batch
    step     values that follow from the state                    evaluated at every stage

A value depends on everything that its node's inputs depend on. Only the *shape* of a state is known before the loop: a
Shape node depends on nothing, and is rewritten in terms of the batch dimension so that the other graphs need no state.
The step network reads values of the earlier graphs as inputs: the last values before the state enters the computation.
The earlier parts run on many stages and samples at once, as rows of a batch; a value without rows for each sample stays
in the step. Inside of a part each sample may have several rows, between parts it has one.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnxscript import optimizer

from skipstep.errors import ExportError
from skipstep.export.graph_writer import inner_graphs, serialised
from skipstep.export.large_model import weights_as_inputs
from skipstep.networks.graphs import BATCH, LORA_INPUTS, Binding, NetworkGraphs, Partition
from skipstep.networks.large_graph import Weights, weights_of

_BATCH_SIZE = "batch/size"  # int64 [1]; each graph counts the samples of one of its own inputs.

# The binding time of an exported network's inputs. Inputs with other names are conditioning.
_INPUT_BINDINGS: Mapping[str, Binding] = {"sample": Binding.STEP, "timestep": Binding.PLAN}
# Not functions of their inputs: outside the loop they would give one number for all stages.
_IMPURE = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


BINDING_TIMES = (Binding.PLAN, Binding.PROMPT, Binding.CALL, Binding.STEP)


def partition(exported: bytes) -> Partition:
    """Split an exported network (skipstep.export.onnx_model). Raises ExportError for a graph that it cannot follow."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(exported))
    graph = model.graph
    shapes = _shapes(graph)
    nodes = _with_batch_shapes(graph, shapes)
    bindings = _bindings(graph, nodes, shapes)
    times = {node.output[0]: bindings[node.output[0]].time for node in nodes}
    for output in graph.output:
        if times[output.name] != Binding.STEP:
            raise ExportError(
                got=f"an output that does not depend on the state: {output.name}",
                expected="a network that predicts from its sample",
                remedy="check the network: its forward ignores its first argument",
            )
    inputs = {each.name for each in graph.input}

    def read_by(later: Binding, earlier: Binding) -> tuple[str, ...]:
        """Values of one time that nodes of another read, in order, without the graph's inputs."""
        read = (name for node in nodes if times[node.output[0]] == later for name in (*node.input, *_captured(node)))
        return tuple(dict.fromkeys(name for name in read if bindings.get(name) == earlier and name not in inputs))

    # The call graph computes values of the conditioning alone itself, on its own rows: often a look-up.
    prompt, call = (read_by(Binding.STEP, earlier) for earlier in (Binding.PROMPT, Binding.CALL))
    plan = tuple(dict.fromkeys((*read_by(Binding.STEP, Binding.PLAN), *read_by(Binding.CALL, Binding.PLAN))))
    sliced = _Slicer(model, nodes, shapes, weights_of(exported))
    graphs = NetworkGraphs(
        plan=sliced.graph("plan", plan, known=()) if plan else None,
        prompt=sliced.graph("prompt", prompt, known=()) if prompt else None,
        call=sliced.graph("call", call, known=plan) if call else None,
        step=sliced.graph("step", [output.name for output in graph.output], known=(*plan, *prompt, *call)),
    )
    return Partition(
        graphs,
        crossing={Binding.PLAN: plan, Binding.PROMPT: prompt, Binding.CALL: call},
        nodes={time: tuple(name for name, at in times.items() if at == time) for time in BINDING_TIMES},
    )


def partition_of(parts: Mapping[str, bytes]) -> Partition:
    """The partition that a bundle's graphs are, by part: what crosses is what earlier ones give. No node is named."""
    graphs = NetworkGraphs(parts.get("plan"), parts.get("prompt"), parts.get("call"), parts["step"])
    times = {Binding.PLAN: graphs.plan, Binding.PROMPT: graphs.prompt, Binding.CALL: graphs.call}
    crossing = {
        time: tuple(each.name for each in onnx.load_from_string(graph).graph.output) if graph is not None else ()
        for time, graph in times.items()
    }
    return Partition(graphs, crossing, nodes={})


def _bindings(
    graph: GraphProto, nodes: Sequence[NodeProto], shapes: Mapping[str, list[int | str]]
) -> dict[str, Binding]:
    inputs = {tensor.name: Binding.CONSTANT for tensor in graph.initializer}
    for each in graph.input:
        if each.name not in inputs:
            constant = each.name.endswith(LORA_INPUTS)
            inputs[each.name] = Binding.CONSTANT if constant else _INPUT_BINDINGS.get(each.name, Binding.PROMPT)
    # Values that a later part reads and that are no rows of a batch: they stay, and so does what follows from them.
    kept: set[str] = set()
    while True:
        bindings = dict(inputs)
        for node in nodes:
            binding = _binding_of(node, bindings)
            # Stages and samples become rows of one batch, so a value may move only if it has rows for each.
            moves = binding != Binding.CONSTANT and not binding & Binding.STEP
            rows = [_rows_each(shapes.get(output, [])) for output in node.output]
            if moves and (0 in rows or not kept.isdisjoint(node.output)):
                binding = Binding.STEP
            bindings.update(dict.fromkeys(node.output, binding))
        found = {
            name
            for node in nodes
            for name in (*node.input, *_captured(node))
            if _rows_each(shapes.get(name, [])) > 1
            and bindings.get(name, Binding.CONSTANT).crosses(bindings[node.output[0]])
        }
        if not found:
            return bindings
        kept |= found


def _rows_each(shape: list[int | str]) -> int:
    """How many rows of known size each sample has in the leading dimension, one after the other; 0 where that is not
    known."""
    leading = str(shape[0]) if shape and all(isinstance(each, int) for each in shape[1:]) else ""
    if leading == BATCH:
        return 1
    several = re.fullmatch(rf"(\d+)\*{BATCH}", leading)
    return int(several[1]) if several else 0


def _binding_of(node: NodeProto, bindings: Mapping[str, Binding]) -> Binding:
    if node.op_type in _IMPURE:
        return Binding.STEP
    read = [name for name in (*node.input, *_captured(node)) if name]
    return reduce(operator.or_, (bindings.get(name, Binding.CONSTANT) for name in read), Binding.CONSTANT)


def _captured(node: NodeProto) -> Iterable[str]:
    """Names that a node's subgraphs read; the names that they define themselves occur nowhere outside."""
    for graph in inner_graphs(node):
        for inner in graph.node:
            yield from inner.input
            yield from _captured(inner)


def _shapes(graph: GraphProto) -> dict[str, list[int | str]]:
    """Shapes by name, of ints and of names for symbolic dimensions; values of unknown rank are left out."""
    shapes: dict[str, list[int | str]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = [
                dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in dims
            ]
    return shapes


def _with_batch_shapes(graph: GraphProto, shapes: Mapping[str, list[int | str]]) -> list[NodeProto]:
    """The nodes, with Shape of [batch, constants …] written as the number of samples and constants."""
    rewritten: list[NodeProto] = []
    for node in graph.node:
        dims = shapes.get(node.input[0], ["?"]) if node.op_type == "Shape" else ["?"]
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        dims = dims[attributes.get("start", 0) : attributes.get("end", len(dims))]
        if any(isinstance(dim, str) and dim != BATCH for dim in dims):
            rewritten.append(node)
            continue
        parts = [_BATCH_SIZE if dim == BATCH else f"{node.output[0]}/{i}" for i, dim in enumerate(dims)]
        for part, dim in zip(parts, dims, strict=True):
            if dim != BATCH:
                value = helper.make_tensor(part, TensorProto.INT64, [1], [int(dim)])
                rewritten.append(helper.make_node("Constant", [], [part], name=part, value=value))
        rewritten.append(helper.make_node("Concat", parts, list(node.output), name=node.name, axis=0))
    return rewritten


class _Slicer:
    """Cuts graphs out of one: what leads to some outputs, down to inputs and to values that are known by then."""

    def __init__(
        self, model: ModelProto, nodes: Sequence[NodeProto], shapes: Mapping[str, list[int | str]], weights: Weights
    ) -> None:
        graph = model.graph
        self._weights = weights
        self._model = model
        self._nodes = nodes
        self._shapes = shapes
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._values = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
        self._inputs = {value.name for value in graph.input}

    def graph(self, name: str, outputs: Sequence[str], *, known: Iterable[str]) -> bytes:
        known = set(known)
        needed, kept = set(outputs), []
        for node in reversed(self._nodes):
            if needed.isdisjoint(node.output) or known.issuperset(node.output):
                continue
            kept.append(node)
            needed.update(name for name in (*node.input, *_captured(node)) if name)
        kept.reverse()
        made = {name for node in kept for name in node.output}
        inputs = [self._value(name) for name in sorted((needed & (self._inputs | known)) - made)]
        if _BATCH_SIZE in needed:
            counted = next(value.name for value in inputs if self._shapes[value.name][:1] == [BATCH])
            kept.insert(0, helper.make_node("Shape", [counted], [_BATCH_SIZE], name=_BATCH_SIZE, start=0, end=1))
        graph = helper.make_graph(
            kept,
            name,
            inputs,
            [self._value(name) for name in outputs],
            [self._initializers[name] for name in sorted(needed & self._initializers.keys())],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        with weights_as_inputs(model):
            # Shapes that were written out above fold into constants.
            model.CopyFrom(optimizer.optimize(model))
            for node in model.graph.node:
                # Where in the network's source a node comes from, at ten times the size of the node.
                node.ClearField("metadata_props")
            onnx.checker.check_model(model)
        return serialised(model, self._weights)

    def _value(self, name: str) -> ValueInfoProto:
        if name not in self._values:
            raise ExportError(
                got=f"a value of unknown shape between the parts of the graph, {name}",
                expected="shapes that inference can find",
                remedy="export with static shapes, or use backend='torch'",
            )
        value: ValueInfoProto = self._values[name]
        return value

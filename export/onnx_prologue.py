"""The step inputs of one plan, written into the graph of its loop: constants, and nodes that run once.

    plan     values that follow from the timestep        rows of a constant, one for each of D distinct timesteps
    prompt   values that follow from the conditioning    the partition's prompt graph, on the N samples
    call     values that follow from both                the partition's call graph, on all D·N pairs in one batch

N is the network's batch, 2B with guidance: the second half has the null label, or the negative prompts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import GraphProto, numpy_helper

from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.calls.conditioning import distinct
from skipstep.export.graph_writer import GraphWriter, rename_graph
from skipstep.export.onnx_loop import INDEX_NAMES, StepNetwork
from skipstep.networks.condition import Condition, embedding_frequencies, null_row
from skipstep.networks.graphs import Binding, Partition
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.plan import Plan


def condition_inputs(network: NetworkSpec, *, guided: bool) -> dict[str, Condition]:
    """The conditions that are inputs of the graph, by the names of these: with guidance negative_NAME too, for what the
    caller gives for both halves."""
    inputs: dict[str, Condition] = {}
    for name, condition in network.all_conditions.items():
        if condition.from_guidance is None:
            inputs[name] = condition
            if guided and condition.null == "given":
                inputs[f"negative_{name}"] = condition
    return inputs


def write_prologue(
    writer: GraphWriter,
    parts: Partition,
    step: StepNetwork,
    network: NetworkSpec,
    plan: Plan,
    *,
    samples: str,
    guided: bool,
) -> None:
    """Write all step inputs of `step`, the step network of `parts` (skipstep.export.onnx_loop).

    The graph has the inputs `condition_inputs`, and guidance_scale where it is guided or the network takes that.
    `samples` names N, int64 [1].
    """
    prefix = step.prefix
    _write_conditioning(writer, network, guided=guided, prefix=prefix)
    if parts.graphs.prompt is not None:
        prompt = onnx.load_from_string(parts.graphs.prompt).graph
        given = {each.name: prefix + each.name for each in prompt.input}
        _splice(writer, prompt, "prompt/", given, {each.name: prefix + each.name for each in prompt.output})

    call = None if parts.graphs.call is None else onnx.load_from_string(parts.graphs.call).graph
    timesteps, place = distinct(plan.evaluation_timesteps)
    tables = EarlyGraphs(parts.graphs.before_loop, network).tables_at(timesteps)
    read = {*step.conditions, *(prefix + each.name for each in (call.input if call is not None else ()))}
    for name, values in tables.items():
        if prefix + name in read:
            writer.constant(values, values.dtype, to=f"{prefix}{name}/rows")
    # Stage e of sample n reads row place[e] of the constants, and row place[e]·N + n of the values of all pairs.
    stage_place = writer.constant(place.reshape(-1, 1))
    if Binding.PLAN in step.conditions.values():
        shape = writer.add("Concat", writer.constant([len(place)]), samples, axis=0)
        writer.add("Expand", stage_place, shape, to=INDEX_NAMES[Binding.PLAN])
    if call is None:
        return
    sample = writer.add("Range", writer.constant(0), writer.add("Squeeze", samples), writer.constant(1))
    writer.add("Add", writer.add("Mul", stage_place, samples), sample, to=INDEX_NAMES[Binding.CALL])
    pairs = writer.add("Concat", writer.constant([len(timesteps)]), samples, axis=0)
    row_of_pair, sample_of_pair = (
        writer.add("Reshape", writer.add("Expand", each, pairs), writer.constant([-1]))
        for each in (writer.constant(np.arange(len(timesteps)).reshape(-1, 1)), sample)
    )
    given = {
        name: writer.add("Gather", f"{prefix}{name}/rows", row_of_pair)
        if name in tables
        else writer.add("Gather", prefix + name, sample_of_pair)
        for name in (each.name for each in call.input)
    }
    _splice(writer, call, "call/", given, {each.name: f"{prefix}{each.name}/rows" for each in call.output})


def _write_conditioning(writer: GraphWriter, network: NetworkSpec, *, guided: bool, prefix: str) -> None:
    """The conditions of the N samples."""
    for name, condition in network.all_conditions.items():
        if condition.from_guidance is not None:
            _write_of_guidance(writer, condition, prefix + name)
        elif not guided:
            writer.add("Identity", name, to=prefix + name)
        else:
            other = f"negative_{name}" if condition.null == "given" else name
            if condition.fills:
                row = null_row(condition)
                null = numpy_helper.from_array(row.reshape(-1)[:1], "value")
                other = writer.add("ConstantOfShape", writer.add("Shape", name), value=null)
            writer.add("Concat", name, other, axis=0, to=prefix + name)


def _write_of_guidance(writer: GraphWriter, condition: Condition, name: str) -> None:
    """As guidance_rows, from the input guidance_scale [B]."""
    if condition.from_guidance == "scale":
        writer.add("Identity", "guidance_scale", to=name)
        return
    above = writer.add("Sub", "guidance_scale", writer.constant(1.0, np.float32))
    column = writer.add("Reshape", above, writer.constant([-1, 1]))
    frequencies = embedding_frequencies(condition.shape[0])
    angles = writer.add("Mul", column, writer.constant(frequencies[None], np.float32))
    parts = [writer.add("Sin", angles), writer.add("Cos", angles)]
    if condition.shape[0] % 2:
        parts.append(writer.add("Sub", column, column))
    writer.add("Concat", *parts, axis=1, to=name)


def _splice(
    writer: GraphWriter, graph: GraphProto, prefix: str, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> None:
    """Write a whole graph's nodes and constants, with its inputs and outputs as named, all other names prefixed."""
    names = {**inputs, **outputs}
    rename_graph(graph, lambda name: names.get(name, prefix + name))
    writer.nodes.extend(graph.node)
    writer.constants.extend(graph.initializer)

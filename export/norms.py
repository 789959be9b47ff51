"""Norms written out as means and products for TensorRT, which then computes most of them in one kernel with what is
around them.

    mean = E[x],  d = x - mean,  y = scale·d / sqrt(E[d²] + epsilon) + bias        over all positions, in float32

TensorRT-RTX computes an InstanceNormalization, which a GroupNorm is after a reshape, in a kernel of its own, from a
copy in another order. Written out, the addition or concatenation before it, the conversions to and from float32 and the
activation after it are in the same kernel: a CIFAR-10 UNet launches 189 kernels instead of 268
(bench/results/findings/kernel-counts.json).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Reductions take their axes as an input from here on, and CastLike exists.
_OPSET = 18


def write_out_norms(model: onnx.ModelProto) -> None:
    """Replace every InstanceNormalization whose rank is known, in place. Graphs of opsets before 18 are left alone."""
    if not any(each.domain in ("", "ai.onnx") and each.version >= _OPSET for each in model.opset_import):
        return
    graph = model.graph
    typed = onnx.shape_inference.infer_shapes(model).graph
    ranks = {
        each.name: len(each.type.tensor_type.shape.dim)
        for each in (*typed.input, *typed.value_info)
        if each.type.tensor_type.HasField("shape")
    }
    stored = {each.name: each for each in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        given = [stored[name] for name in node.input[1:] if name in stored]
        if node.op_type != "InstanceNormalization" or node.input[0] not in ranks or len(given) < 2:
            nodes.append(node)
            continue
        made, constants = _written_out(node, ranks[node.input[0]], [numpy_helper.to_array(each) for each in given])
        nodes += made
        graph.initializer.extend(constants)
    del graph.node[:]
    graph.node.extend(nodes)


def _written_out(node: NodeProto, rank: int, given: list[Any]) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes of a norm with its scale and bias, and their constants; all are named after the norm's result."""
    name, x = node.output[0], node.input[0]
    epsilon = next((each.f for each in node.attribute if each.name == "epsilon"), 1e-5)
    scale, bias = (each.astype(np.float32).reshape(-1, *[1] * (rank - 2)) for each in given)
    constants = {
        "axes": np.arange(2, rank),
        "epsilon": np.float32(epsilon),
        **({} if (scale == 1.0).all() else {"scale": scale}),
        **({} if (bias == 0.0).all() else {"bias": bias}),
    }

    def steps() -> Iterator[tuple[str, list[str], str]]:
        yield "Cast", [x], "wide"
        yield "ReduceMean", [f"{name}/wide", f"{name}/axes"], "mean"
        yield "Sub", [f"{name}/wide", f"{name}/mean"], "centred"
        yield "Mul", [f"{name}/centred", f"{name}/centred"], "squared"
        yield "ReduceMean", [f"{name}/squared", f"{name}/axes"], "variance"
        yield "Add", [f"{name}/variance", f"{name}/epsilon"], "positive"
        yield "Sqrt", [f"{name}/positive"], "deviation"
        yield "Div", [f"{name}/centred", f"{name}/deviation"], "normal"
        last = "normal"
        for part, operation in (("scale", "Mul"), ("bias", "Add")):
            if part in constants:
                yield operation, [f"{name}/{last}", f"{name}/{part}"], f"{part}d"
                last = f"{part}d"
        yield "CastLike", [f"{name}/{last}", x], ""

    nodes = [
        helper.make_node(
            operation,
            inputs,
            [f"{name}/{output}" if output else name],
            name=f"{node.name}/{operation}_{place}",
        )
        for place, (operation, inputs, output) in enumerate(steps())
    ]
    nodes[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    return nodes, [numpy_helper.from_array(np.asarray(value), f"{name}/{part}") for part, value in constants.items()]

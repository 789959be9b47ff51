"""Small graphs for TensorRT's builder, and a library in its place."""

from __future__ import annotations

from onnx import TensorProto, helper

from skipstep.export.tensorrt_engine import build_engine


def build(graph: bytes, sm: int | None = 86, **options):
    return build_engine(graph, library="tensorrt_rtx", compute_capability=sm, **options)


def model(*nodes, dtype=TensorProto.FLOAT, shape=("batch", 4), weights=(), output_shape=None) -> bytes:
    """A graph from x to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape if output_shape is None else output_shape)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("odd", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


RELU = model(helper.make_node("Relu", ["x"], ["y"], name="act"))

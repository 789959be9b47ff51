"""The noise of the engine as a graph of its own."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from skipstep.export.graph_writer import OPSET, GraphWriter, floats
from skipstep.export.onnx_noise import write_normals
from skipstep.kernels.layout import Stream


def noise_graph(num_elements: int, stream: Stream) -> bytes:
    writer = GraphWriter("noise")
    normals = write_normals(writer, "seeds", "stages", num_elements, stream)
    graph = helper.make_graph(
        writer.nodes,
        "noise",
        [
            helper.make_tensor_value_info("seeds", TensorProto.UINT64, ["batch"]),
            helper.make_tensor_value_info("stages", TensorProto.INT64, ["stages"]),
        ],
        [floats(normals, ["stages", "batch", num_elements])],
        writer.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()

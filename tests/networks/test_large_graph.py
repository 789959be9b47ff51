"""Graphs with weights beside them, read and written without onnx: what leads to a file is taken out."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from skipstep.networks.large_graph import (
    LOCATION,
    LargeGraph,
    graph_sha256,
    graph_size,
    weights_of,
    with_weights,
    without_stored_weights,
)

DTYPES = ("float32", "uint8", "int8", "int32", "int64", "bool", "float16", "float64")


def stored(name: str, path: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[300], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=path)
    return tensor


def graph(*weights: TensorProto) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [300]) for name in ("x", "y")]
    nodes = [helper.make_node("Add", ["x", "w"], ["y"], name="sum")]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [*weights]), ir_version=10)


def test_a_model_without_its_files_and_with_the_arrays():
    small = numpy_helper.from_array(np.ones(2, np.float32), "b")
    model = graph(stored("w", "../../etc/passwd"), small, stored("v", "*/_ORT_MEM_ADDR_/*"))
    left = without_stored_weights(model.SerializeToString())
    assert onnx.load_from_string(left) == graph(small)
    assert without_stored_weights(left) == left
    arrays = {f"w{i}": np.zeros((300, i), dtype) for i, dtype in enumerate(DTYPES)}
    whole = onnx.load_from_string(with_weights(left, arrays))
    added = {each.name: each for each in whole.graph.initializer[1:]}
    assert {name: helper.tensor_dtype_to_np_dtype(each.data_type) for name, each in added.items()} == {
        name: each.dtype for name, each in arrays.items()
    }
    for name, tensor in added.items():
        assert (tuple(tensor.dims), tensor.data_location) == (arrays[name].shape, TensorProto.EXTERNAL)
        assert [(each.key, each.value) for each in tensor.external_data] == [("location", "weights")]


def test_weights_that_onnx_does_not_have():
    with pytest.raises(ValueError, match=r"'w' is of dtype complex64"):
        with_weights(b"", {"w": np.zeros(1, np.complex64)})


@given(st.binary(max_size=64), st.integers(0, 200))
def test_bytes_that_are_no_model_are_refused_or_kept(data, cut):
    """Anything may follow, and a message may end anywhere: an error of one kind, or no more than was there."""
    whole = graph(stored("w", "a")).SerializeToString()
    for each in (data, whole[:cut] + data):
        with contextlib.suppress(ValueError):
            assert len(without_stored_weights(each)) <= len(each) + 4


def test_a_path_outside_of_the_initializers_stays_to_be_seen():
    model = graph()
    model.graph.node[0].attribute.append(helper.make_attribute("value", stored("inner", "../secret")))
    assert LOCATION in without_stored_weights(model.SerializeToString())


def test_size_and_hash_are_those_of_the_weights_too():
    model, array = b"model", np.arange(6, dtype=np.float32)
    large = LargeGraph(model, {"w": array})
    assert (graph_size(large), graph_size(model)) == (5 + 24, 5)
    assert weights_of(model) == {}
    hashes = [large, model, *(LargeGraph(model, {"w": each}) for each in (array + 1, array.reshape(2, 3)))]
    assert len({graph_sha256(each).digest() for each in hashes}) == len(hashes)

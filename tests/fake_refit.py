"""Weights for an engine of tests/fake_tensorrt.py that was built without."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx


class Refitter:
    def __init__(self, engine: Any, logger: Any) -> None:
        self._engine, self._graph = engine, b""

    def refit_cuda_engine(self) -> bool:
        assert not self._engine._contexts, "contexts that are there compute with the old weights"
        self._engine._graph = self._graph
        self._engine._open()
        return True


class OnnxParserRefitter:
    """Takes the weights by name, and no other graph than the one that the engine was built from."""

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_bytes(self, model: bytes, path: str | None = None) -> bool:
        built, given = map(onnx.load_from_string, (self._refitter._engine._graph, model))
        weights = {each.name: each for each in given.graph.initializer}
        for each in built.graph.initializer:
            if each.name not in weights:
                return False
            each.CopyFrom(weights[each.name])
        self._refitter._graph = built.SerializeToString()
        return True


def stripped(engine: bytes) -> bytes:
    """The engine with numbers for weights that it was not built with."""
    model = onnx.load_from_string(engine)
    for each in model.graph.initializer:
        if each.data_type == onnx.TensorProto.FLOAT:
            each.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(each.dims), 7, np.float32), each.name))
    model.metadata_props.add(key="stripped", value="yes")
    return bytes(model.SerializeToString())

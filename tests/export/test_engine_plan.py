"""How many kernels TensorRT-RTX launches for an evaluation of the shipped network, read from engines that it builds."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from skipstep.bundles.bundle import open_bundle
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import ExportError
from skipstep.export.engine_plan import kernels
from skipstep.export.precision import lower_precision
from skipstep.export.weight_storage import expand_weights

# Of release 1.7; another may do with fewer.
MOST = {"float32": 133, "float16": 109}


@pytest.fixture(scope="module")
def step():
    bundle = open_bundle(SHIPPED_BUNDLE, allow_hard_links=True)
    return expand_weights(bundle.read_graph(bundle.manifest.graphs["step"]))


@pytest.mark.parametrize("form", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_no_change_adds_a_launch(step, form):
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    if form != "float32":
        step = lower_precision(step, "float16")
    [counted] = kernels(build(step, 89, batch_sizes=(1,)).engine)
    assert {"function", "corrltn"} <= set(counted)
    assert sum(counted.values()) <= MOST[form]


@pytest.mark.slow
def test_a_profile_has_the_kernels_of_an_engine_of_its_size_alone(step):
    """And all profiles together the weights once."""
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    alone = {size: build(step, 89, batch_sizes=(size,)).engine for size in (1, 2)}
    together = build(step, 89, batch_sizes=(2, 1))
    assert together.profiles == (1, 2)
    assert kernels(together.engine) == [kernels(engine)[0] for engine in alone.values()]
    assert len(together.engine) < 0.8 * sum(map(len, alone.values()))


def test_images_in_channels_last_order_are_not_converted():
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    weights = [np.ones((32, 3, 3, 3), np.float32), np.ones((3, 32, 3, 3), np.float32)]
    nodes = [
        helper.make_node("Conv", ["sample", "a"], ["hidden"], pads=[1] * 4),
        helper.make_node("Conv", ["hidden", "b"], ["out_sample"], pads=[1] * 4),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in ("sample", "out_sample")
    ]
    stored = [numpy_helper.from_array(*each) for each in zip(weights, "ab", strict=True)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    found = [kernels(build(model, 89, batch_sizes=(1, 2), channels_last=last).engine) for last in (False, True)]
    assert [[each.total() for each in profiles] for profiles in found] == [[4, 4], [2, 2]]


@pytest.mark.parametrize("engine", [b"", b"main {\n}", b"\nmain {\n  region={ }\n}"])
def test_an_engine_without_a_plan_is_refused(engine):
    with pytest.raises(ExportError, match="without the text of its plan"):
        kernels(engine)

"""How many kernels TensorRT-RTX launches for an evaluation of the shipped network, read from engines that it builds."""

from __future__ import annotations

import onnx
import pytest

from skipstep.bundles.bundle import open_bundle
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import ExportError
from skipstep.export.engine_plan import describe_launches, kernels, launches
from skipstep.export.precision import lower_precision
from skipstep.export.weight_storage import expand_weights

# Of release 1.7; another may do with fewer.
MOST = {"float32": 185, "float16, norms in float32": 170, "float16": 156}


@pytest.fixture(scope="module")
def step():
    bundle = open_bundle(SHIPPED_BUNDLE, allow_hard_links=True)
    return expand_weights(bundle.read_graph(bundle.manifest.graphs["step"]))


@pytest.mark.parametrize("form", MOST)
def test_no_change_adds_a_launch(step, form):
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    if form != "float32":
        step = lower_precision(step, "float16", half_norms=form == "float16")
    [counted] = kernels(build(step, 89, batch_sizes=(1,)).engine)
    assert {"function", "corrltn"} <= set(counted)
    assert sum(counted.values()) <= MOST[form]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_largest_kernels_are_named_after_their_layers(step, precision):
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    if precision == "float16":
        step = lower_precision(step, "float16", half_norms=True)
    engine = build(step, 89, batch_sizes=(1, 2)).engine
    described = describe_launches(engine, step)
    assert described["kernels"] == [each.total() for each in kernels(engine)]
    # 128 to 128 channels, 3×3, at 14×14 pixels.
    assert described["largest"][0] == f"{2 * 128 * 128 * 9 * 14 * 14 / 1e6:.2f} MFLOP in up_blocks.0.upsamplers.0.conv"
    sizes = [float(each.split()[0]) for each in described["largest"]]
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)
    nodes = {node for each in launches(engine)[0] for node in each.nodes}
    convolutions = {node.name for node in onnx.load_from_string(step).graph.node if node.op_type == "Conv"}
    assert convolutions <= nodes


def test_a_profile_has_the_kernels_of_an_engine_of_its_size_alone(step):
    """And all profiles together the weights once."""
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    alone = {size: build(step, 89, batch_sizes=(size,)).engine for size in (1, 2)}
    together = build(step, 89, batch_sizes=(2, 1))
    assert together.profiles == (1, 2)
    assert kernels(together.engine) == [kernels(engine)[0] for engine in alone.values()]
    assert len(together.engine) < 0.8 * sum(map(len, alone.values()))


@pytest.mark.parametrize("engine", [b"", b"main {\n}", b"\nmain {\n  region={ }\n}"])
def test_an_engine_without_a_plan_is_refused(engine):
    with pytest.raises(ExportError, match="without the text of its plan"):
        kernels(engine)
    with pytest.raises(ExportError, match="without the text of its plan"):
        describe_launches(engine, b"")

"""Which kernels of an engine are called the largest, for the shipped network."""

from __future__ import annotations

import onnx
import pytest

from skipstep.bundles.bundle import open_bundle
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import ExportError
from skipstep.export.engine_plan import kernels, launches
from skipstep.export.engine_sizes import describe_launches
from skipstep.export.precision import lower_precision
from skipstep.export.quantize import find_layers, quantize
from skipstep.export.weight_storage import expand_weights


@pytest.fixture(scope="module")
def step():
    bundle = open_bundle(SHIPPED_BUNDLE, allow_hard_links=True)
    return expand_weights(bundle.read_graph(bundle.manifest.graphs["step"]))


@pytest.mark.parametrize("precision", [pytest.param("float16", marks=pytest.mark.slow), "int8"])
def test_the_largest_kernels_are_named_after_their_layers(step, precision):
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    step = lower_precision(step, "float16")
    if precision == "int8":
        step = quantize(
            step, {name: dict.fromkeys(each, (-6.0, 6.0)) for name, each in find_layers(step).items()}, "int8"
        )
    engine = build(step, 89, batch_sizes=(1, 2)).engine
    described = describe_launches(engine, step)
    assert described["kernels"] == [each.total() for each in kernels(engine)]
    # 128 to 128 channels, 3×3, at 14×14 pixels.
    assert described["largest"][0] == f"{2 * 128 * 128 * 9 * 14 * 14 / 1e6:.2f} MFLOP in up_blocks.0.upsamplers.0.conv"
    sizes = [float(each.split()[0]) for each in described["largest"]]
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)
    # In 8 bits more kernels name a product than compute it.
    assert len(set(described["largest"])) == 10
    nodes = {node for each in launches(engine)[0] for node in each.nodes}
    convolutions = {node.name for node in onnx.load_from_string(step).graph.node if node.op_type == "Conv"}
    assert convolutions <= nodes


def test_an_engine_without_a_plan_is_refused(step):
    with pytest.raises(ExportError, match="without the text of its plan"):
        describe_launches(b"an engine", step)

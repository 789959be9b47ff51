"""The parts of a graph against the whole, on networks that move much, little and nothing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from engines import build, exported
from tiny_networks import Blind, Curve, Labelled, Running, Timeless, Wide, tiny_unet
from tolerances import FLOAT32_NETWORK
from torch import nn

from skipstep.backends.onnxruntime import EarlyGraphs, LazySession, OnnxRuntimeDenoiser, make_session
from skipstep.backends.torch import prepare_module
from skipstep.calls.conditioning import Conditioning
from skipstep.errors import ExportError
from skipstep.export.partition import partition
from skipstep.networks.graphs import Binding
from skipstep.networks.spec import NetworkSpec

# Per stage and sample, some of them repeated: what is computed once must reach every place that it belongs to.
TIMESTEPS = np.array([[999, 999, 999], [500, 20, 999], [0, 1, 500], [20, 20, 20]], np.float64)
LABELS = np.array([2, 0, 2])


def export(network: nn.Module, spec: NetworkSpec) -> tuple[bytes, NetworkSpec]:
    module, spec = prepare_module(network, spec)
    return exported(module, spec), spec


CASES = {
    "unconditional UNet": (tiny_unet(), NetworkSpec((1, 8, 8), fractional_timesteps=True)),
    "conditional UNet": (tiny_unet(num_class_embeds=4), NetworkSpec((1, 8, 8), 4, fractional_timesteps=True)),
    "integer timesteps": (tiny_unet(num_class_embeds=4), NetworkSpec((1, 8, 8), 4)),
    "closed form": (Labelled(), NetworkSpec((1, 4, 4), 10)),
    "a curve": (Curve(), NetworkSpec((1, 4, 4))),
    "a batch's mean": (Wide(), NetworkSpec((1, 4, 4))),
    "no time": (Timeless(), NetworkSpec((1, 4, 4))),
}


SLOW = ("unconditional UNet", "integer timesteps")


@pytest.fixture(
    scope="module", params=[pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in CASES]
)
def case(request):
    graph, spec = export(*CASES[request.param])
    return request.param, graph, spec


def test_the_parts_give_what_the_whole_gives(case):
    _, graph, spec = case
    whole = make_session(graph)
    graphs = partition(graph).graphs
    session = LazySession(lambda: make_session(graphs.step))
    denoiser = OnnxRuntimeDenoiser(session, EarlyGraphs(graphs.before_loop, spec), spec, batch_size=3)
    labels = None if spec.num_classes is None else LABELS
    values, enqueue = denoiser.compute(TIMESTEPS, Conditioning.of_labels(labels, 3)), denoiser.new_context()
    rng = np.random.default_rng(0)
    for stage, timesteps in enumerate(TIMESTEPS):
        denoiser.input[...] = rng.standard_normal(denoiser.input.shape)
        feeds = {"sample": denoiser.input.copy(), "timestep": timesteps.astype(spec.timestep_dtype)}
        if labels is not None:
            feeds["class_labels"] = labels
        read = {each.name for each in whole.get_inputs()}
        expected = whole.run(None, {name: array for name, array in feeds.items() if name in read})[0]
        enqueue(values, stage)
        np.testing.assert_allclose(denoiser.output, expected, rtol=0, atol=FLOAT32_NETWORK * np.abs(expected).max())


def test_what_moves_is_what_does_not_see_the_state(case):
    name, graph, _ = case
    parts = partition(graph)
    counts = {binding: len(nodes) for binding, nodes in parts.nodes.items()}
    plan, step = counts[Binding.PLAN], counts[Binding.STEP]
    call = counts[Binding.CALL] + counts[Binding.PROMPT]
    assert plan + call + step <= len(onnx.load_from_string(graph).graph.node)
    # Of the batch's mean only the conversion of the timesteps moves: the mean itself has no row for each sample.
    assert (plan > 0) == (name != "no time"), counts
    assert name != "a batch's mean" or plan == 1
    assert (call > 0) == (name == "conditional UNet" or name in ("integer timesteps", "closed form")), counts
    assert (parts.graphs.plan is None) == (plan == 0)
    assert (parts.graphs.call is None) == (call == 0)


def test_a_unets_time_path_leaves_the_loop_whole():
    """One table per residual block; no weight of the time embedding or of its projections stays behind."""
    graph, _ = export(*CASES["unconditional UNet"])
    parts = partition(graph)
    weights = {part: names(getattr(parts.graphs, part)) for part in ("plan", "step")}
    of_time = {name for name in names(graph) if "time_emb" in name}
    assert of_time
    assert of_time <= weights["plan"]
    assert not of_time & weights["step"]
    assert len(parts.crossing[Binding.PLAN]) == sum(name.endswith("time_emb_proj.weight") for name in of_time)
    read = [each.name for each in onnx.load_from_string(parts.graphs.step).graph.input]
    assert sorted(read) == sorted(["sample", *parts.crossing[Binding.PLAN]])


def names(graph: bytes) -> set[str]:
    return {tensor.name for tensor in onnx.load_from_string(graph).graph.initializer}


def test_each_pair_of_timestep_and_label_is_computed_once(monkeypatch):
    graph, spec = export(*CASES["conditional UNet"])
    constants = EarlyGraphs(partition(graph).graphs.before_loop, spec)
    found = constants.compute(TIMESTEPS, Conditioning.of_labels(LABELS, 3))
    pairs = {(t, label) for row in TIMESTEPS for t, label in zip(row, LABELS, strict=True)}
    assert found.call
    assert {len(values) for values in found.call.values()} == {len(pairs)}
    assert found.plan_index.shape == found.call_index.shape == TIMESTEPS.shape
    # Tables follow from the plan alone, and are kept from call to call.
    monkeypatch.setattr(EarlyGraphs, "_run", lambda self, name, *_: pytest.fail(name) if name == "plan" else {})
    assert constants.compute(TIMESTEPS, Conditioning.of_labels(LABELS[::-1].copy(), 3)).plan is found.plan


def test_a_graph_that_mixes_rows_unseen_is_caught_before_it_is_used():
    with pytest.raises(ExportError, match="off by"):
        build(Running(), plans=[3], batch_sizes=[2], backend="onnxruntime", sample_shape=(1, 4, 4))


def test_a_network_that_ignores_its_sample_is_refused():
    graph, _ = export(Blind(), NetworkSpec((1, 4, 4)))
    with pytest.raises(ExportError, match="does not depend on the state"):
        partition(graph)


def test_randomness_stays_in_the_loop():
    graph, _ = export(*CASES["a curve"])
    model = onnx.load_from_string(graph)
    first = next(node for node in model.graph.node if "timestep" in node.input)
    noisy = onnx.helper.make_node("RandomNormalLike", ["timestep"], ["noise"], dtype=onnx.TensorProto.FLOAT)
    first.input[list(first.input).index("timestep")] = "noise"
    model.graph.node.insert(0, noisy)
    parts = partition(model.SerializeToString())
    assert not parts.nodes[Binding.PLAN]
    assert any(node.op_type == "RandomNormalLike" for node in onnx.load_from_string(parts.graphs.step).graph.node)

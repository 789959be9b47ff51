"""A plan as one graph, run by ONNX Runtime alone, against the engine's loops: the same samples from the same x_T."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from engines import SCHEDULE, build
from onnxruntime import InferenceSession, SessionOptions
from tiny_networks import Curve, LearnedVariance, Small, tiny_text_unet, tiny_unet
from tolerances import STATIC_SHAPES
from torch import Tensor, nn

from skipstep import Plan
from skipstep.calls.noise import standard_normal
from skipstep.errors import InputError, PlanError
from skipstep.export.graph_writer import inner_graphs
from skipstep.export.onnx_sampler import build_sampler
from skipstep.export.weight_storage import compress_weights
from skipstep.kernels.layout import Stream

OPTIONS = {
    "ddim": {},
    "paper": {"convention": "paper"},
    "eta": {"eta": 0.7, "convention": "guided"},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample", "convention": "guided"},
    "ddpm": {"solver": "ddpm"},
    "heun": {"solver": "heun"},
    "rk4": {"solver": "rk4"},
    "dpm_solver_2": {"solver": "dpm_solver_2"},
    "dpm_solver_pp_2m": {"solver": "dpm_solver_pp_2m"},
    "unipc_3": {"solver": "unipc_3"},
    "lms": {"solver": "lms"},
    "dynamic": {"clip": "dynamic", "dynamic_quantile": 0.93, "dynamic_maximum": 1.5},
    "inversion": {"solver": "ddim_inversion"},
}
# Below the noisiest timesteps, where x0 = x/sqrt(a) - ... magnifies any rounding of the network by up to 157.
TIMESTEPS = {"lms": [699, 599, 449, 299, 199, 49]}  # Enough for it to overwrite a slot that it reads.
PLANS = {
    name: Plan(schedule=SCHEDULE, timesteps=TIMESTEPS.get(name, [599, 399, 199, 49]), **given)
    for name, given in OPTIONS.items()
}
SEEDS = [0, 7, 2**64 - 1]
LABELS = [0, 2, 1]
SCALES = [2.0, 3.0, 1.5]
X_T = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)


def engine_of(network, plans, **options):
    return build(network, plans=plans, batch_sizes=[len(X_T)], backend="onnxruntime", **options)


def sampler_of(engine, plan, **options):
    graph = build_sampler(engine.source.partition(), engine.network, plan, **options)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    return InferenceSession(graph, providers=["CPUExecutionProvider"])


def run(session, plan, **given):
    """Outputs by name. The graph must read all that is given, and nothing else but the noise of SEEDS."""
    if plan.adds_noise and "seeds" not in given:
        shape = given["x_T"].shape
        noise = standard_normal(
            np.array(SEEDS[: shape[0]], np.uint64),
            int(np.prod(shape[1:])),
            stage=range(plan.num_evaluations),
            stream=Stream.STEP,
        )
        given["noise"] = noise.reshape(-1, *shape)
    assert {each.name for each in session.get_inputs()} == set(given)
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


LABELLED = {"sample_shape": (1, 8, 8), "num_classes": 3, "null_label": 3, "fractional_timesteps": True}


@pytest.fixture(scope="module")
def labelled():
    return engine_of(Small().eval(), list(PLANS.values()), **LABELLED)


@pytest.fixture(scope="module")
def unet():
    return engine_of(tiny_unet(num_class_embeds=4), list(PLANS.values()), **LABELLED)


@pytest.fixture(scope="module")
def prompted():
    options = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    network = tiny_text_unet(**options, cross_attention_dim=8, attention_head_dim=4)
    return engine_of(network, list(PLANS.values()), prompt_shape=(5, 8), fractional_timesteps=True)


def expected_and_given(engine, plan, *, guided):
    """What the engine draws, with its trajectory, and the inputs of a graph that shall draw the same."""
    arguments = {"plan": plan, "x_T": X_T, "seeds": SEEDS}
    given = {"x_T": X_T}
    if engine.network.num_classes is not None:
        arguments["class_labels"] = LABELS
        given["class_labels"] = np.array(LABELS)
    if engine.network.prompt_shape is not None:
        shape = (len(X_T), *engine.network.prompt_shape)
        prompts, negative = np.random.default_rng(1).standard_normal((2, *shape), dtype=np.float32)
        arguments["prompt_embeds"] = given["encoder_hidden_states"] = prompts
        if guided:
            arguments["negative_prompt_embeds"] = given["negative_encoder_hidden_states"] = negative
    if guided:
        arguments["guidance_scale"] = SCALES
        given["guidance_scale"] = np.array(SCALES, np.float32)
    return *engine.sample(**arguments, trajectory=True), given


def assert_close(found, expected, *, scale=None):
    """A graph of fixed shapes, or of another batch size, may be computed in another order."""
    atol = STATIC_SHAPES * (scale or np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


SLOW, both_forms = pytest.mark.slow, pytest.mark.parametrize("form", ["loop", "unrolled"])


# Quickly each plan without guidance as a loop and with it unrolled, and two plans the other way round as well.
@pytest.mark.parametrize(
    ("name", "guided", "form"),
    [
        pytest.param(*case, marks=() if case[1] == (case[2] == "unrolled") or case[0] in ("eta", "lms") else [SLOW])
        for case in itertools.product(PLANS, (False, True), ("loop", "unrolled"))
    ],
)
def test_draws_what_the_engine_draws(labelled, name, guided, form):
    """With an open batch the network is the same graph, so the bits are the same."""
    plan = PLANS[name]
    samples, seen, given = expected_and_given(labelled, plan, guided=guided)
    options = {"guided": guided, "form": form}
    found = run(sampler_of(labelled, plan, batch_size=None, trajectory=True, **options), plan, **given)
    steps = np.flatnonzero(plan.ends_step)
    np.testing.assert_array_equal(found["x_0"], samples)
    np.testing.assert_array_equal(found["x_t"][steps], seen.x_t)
    np.testing.assert_array_equal(found["x0"][steps], seen.x0)
    assert found["x0"].shape == found["x_t"].shape == (plan.num_evaluations, *X_T.shape)

    found = run(sampler_of(labelled, plan, batch_size=3, **options), plan, **given)
    assert set(found) == {"x_0"}
    assert_close(found["x_0"], samples)


def from_seeds(engine, plan):
    """What the engine draws from SEEDS, and the inputs of a guided graph that shall draw the same."""
    samples = engine.sample(plan=plan, seeds=SEEDS, class_labels=LABELS, guidance_scale=SCALES)
    given = {"seeds": np.array(SEEDS, np.uint64), "class_labels": np.array(LABELS)}
    return samples, given | {"guidance_scale": np.array(SCALES, np.float32)}


@both_forms
@pytest.mark.parametrize("name", ["ddim", "eta", "ddpm", "lms"])
def test_draws_from_seeds(labelled, name, form):
    plan = PLANS[name]
    samples, given = from_seeds(labelled, plan)
    options = {"guided": True, "form": form, "noise": "seeds"}
    found = run(sampler_of(labelled, plan, batch_size=None, **options), plan, **given)
    np.testing.assert_array_equal(found["x_0"], samples)
    assert_close(run(sampler_of(labelled, plan, batch_size=3, **options), plan, **given)["x_0"], samples)


@pytest.mark.parametrize("name", ["ddim", "eta", "unipc_3", "lms", "rk4"])
def test_a_loop_can_be_resumed(labelled, name):
    plan = PLANS[name]
    samples, given = from_seeds(labelled, plan)
    options = {"guided": True, "noise": "seeds", "trajectory": True, "resumable": True, "batch_size": None}
    session = sampler_of(labelled, plan, **options)
    slots = [each.name[5:] for each in session.get_outputs() if each.name.startswith("next_")]
    assert slots == [f"h{slot}" for slot in sorted({slot for f in plan.stage_flags for slot in f.written_slots})]
    nothing = np.zeros((0, 1, 8, 8), np.float32)

    def stages(first, count, x_T=nothing, **history):
        history = dict.fromkeys(slots, nothing) | history
        place = {"first_stage": np.array(first), "num_stages": np.array(count)}
        return run(session, plan, x_T=x_T, **place, **history, **given)

    whole = stages(0, plan.num_evaluations)
    np.testing.assert_array_equal(whole["x_0"], samples)
    initial = stages(0, 0)
    expected = standard_normal(given["seeds"], 64, stage=0, stream=Stream.INITIAL).reshape(3, 1, 8, 8)
    np.testing.assert_array_equal(initial["x_0"], expected)
    assert len(initial["x0"]) == len(initial["x_t"]) == 0
    state = stages(0, 0, x_T=X_T)
    np.testing.assert_array_equal(state["x_0"], X_T)
    for parts in ([1] * plan.num_evaluations, [2, plan.num_evaluations - 2]):
        done, state, seen = 0, {"x_0": nothing}, []
        for count in parts:
            history = {name[5:]: value for name, value in state.items() if name.startswith("next_")}
            state = stages(done, count, x_T=state["x_0"], **history)
            done += count
            seen.append(state["x0"])
        np.testing.assert_array_equal(state["x_0"], samples)
        np.testing.assert_array_equal(np.concatenate(seen), whole["x0"])


@both_forms
def test_weights_stored_as_float16_are_cast_when_the_model_is_loaded(tmp_path, form):
    """Never in a run: the model that ONNX Runtime executes has no cast of a weight, in the loop's body either."""
    network = Small().eval()
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    engine = engine_of(network, [PLANS["ddim"]], **LABELLED)
    graph = build_sampler(engine.source.partition(), engine.network, PLANS["ddim"], form=form)
    stored = compress_weights(graph)
    assert casts_of_weights(onnx.load_from_string(stored).graph) > 2
    assert len(stored) < len(graph)
    options = SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    session = InferenceSession(stored, options, providers=["CPUExecutionProvider"])
    assert casts_of_weights(onnx.load(tmp_path / "executed.onnx").graph) == 0
    given = {"x_T": X_T[:1], "class_labels": np.array([1])}
    exact = InferenceSession(graph, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["x_0"], given)[0], exact.run(["x_0"], given)[0])


def casts_of_weights(graph):
    stored = {tensor.name for tensor in graph.initializer}
    here = sum(node.op_type == "Cast" and node.input[0] in stored for node in graph.node)
    return here + sum(casts_of_weights(inner) for node in graph.node for inner in inner_graphs(node))


@pytest.mark.slow
@both_forms
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_prompts_are_inputs(prompted, name, guided, form):
    plan = PLANS[name]
    samples, _, given = expected_and_given(prompted, plan, guided=guided)
    for batch_size in (3, None):
        found = run(sampler_of(prompted, plan, batch_size=batch_size, guided=guided, form=form), plan, **given)
        assert_close(found["x_0"], samples)


def test_labels_beside_prompts_keep_their_meaning_under_guidance():
    """Without a null label both halves have the samples' labels, and the prompts alone differ."""

    class Both(nn.Module):
        def forward(self, x: Tensor, t: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
            told = prompts.mean(dim=(1, 2)) + labels.to(x.dtype) / 10 + t.to(x.dtype) / 1000
            return torch.tanh(0.5 * x + told.view(-1, 1, 1, 1))

    plan = PLANS["eta"]
    engine = engine_of(Both(), [plan], sample_shape=(1, 8, 8), num_classes=4, prompt_shape=(2, 3))
    samples, _, given = expected_and_given(engine, plan, guided=True)
    found = run(sampler_of(engine, plan, batch_size=None, guided=True), plan, **given)
    assert_close(found["x_0"], samples)


@both_forms
@pytest.mark.parametrize("name", ["ddim", "eta"])
def test_a_unet_keeps_its_weights_once(unet, name, form):
    plan = PLANS[name]
    samples, _, given = expected_and_given(unet, plan, guided=True)
    for batch_size in (3, None):
        found = run(sampler_of(unet, plan, batch_size=batch_size, guided=True, form=form), plan, **given)
        assert_close(found["x_0"], samples)
    network = unet.source.partition().graphs
    whole = sum(len(graph) for graph in (*network.before_loop.values(), network.step))
    graph = build_sampler(unet.source.partition(), unet.network, plan, guided=True)
    assert len(graph) < whole + 20_000


@both_forms
def test_an_open_batch_takes_any_size(labelled, form):
    plan = PLANS["ddpm"]
    session = sampler_of(labelled, plan, batch_size=None, form=form)
    whole = run(session, plan, x_T=X_T, class_labels=np.array(LABELS))["x_0"]
    first = run(session, plan, x_T=X_T[:1], class_labels=np.array(LABELS[:1]))["x_0"]
    assert_close(first, whole[:1], scale=np.abs(whole).max())


@both_forms
def test_a_learned_variance_scales_the_noise(form):
    plan = Plan(schedule=SCHEDULE, timesteps=[599, 299, 99], solver="ddpm", variance="learned_range")
    engine = engine_of(LearnedVariance(), [plan], sample_shape=(1, 8, 8))
    samples = engine.sample(plan=plan, x_T=X_T, seeds=SEEDS)
    found = run(sampler_of(engine, plan, batch_size=3, form=form), plan, x_T=X_T)
    assert_close(found["x_0"], samples)


def test_an_unrolled_stage_does_what_its_flags_say_and_no_more(labelled):
    """Of DPM-Solver++ 2M the first step has no history to read and the last writes none."""
    plan = PLANS["dpm_solver_pp_2m"]
    graph = build_sampler(labelled.source.partition(), labelled.network, plan, form="unrolled")
    model = onnx.load_from_string(graph).graph
    assert not any(node.op_type in ("Loop", "Equal", "Where") for node in model.node)
    weights = [tensor.name for tensor in model.initializer if tensor.name.endswith("first.weight")]
    assert len(weights) == 1
    lean = build_sampler(labelled.source.partition(), labelled.network, PLANS["ddim"], form="unrolled")
    added = len(model.node) - len(onnx.load_from_string(lean).graph.node)
    flags = plan.stage_flags
    reads, writes = sum(f.read_h0 for f in flags), sum(f.write_h0 for f in flags)
    assert writes < len(flags)
    both = sum(f.read_h0 and f.write_h0 for f in flags)
    assert added == 2 * (reads + sum(f.add_state for f in flags)) + 5 * writes + 2 * both


def test_nan_reaches_the_output(labelled):
    x_T = X_T.copy()
    x_T[1, 0, 0, 0] = np.nan
    given = {"class_labels": np.array(LABELS), "x_T": x_T}
    found = run(sampler_of(labelled, PLANS["ddim"], batch_size=None), PLANS["ddim"], **given)["x_0"]
    np.testing.assert_array_equal(np.isnan(found).any(axis=(1, 2, 3)), [False, True, False])


def test_what_does_not_fit_is_refused():
    plan = PLANS["ddim"]
    engine = engine_of(Curve(), [plan], sample_shape=(1, 8, 8))
    parts, network = engine.source.partition(), engine.network
    with pytest.raises(InputError, match="guided=True"):
        build_sampler(parts, network, plan, guided=True)
    with pytest.raises(InputError, match="form='flat'"):
        build_sampler(parts, network, plan, form="flat")
    with pytest.raises(InputError, match="noise='drawn'"):
        build_sampler(parts, network, plan, noise="drawn")
    for wrong in ({"noise": "given"}, {"form": "unrolled"}, {"batch_size": 1}):
        with pytest.raises(InputError, match="resumable=True"):
            build_sampler(parts, network, plan, **{"noise": "seeds", "batch_size": None} | wrong, resumable=True)
    for batch_size in (0, True, 1.5):
        with pytest.raises(InputError, match="batch_size="):
            build_sampler(parts, network, plan, batch_size=batch_size)
    with pytest.raises(PlanError, match="fractional timesteps"):
        build_sampler(parts, network, PLANS["rk4"])
    with pytest.raises(PlanError, match="output channels"):
        build_sampler(parts, network, Plan(schedule=SCHEDULE, steps=3, solver="ddpm", variance="learned_range"))


def test_an_exported_loop_has_one_guidance_scale(labelled):
    plan = Plan(schedule=SCHEDULE, timesteps=[599, 399, 199, 49], guidance_weights=[0.0, 1.0, 1.0, 1.0])
    with pytest.raises(InputError, match="differs from step to step"):
        build_sampler(labelled.source.partition(), labelled.network, plan, guided=True)
    # Without guidance it is a plan like any other.
    plain = build_sampler(labelled.source.partition(), labelled.network, PLANS["ddim"], form="unrolled")
    assert build_sampler(labelled.source.partition(), labelled.network, plan, form="unrolled") == plain

"""The whole loop as one graph against the stepwise loop: the same bits, for every solver and condition."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from tiny_networks import Curve, GaussianEps, LearnedVariance, tiny_unet

from skipstep import Engine, NoiseSchedule, Plan
from skipstep.errors import InputError, NonFiniteError
from skipstep.loops.graph_loop import GraphLoop
from skipstep.loops.loop_table import LoopFeatures, loop_table
from skipstep.plans.stages import Stages

SCHEDULE = NoiseSchedule.linear(1000)
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
    "dynamic": {"clip": "dynamic", "dynamic_quantile": 0.7},
    "dynamic, bounded": {"clip": "dynamic", "dynamic_quantile": 0.93, "dynamic_maximum": 1.5},
    "dynamic, the largest": {"clip": "dynamic", "dynamic_quantile": 1.0},
}
PLANS = {name: Plan(schedule=SCHEDULE, steps=4, **options) for name, options in OPTIONS.items()}
GUIDANCE = {
    "none": {},
    "guided": {"guidance_scale": [2.0, 3.0, 1.5]},
    "rescaled": {"guidance_scale": 2.5, "guidance_rescale": [0.7, 0.0, 1.0]},
}


def engines(network, plans, **options):
    """The same network and plans with both loops."""
    given = {"batch_sizes": [3], "backend": "onnxruntime", "device": "cpu", "schedule": SCHEDULE, **options}
    return tuple(Engine.build(network, plans=plans, loop=loop, **given) for loop in ("stepwise", "onnx"))


@pytest.fixture(scope="module")
def unet():
    # No prediction type of its own: it predicts whatever a plan says.
    return engines(
        tiny_unet(num_class_embeds=4),
        list(PLANS.values()),
        sample_shape=(1, 8, 8),
        num_classes=3,
        null_label=3,
        fractional_timesteps=True,
    )


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", PLANS)
def test_has_the_bits_of_the_stepwise_loop(unet, name, guidance):
    stepwise, whole = unet
    arguments = {"plan": PLANS[name], "seeds": [0, 1, 2**64 - 1], "class_labels": [0, 2, 1], **GUIDANCE[guidance]}
    np.testing.assert_array_equal(whole.sample(**arguments), stepwise.sample(**arguments))


def test_a_learned_variance_scales_the_noise():
    plan = Plan(schedule=SCHEDULE, steps=5, solver="ddpm", variance="learned_range")
    stepwise, whole = engines(LearnedVariance(), [plan, 5], sample_shape=(1, 4, 4))
    for chosen in (plan, next(iter(p for p in whole.plans.values() if p != plan))):
        a, b = (engine.sample(plan=chosen, seeds=[1, 2, 3]) for engine in (stepwise, whole))
        # exp is each library's own.
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)


def test_samples_of_one_batch_may_follow_different_plans(unet):
    stepwise, whole = unet
    plans = [Plan(schedule=SCHEDULE, steps=4, eta=eta, convention="guided") for eta in (0.2, 0.7, 1.0)]
    for engine in unet:
        for plan in plans:
            engine.add_plan(plan)
    arguments = {"plan": plans, "seeds": [5, 6, 7], "class_labels": 1}
    np.testing.assert_array_equal(whole.sample(**arguments), stepwise.sample(**arguments))


@pytest.mark.parametrize("name", ["ddim", "eta", "rk4", "dpm_solver_pp_2m"])
def test_who_looks_on_sees_the_same_samples_and_states(unet, name):
    """Observed, the graph runs one stage at a time."""
    stepwise, whole = unet
    arguments = {"plan": PLANS[name], "seeds": [1, 2, 3], "class_labels": 0}
    alone = whole.sample(**arguments)
    events = []
    watched, seen = whole.sample(**arguments, trajectory=True, callback=events.append)
    _, expected = stepwise.sample(**arguments, trajectory=True)
    np.testing.assert_array_equal(watched, alone)
    np.testing.assert_array_equal(seen.x_t, expected.x_t)
    np.testing.assert_array_equal(seen.x0, expected.x0)
    assert len(events) == 4


def test_inversion_takes_the_same_way_back(unet):
    stepwise, whole = unet
    plan = Plan(schedule=SCHEDULE, steps=4, convention="paper")
    for engine in unet:
        engine.add_plan(plan)
    images = whole.sample(plan=plan, seeds=[1, 2, 3], class_labels=0)
    a, b = (engine.invert(images, plan=plan, class_labels=0, refinements=2) for engine in (stepwise, whole))
    np.testing.assert_array_equal(b.latents, a.latents)
    np.testing.assert_array_equal(b.residuals, a.residuals)


def test_noise_that_does_not_fit_is_drawn_in_pieces(unet, monkeypatch):
    _, whole = unet
    arguments = {"plan": PLANS["ddpm"], "seeds": [1, 2, 3], "class_labels": 0}
    expected = whole.sample(**arguments)
    monkeypatch.setattr("skipstep.loops.graph_loop.MAX_NOISE_BYTES", 1)
    np.testing.assert_array_equal(whole.sample(**arguments), expected)


def test_one_session_serves_all_that_it_covers(unet):
    _, whole = unet
    [loop] = whole.loops.values()
    assert isinstance(loop, GraphLoop)
    assert whole.split(8) == [3, 3, 2]
    assert "up to 3" in whole.describe()
    lean, everything = (
        LoopFeatures(guided=True, clip=True),
        LoopFeatures(guided=True, clip=True, noise=True, memory=True),
    )
    assert everything.covers(lean)
    assert not lean.covers(everything)
    stages = Stages.of([PLANS["ddim"]])
    assert LoopFeatures.of(whole.network, stages) == lean
    # What a plan does not need is zero in a table that has it.
    table = loop_table(stages, everything)
    assert table.shape == (4, 1, len(everything.columns))
    assert np.count_nonzero(table.any(axis=(0, 1))) < len(everything.columns)


def test_nan_reaches_the_caller():
    class Broken(Curve):
        def forward(self, x, t):
            # One timestep of the plan, which no check beforehand looks at.
            return super().forward(x, t).where((t != 249).view(-1, 1, 1, 1), float("nan"))

    for engine in engines(GaussianEps(SCHEDULE.alpha_bar), [4], sample_shape=(1, 4, 4))[1:]:
        engine.sample(steps=4, seeds=[0])
    with pytest.raises(NonFiniteError):
        Engine.build(
            Broken(), plans=[4], backend="onnxruntime", device="cpu", schedule=SCHEDULE, sample_shape=(1, 4, 4)
        ).sample(steps=4, seeds=[0])


def test_threads_share_one_graph(unet):
    _, whole = unet
    expected = [whole.sample(plan=PLANS["eta"], seeds=[s, s, s], class_labels=1) for s in range(4)]
    found = {}

    def draw(s):
        for _ in range(5):
            found[s] = whole.sample(plan=PLANS["eta"], seeds=[s, s, s], class_labels=1)

    threads = [threading.Thread(target=draw, args=(s,)) for s in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for s in range(4):
        np.testing.assert_array_equal(found[s], expected[s])


def test_a_loop_that_the_backend_has_not_is_refused():
    for loop, backend in (("onnx", "torch"), ("captured", "onnxruntime")):
        with pytest.raises(InputError, match=f"loop='{loop}'"):
            Engine.build(
                Curve(), plans=[3], loop=loop, backend=backend, device="cpu", schedule=SCHEDULE, sample_shape=(1, 4, 4)
            )

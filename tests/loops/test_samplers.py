"""Solvers, thresholding, rescaling, per-sample plans and trajectories through `Engine.sample`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analytic import GAUSSIAN, walk_table
from engines import SCHEDULE, build
from tiny_networks import Curve, GaussianEps, LearnedVariance, tiny_unet
from tolerances import BACKENDS_AGREE, BATCH_INVARIANCE, FLOAT32_LOOP

from skipstep import Engine, NoiseSchedule, Plan
from skipstep.calls.noise import standard_normal
from skipstep.errors import InputError, PlanError
from skipstep.kernels.layout import Stream
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.update_weights import SolverOptions

SAMPLERS = [name for name in SOLVERS if name not in ("ddim_inversion", "fitted")]


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    """A conditional UNet with a null label, on each backend."""
    return {
        backend: build(tiny_unet(num_class_embeds=4), null_label=3, backend=backend)
        for backend in ("torch", "onnxruntime")
    }


@pytest.fixture(scope="module")
def gaussian() -> Engine:
    return build(GaussianEps(SCHEDULE.alpha_bar), sample_shape=(1, 3, 5), fractional_timesteps=True)


PLANS = {name: Plan(schedule=SCHEDULE, steps=4, solver=name) for name in SAMPLERS} | {
    "eta": Plan(schedule=SCHEDULE, steps=4, eta=1.0),
    "ddpm fixed_large": Plan(schedule=SCHEDULE, steps=4, solver="ddpm", variance="fixed_large"),
    "rk4 at integers": Plan(schedule=SCHEDULE, steps=4, solver="rk4", midpoints="nearest"),
    "dynamic thresholding": Plan(schedule=SCHEDULE, steps=4, clip="dynamic", dynamic_quantile=0.8, dynamic_maximum=2),
    "thresholding seen in eps": Plan(
        schedule=SCHEDULE, steps=4, clip="dynamic", dynamic_quantile=0.9, convention="guided"
    ),
    "karras": Plan(schedule=SCHEDULE, steps=4, solver="heun", spacing="karras"),
    "zero terminal SNR": Plan(
        schedule=SCHEDULE.rescaled_to_zero_terminal_snr(), steps=4, prediction_type="v_prediction"
    ),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": [1.5, 3.0, 0.5], "guidance_rescale": [0.0, 0.7, 1.0]}])
def test_both_backends_draw_the_same(name, guidance, engines):
    drawn = [
        engine.sample(plan=PLANS[name], seeds=[5, 6, 7], class_labels=[0, 1, 2], **guidance)
        for engine in engines.values()
    ]
    np.testing.assert_allclose(*drawn, rtol=0, atol=BACKENDS_AGREE)


@pytest.mark.parametrize("name", PLANS)
def test_a_sample_is_what_it_would_be_alone(name, engines):
    arguments = {"plan": PLANS[name], "guidance_scale": 2.0, "guidance_rescale": 0.5}
    together = engines["torch"].sample(**arguments, seeds=[5, 6, 7], class_labels=[0, 1, 2])
    alone = engines["torch"].sample(**arguments, seeds=[6], class_labels=[1])
    np.testing.assert_allclose(together[1:2], alone, rtol=0, atol=BATCH_INVARIANCE)


@pytest.mark.parametrize("solver", SAMPLERS)
def test_the_engine_walks_the_solvers_table(solver, gaussian):
    """Float32 tables, fractional timesteps and the loop, against the table in float64 with the exact prediction."""
    plan = Plan(schedule=SCHEDULE, steps=10, solver=solver, clip=None)
    seeds = np.arange(3, dtype=np.uint64)
    x_T = np.random.default_rng(0).standard_normal((3, 1, 3, 5)).astype(np.float32)
    ours = gaussian.sample(plan=plan, x_T=x_T, seeds=seeds.tolist())
    weights = SOLVERS[solver].weights(plan.alpha_bars, SolverOptions(timesteps=np.array(plan.timesteps, float)))

    def noise(stage: int) -> np.ndarray:
        return standard_normal(seeds, 15, stage=stage, stream=Stream.STEP).ravel()

    exact = walk_table(weights, GAUSSIAN.eps, x_T.astype(np.float64).ravel(), noise=noise)
    np.testing.assert_allclose(ours.ravel(), exact, rtol=0, atol=FLOAT32_LOOP)


def test_evaluations_are_counted_and_stated():
    evaluations = {name: Plan(schedule=SCHEDULE, steps=10, solver=name).num_evaluations for name in SAMPLERS}
    assert evaluations == {
        "ddim": 10,
        "ddpm": 10,
        "heun": 19,
        "flow_heun": 19,
        "consistency": 10,
        "lcm": 10,
        "rk4": 37,
        "dpm_solver_1": 10,
        "dpm_solver_2": 19,
        **dict.fromkeys(("dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc_2", "unipc_3"), 10),
        **dict.fromkeys(("deis_2", "deis_3", "ipndm", "lms"), 10),
    }
    assert "37 evaluations" in repr(Plan(schedule=SCHEDULE, steps=10, solver="rk4"))


def test_dpm_solver_1_is_ddim():
    ddim, other = (Plan(schedule=SCHEDULE, steps=20, solver=solver) for solver in ("ddim", "dpm_solver_1"))
    np.testing.assert_array_equal(ddim.coefficients, other.coefficients)
    assert ddim.key == other.key


def test_ancestral_sampling_is_ddim_with_eta_one():
    """The posterior of DDPM, written with x and x0, or with the noise that the clipped image implies."""
    engine = build(Curve(), sample_shape=(1, 4, 4))
    ddpm = Plan(schedule=SCHEDULE, steps=20, solver="ddpm")
    ddim = Plan(schedule=SCHEDULE, steps=20, eta=1.0, convention="guided")
    ours, theirs = (engine.sample(plan=plan, seeds=[1, 2]) for plan in (ddpm, ddim))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT32_LOOP)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_learned_variance_lies_between_the_two(backend):
    engine = build(LearnedVariance(), sample_shape=(1, 4, 5), backend=backend)
    x_T = np.zeros((1, 1, 4, 5), np.float32)
    drawn = {}
    for variance in ("fixed_small", "learned_range", "fixed_large"):
        plan = Plan(schedule=SCHEDULE, timesteps=[600, 300], solver="ddpm", variance=variance, clip=None)
        _, trajectory = engine.sample(plan=plan, x_T=x_T, seeds=[3], trajectory=True)
        drawn[variance] = trajectory.x_t[0, 0, 0]
    small, learned, large = drawn.values()
    # The ramp is -1 in the first column (the posterior's variance), 1 in the last (beta), and 0 in the middle.
    np.testing.assert_allclose(learned[:, 0], small[:, 0], rtol=1e-5)
    np.testing.assert_allclose(learned[:, -1], large[:, -1], rtol=1e-5)
    z = standard_normal(np.array([3], np.uint64), 20, stage=0, stream=Stream.STEP).reshape(4, 5)
    sigma = [
        float(Plan(schedule=SCHEDULE, timesteps=[600, 300], solver="ddpm", variance=v).coefficients[0, 16])
        for v in ("fixed_small", "fixed_large")
    ]
    mean = small - sigma[0] * z
    np.testing.assert_allclose(learned[:, 2] - mean[:, 2], np.sqrt(sigma[0] * sigma[1]) * z[:, 2], atol=1e-5)


def test_a_network_with_a_learned_variance_takes_every_plan():
    wide = build(LearnedVariance(), sample_shape=(1, 4, 4))
    narrow = build(Curve(), sample_shape=(1, 4, 4))
    for steps in (3, 5):
        np.testing.assert_array_equal(wide.sample(steps=steps, seeds=[1, 2]), narrow.sample(steps=steps, seeds=[1, 2]))
    learned = Plan(schedule=SCHEDULE, steps=5, solver="ddpm", variance="learned_range")
    with pytest.raises(PlanError, match="1 output channels"):
        narrow.sample(plan=learned, seeds=[1])


def test_fractional_timesteps_need_a_network_that_takes_them():
    engine = build(Curve(), sample_shape=(1, 4, 4))
    with pytest.raises(PlanError, match="fractional timesteps") as caught:
        engine.sample(plan=PLANS["rk4"], seeds=[1])
    assert "nearest" in caught.value.remedy
    told: list[torch.Tensor] = []
    engine.source.module().register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    engine.sample(plan=PLANS["rk4 at integers"], seeds=[1])
    assert {t.dtype for t in told} == {torch.int64}


# Per-sample plans.

MIXED = [
    Plan(schedule=SCHEDULE, steps=6, eta=0.0),
    Plan(schedule=SCHEDULE, steps=6, eta=1.0, spacing="leading"),
    Plan(schedule=NoiseSchedule.cosine(1000), steps=6, eta=0.3, spacing="quadratic"),
    Plan(schedule=SCHEDULE, timesteps=[900, 800, 500, 200, 30, 2]),
    Plan(schedule=SCHEDULE, steps=6, clip=3.0),
]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_samples_of_a_batch_may_follow_their_own_plans(engines, backend):
    engine, seeds, labels = engines[backend], [3, 1, 4, 1, 5], [0, 1, 2, 0, 1]
    scales = [1.0, 2.0, 3.0, 1.5, 0.0]
    together = engine.sample(plan=MIXED, seeds=seeds, class_labels=labels, guidance_scale=scales)
    for i, plan in enumerate(MIXED):
        # Guided as in the batch: a scale of 1 would otherwise take the shorter way.
        alone = engine.sample(
            plan=plan, seeds=[seeds[i]] * 2, class_labels=[labels[i]] * 2, guidance_scale=[scales[i], 2.0]
        )
        np.testing.assert_allclose(together[i], alone[0], rtol=0, atol=BATCH_INVARIANCE, err_msg=repr(plan))


def test_a_plan_each_is_exact_where_the_network_is(gaussian):
    together = gaussian.sample(plan=MIXED, seeds=range(5))
    for i, plan in enumerate(MIXED):
        np.testing.assert_array_equal(together[i], gaussian.sample(plan=plan, seeds=[i])[0])


@pytest.mark.parametrize(
    "other",
    [
        Plan(schedule=SCHEDULE, steps=5),
        Plan(schedule=SCHEDULE, steps=6, clip=None),
        Plan(schedule=SCHEDULE, steps=6, convention="guided"),
        Plan(schedule=SCHEDULE, steps=6, solver="dpm_solver_pp_2m"),
        Plan(schedule=SCHEDULE, steps=6, solver="unipc_3"),
        Plan(schedule=SCHEDULE, steps=6, clip="dynamic", dynamic_quantile=0.9),
    ],
    ids=repr,
)
def test_plans_of_unequal_structure_do_not_share_a_batch(gaussian, other):
    with pytest.raises(PlanError, match="unequal structure"):
        gaussian.sample(plan=[MIXED[0], other], seeds=[1, 2])


@pytest.mark.parametrize("solver", ["unipc_3", "lms"])
def test_plans_with_a_ring_share_a_batch(gaussian, solver):
    """Each sample has weights of its own for the same slots."""
    plans = [
        Plan(schedule=SCHEDULE, steps=7, spacing=each, solver=solver) for each in ("trailing", "leading", "karras")
    ]
    together = gaussian.sample(plan=plans, seeds=[0, 1, 2])
    for i, plan in enumerate(plans):
        np.testing.assert_array_equal(together[i], gaussian.sample(plan=plan, seeds=[i])[0])
    assert not np.array_equal(together[0], gaussian.sample(plan=plans[1], seeds=[0])[0])


def test_a_history_of_unequal_structure_does_not_share_a_batch(gaussian):
    ends = [
        Plan(schedule=SCHEDULE, timesteps=timesteps, solver="dpm_solver_pp_2m", final_alpha_bar=final)
        for timesteps, final in (([900, 500, 100], 1.0), ([900, 500, 100], 0.9999))
    ]
    with pytest.raises(PlanError, match="unequal structure"):
        gaussian.sample(plan=ends, seeds=[1, 2])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"plan": [], "seeds": [1]}, "empty list"),
        ({"plan": MIXED[:2], "steps": 6, "seeds": [1, 2]}, "both"),
        ({"plan": MIXED[:2], "seeds": [1, 2, 3]}, "3 seeds, 2 plans"),
        ({"plan": "ddim", "seeds": [1]}, "type str"),
        ({"plan": MIXED[0], "seeds": [1], "trajectory": 0}, "trajectory=0"),
        ({"plan": MIXED[0], "seeds": [1], "trajectory": 1.5}, "trajectory=1.5"),
    ],
)
def test_refuses(gaussian, arguments, names):
    with pytest.raises(InputError, match=names):
        gaussian.sample(**arguments)


@pytest.mark.parametrize(
    ("rescale", "names"), [(1.5, "1.5"), (-0.1, "-0.1"), (float("nan"), "nan"), ("much", "much"), (True, "True")]
)
def test_refuses_rescales(engines, rescale, names):
    with pytest.raises(InputError, match=names):
        engines["torch"].sample(plan=MIXED[0], seeds=[1], class_labels=0, guidance_scale=2.0, guidance_rescale=rescale)
    with pytest.raises(InputError, match="without guidance_scale"):
        engines["torch"].sample(plan=MIXED[0], seeds=[1], class_labels=0, guidance_rescale=0.5)


def test_rescaling_by_hand(engines):
    """One unclipped step: eps is scaled by phi·std(c)/std(guided) + 1 - phi."""
    plan = Plan(schedule=SCHEDULE, timesteps=[500], clip=None)
    x_T = np.random.default_rng(1).standard_normal((1, 1, 8, 8)).astype(np.float32)
    a = float(SCHEDULE.alpha_bar[500])

    def eps(**arguments) -> np.ndarray:
        x0 = engines["torch"].sample(plan=plan, x_T=x_T, **arguments)
        return (x_T - np.sqrt(a) * x0) / np.sqrt(1 - a)

    labelled, guided = eps(class_labels=1), eps(class_labels=1, guidance_scale=4.0)
    ours = eps(class_labels=1, guidance_scale=4.0, guidance_rescale=0.6)
    np.testing.assert_allclose(ours, guided * (0.6 * labelled.std() / guided.std() + 0.4), atol=1e-5)


# Looking on.


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm_solver_pp_2m", "unipc_3"])
def test_trajectories_are_the_states_and_images_of_every_step(gaussian, solver):
    plan = Plan(schedule=SCHEDULE, steps=7, solver=solver, clip=None)
    samples, whole = gaussian.sample(plan=plan, seeds=range(6), trajectory=True)
    assert whole.steps.tolist() == list(range(7))
    assert whole.x_t.shape == whole.x0.shape == (7, *samples.shape)
    np.testing.assert_array_equal(whole.x_t[-1], samples)
    np.testing.assert_array_equal(samples, gaussian.sample(plan=plan, seeds=range(6)))
    samples, strided = gaussian.sample(plan=plan, seeds=range(6), trajectory=3)
    assert strided.steps.tolist() == [0, 3, 6]
    np.testing.assert_array_equal(strided.x_t, whole.x_t[::3])
    np.testing.assert_array_equal(strided.x0, whole.x0[::3])
    if solver == "ddim":
        a, p = plan.alpha_bars[2], plan.alpha_bars[3]
        eps = GAUSSIAN.eps(whole.x_t[1].astype(np.float64), float(a))
        expected = (whole.x_t[1] - np.sqrt(1 - a) * eps) / np.sqrt(a)
        np.testing.assert_allclose(whole.x0[2], expected, atol=1e-5)
        np.testing.assert_allclose(whole.x_t[2], np.sqrt(p) * expected + np.sqrt(1 - p) * eps, atol=1e-5)


def test_a_callback_sees_every_step_of_every_batch(gaussian):
    plan = Plan(schedule=SCHEDULE, steps=3, solver="heun")
    events = []
    samples = gaussian.sample(plan=plan, seeds=range(6), callback=events.append)
    assert [(e.first, len(e.x_t), e.step, e.num_steps) for e in events] == [
        (first, size, step, 3) for first, size in ((0, 4), (4, 2)) for step in range(3)
    ]
    np.testing.assert_array_equal(np.concatenate([e.x_t for e in events if e.step == 2]), samples)
    events[0].x_t[:] = np.nan  # Copies: what a callback does to them reaches nobody.
    np.testing.assert_array_equal(samples, gaussian.sample(plan=plan, seeds=range(6)))


def test_an_error_in_a_callback_reaches_the_caller_and_frees_the_engine(gaussian):
    def fail(event) -> None:
        raise KeyError(event.step)

    plan = Plan(schedule=SCHEDULE, steps=3)
    with pytest.raises(KeyError, match="0"):
        gaussian.sample(plan=plan, seeds=[1], callback=fail)
    assert np.all(np.isfinite(gaussian.sample(plan=plan, seeds=[1])))

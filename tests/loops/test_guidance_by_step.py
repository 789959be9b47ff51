"""Guidance that differs from step to step: its interval and its weights, and the batch that the network is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import SCHEDULE, build
from tiny_networks import Labelled
from tolerances import FLOAT32_LOOP

from skipstep import Plan
from skipstep.errors import PlanError
from skipstep.export.cubins import needed_variants

CALL = {"seeds": [1, 2, 3], "class_labels": [0, 1, 2], "guidance_scale": [2.0, 3.0, 0.5]}
INTERVAL = (0.3, 20.0)


class Counted(Labelled):
    """Keeps how large its batches were."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x, t, labels):
        self.batches.append(len(x))
        return super().forward(x, t, labels)


@pytest.fixture
def network():
    return Counted()


@pytest.fixture
def engine(network):
    with build(network, sample_shape=(1, 4, 4), num_classes=4, null_label=3, batch_sizes=[3]) as engine:
        yield engine


def a_plan(**options):
    return Plan(schedule=SCHEDULE, **{"steps": 6, **options})


def ratios(plan):
    return np.sqrt((1 - plan.alpha_bars[:-1]) / plan.alpha_bars[:-1])


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_pp_2m", "heun"])
def test_outside_of_the_interval_the_network_sees_half_the_batch(engine, network, solver):
    plan = a_plan(solver=solver, guidance_interval=INTERVAL)
    expected = [3 if flags.unguided else 6 for flags in plan.stage_flags]
    assert set(expected) == {3, 6}
    network.batches.clear()
    engine.sample(plan=plan, **CALL)
    assert network.batches == expected
    network.batches.clear()
    unguided = {**CALL, "guidance_scale": None}
    drawn = engine.sample(plan=plan, **unguided)
    assert set(network.batches) == {3}
    np.testing.assert_array_equal(drawn, engine.sample(plan=a_plan(solver=solver), **unguided))


def test_the_loop_by_hand(engine):
    """DDIM over a plan's levels: predictions with the condition alone, or combined by the step's weight."""
    weights = [0.0, 1.0, 0.5, 2.0, 0.0, 0.25]
    plan = a_plan(guidance_weights=weights, clip=None)
    network, scales = Labelled(), torch.tensor(CALL["guidance_scale"]).view(-1, 1, 1, 1)
    x_T = np.random.default_rng(0).standard_normal((3, 1, 4, 4)).astype(np.float32)
    x, labels, null = torch.tensor(x_T), torch.tensor(CALL["class_labels"]), torch.full((3,), 3)
    for weight, t, a, p in zip(weights, plan.timesteps, plan.alpha_bars, plan.alpha_bars[1:], strict=False):
        with torch.no_grad():
            eps, without = (network(x, torch.full((3,), t), each) for each in (labels, null))
        eps = eps if weight == 0.0 else without + (1 + weight * (scales - 1)) * (eps - without)
        x = np.sqrt(p) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - p) * eps
    drawn = engine.sample(plan=plan, x_T=x_T, **{**CALL, "seeds": None})
    assert np.abs(drawn - x.numpy()).max() < FLOAT32_LOOP * np.abs(x.numpy()).max() * 10


def test_an_interval_is_weights_of_one_and_nought(engine):
    plan = a_plan(guidance_interval=INTERVAL)
    inside = (ratios(plan) >= INTERVAL[0]) & (ratios(plan) <= INTERVAL[1])
    assert [not flags.unguided for flags in plan.stage_flags] == inside.tolist()
    assert a_plan(guidance_weights=inside.astype(float).tolist()).key == plan.key
    # What changes nothing is no part of the key.
    assert a_plan(guidance_weights=[1.0] * 6).key == a_plan(guidance_interval=(0.0, 1e9)).key == a_plan().key
    assert len({plan.key, a_plan().key, a_plan(guidance_weights=[1.0] * 5 + [0.5]).key}) == 3


def test_scales_of_one_and_rescale(engine):
    plan = a_plan(guidance_weights=[0.5] * 6)
    whole, half = ([1 + 2.0 * w, 1 + 1.0 * w, 1.0] for w in (1.0, 0.5))
    given = {**CALL, "guidance_rescale": 0.7}
    ours = engine.sample(plan=plan, **{**given, "guidance_scale": whole})
    theirs = engine.sample(plan=a_plan(), **{**given, "guidance_scale": half})
    np.testing.assert_allclose(ours, theirs, atol=FLOAT32_LOOP)


def test_observers_and_batches_of_several_plans_follow_it(engine):
    weights = [0.0, 0.5, 1.0, 1.0, 0.0, 2.0]
    plans = [a_plan(guidance_weights=weights, spacing=each) for each in ("trailing", "linspace", "quadratic")]
    together, kept = engine.sample(plan=plans, trajectory=True, **CALL)
    assert len(kept.x_t) == 6
    for i, plan in enumerate(plans):
        alone = engine.sample(
            plan=plan, seeds=[CALL["seeds"][i]], class_labels=i, guidance_scale=CALL["guidance_scale"][i]
        )
        np.testing.assert_allclose(together[i], alone[0], atol=FLOAT32_LOOP)


def test_kernels_are_compiled_for_both_kinds_of_steps():
    plan = a_plan(guidance_weights=[0.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    made = needed_variants(plan.stage_flags, guided=True, wide_output=False)
    kinds = {(flags.guided, flags.doubled, flags.scale_guidance) for flags in made}
    assert kinds == {(False, False, False), (False, True, False), (True, False, True), (True, False, False)}


def test_a_start_in_the_middle_keeps_its_steps_weights():
    plan = a_plan(guidance_weights=[0.0, 0.5, 1.0, 1.0, 0.0, 1.0], quality={"rmse": 1.0, "guidance_scale": 1.0})
    assert plan.started_at(4).guidance_weights == (0.0, 1.0)
    assert a_plan(guidance_interval=INTERVAL).started_at(2).guidance_interval == INTERVAL
    assert Plan(schedule=SCHEDULE, **plan.options()) == plan
    assert plan.inverted().guidance_weights is None


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_interval": (5.0, 1.0)},
        {"guidance_interval": (1e6, 1e7)},
        {"guidance_interval": 3},
        {"guidance_interval": (0.0, np.nan)},
        {"guidance_interval": (-1.0, 3.0)},
        {"guidance_weights": [1.0]},
        {"guidance_weights": [0.0] * 6},
        {"guidance_weights": [-1.0, *[1.0] * 5]},
        {"guidance_weights": "111111"},
        {"guidance_weights": [1.0] * 6, "guidance_interval": INTERVAL},
        {"guidance_interval": INTERVAL, "solver": "ddim_inversion"},
    ],
    ids=str,
)
def test_what_is_no_interval(options):
    with pytest.raises(PlanError, match="guidance_"):
        a_plan(**options)

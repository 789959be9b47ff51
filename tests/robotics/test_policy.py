"""Chunks of actions equal those of the policy's own loop, for the same initial noise and the same step noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from robotics_cases import STATISTICS
from tiny_policy import CAMERAS, STATE, Config, Shape, TinyPolicy, batch_of, random_observations, step_noise

from skipstep import Plan
from skipstep.errors import InputError, MissingDependencyError, ModelFormatError
from skipstep.robotics import PolicyEngine, from_policy

SHAPE = (8, 2)


@pytest.fixture(scope="module")
def policy() -> Any:
    with from_policy(TinyPolicy(), device="cpu", backend="torch", batch_sizes=[1, 2], statistics=STATISTICS) as made:
        yield made


def chunk_of(theirs: TinyPolicy, observations: Any, x_T: Any) -> Any:
    with torch.no_grad():
        return theirs.diffusion.generate_actions(batch_of(observations, theirs.config), torch.from_numpy(x_T)).numpy()


@pytest.mark.parametrize(
    ("backend", "scheduler", "steps", "options"),
    [
        ("torch", "DDPM", 100, {}),
        ("onnxruntime", "DDPM", 10, {"prediction_type": "sample", "variance_type": "fixed_large"}),
        ("torch", "DDIM", 7, {"clip_sample_range": 0.5, "beta_schedule": "linear"}),
        pytest.param("onnxruntime", "DDIM", 10, {}, marks=pytest.mark.slow),
    ],
)
def test_a_chunk_equals_that_of_the_policys_own_loop(backend, scheduler, steps, options, monkeypatch):
    theirs, rng = TinyPolicy(scheduler, steps, **options), np.random.default_rng(1)
    with from_policy(theirs, device="cpu", backend=backend) as ours:
        observations = random_observations(theirs.config, rng, 1, 2)
        x_T = rng.standard_normal((1, *SHAPE), np.float32)
        (plan,) = ours.engine.plans.values()
        assert (plan.solver, plan.steps) == (scheduler.lower(), steps)
        step_noise(monkeypatch, [7], steps, SHAPE)
        expected = chunk_of(theirs, observations, x_T)
        found = ours.predict(observations, plan=plan, seeds=[7], x_T=x_T)
        assert found.shape == expected.shape == (1, 4, 2)
        assert np.mean(np.abs(expected) < 0.99 * plan.clip) > 0.5, "not decided by clipping alone"
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_policy_trained_with_ddpm_runs_in_few_steps_of_ddim():
    with from_policy(TinyPolicy("DDPM", 100), plans=[5], solver="ddim", device="cpu", backend="torch") as few:
        theirs, rng = TinyPolicy("DDIM", 5), np.random.default_rng(2)
        observations, x_T = random_observations(theirs.config, rng, 1, 2), rng.standard_normal((1, *SHAPE), np.float32)
        found = few.predict(observations, steps=5, x_T=x_T)
        np.testing.assert_allclose(found, chunk_of(theirs, observations, x_T), rtol=0, atol=1e-5)


def test_observations_are_normalised_and_actions_are_in_the_units_of_the_data_set(policy):
    theirs, rng = TinyPolicy(), np.random.default_rng(3)
    observations = random_observations(theirs.config, rng, 2, 2)
    observations[STATE] = observations[STATE] * [2, 4, 0] + [-1, 0, 2]  # Within their ranges.
    normalised = dict(observations)
    low, high = STATISTICS[STATE]["min"], np.array([1.0, 4.0, 2.0 + 1e-8])
    normalised[STATE] = (2 * (observations[STATE] - low) / (high - low) - 1).astype(np.float32)
    normalised[STATE][..., 2] = -1.0
    normalised[CAMERAS[0]] = (observations[CAMERAS[0]] - np.float32(0.4)) / np.float32([0.2, 0.3, 0.4])[:, None, None]
    x_T = rng.standard_normal((2, *SHAPE), np.float32)
    expected = (chunk_of(theirs, normalised, x_T) + 1) / 2 * [10, 500] + [0, -200]
    np.testing.assert_allclose(policy.predict(observations, steps=10, x_T=x_T), expected, rtol=1e-5, atol=3e-3)


def test_what_was_encoded_once_can_be_sampled_again(policy):
    observations = random_observations(Config(), np.random.default_rng(4), 1, 2)
    observations[STATE][..., 2] = 2.0
    encoded = policy.encode(observations)
    assert encoded.shape == (1, policy.engine.network.all_conditions["global_cond"].shape[0])
    chunk = policy.sample(global_cond=encoded, steps=10, seeds=[1])
    np.testing.assert_array_equal(chunk, policy.sample(observations, steps=10, seeds=[1]))
    assert policy.actions(chunk, n_action_steps=7).shape == (1, 7, 2)
    assert not np.array_equal(chunk, policy.sample(global_cond=encoded + 1, steps=10, seeds=[1]))


def test_a_policy_without_images_and_plans_of_ones_own():
    config = Config(image_features={}, env_state_feature=Shape((5,)), n_obs_steps=1)
    theirs, rng = TinyPolicy(config=config), np.random.default_rng(5)
    made = from_policy(theirs, device="cpu", backend="torch")
    defaults = made.engine.plan_defaults
    made.engine.add_plan(Plan(**{**defaults, "steps": 4, "solver": "dpm_solver_pp_2m"}))
    observations, x_T = random_observations(config, rng, 1, 1), rng.standard_normal((1, *SHAPE), np.float32)
    found = made.predict(observations, steps=10, x_T=x_T)
    np.testing.assert_allclose(found, chunk_of(theirs, observations, x_T), rtol=0, atol=1e-5)
    assert np.abs(made.predict(observations, steps=4, x_T=x_T) - found).max() > 1e-5
    made.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.pop(STATE), "no 'observation.state'"),
        (lambda o: o.update({STATE: np.zeros((1, 3, 3), np.float32)}), "n_obs_steps = 2"),
        (lambda o: o.update({STATE: np.zeros((2, 2, 3), np.float32)}), "one batch size"),
        (lambda o: o.update({STATE: np.full((1, 2, 3), np.nan)}), "finite"),
        (lambda o: o.update({CAMERAS[1]: np.zeros((1, 2, 3, 8, 8), np.uint8)}), "dtype uint8"),
        (lambda o: o.update({CAMERAS[1]: np.zeros((1, 2, 8, 8, 3), np.float32)}), "batch, n_obs_steps, 3, 8, 8"),
    ],
)
def test_observations_that_do_not_fit_are_refused(policy, change, said):
    observations = random_observations(Config(), np.random.default_rng(6), 1, 2)
    change(observations)
    with pytest.raises(InputError, match=said):
        policy.encode(observations)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"statistics": {"action": {"min": [0.0, 1.0]}}}, "'max'"),
        ({"statistics": {"action": {"min": [0.0], "max": [1.0, 2.0]}}}, "channels"),
        ({"statistics": {"action": {"min": [0.0] * 3, "max": [1.0] * 3}}}, "channels"),
        ({"solver": "heun"}, "ddpm, ddim"),
        ({"sample_shape": (8, 2)}, "sample_shape beside a policy"),
        ({"plans": ["ten"]}, "plans"),
    ],
)
def test_a_policy_that_cannot_be_compiled_as_asked_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        from_policy(TinyPolicy(), device="cpu", backend="torch", **options)


def test_what_is_no_policy_is_refused(tmp_path):
    with pytest.raises(InputError, match="unet"):
        from_policy(torch.nn.Linear(1, 1))
    with pytest.raises((MissingDependencyError, ModelFormatError)):
        from_policy(tmp_path)
    linspace = TinyPolicy()
    linspace.diffusion.noise_scheduler.register_to_config(timestep_spacing="linspace")
    with pytest.raises(InputError, match="leading"):
        from_policy(linspace)


def test_the_policys_own_module_is_left_as_it_was():
    theirs = TinyPolicy()
    before = list(theirs.state_dict())
    from_policy(theirs, device="cpu", backend="torch").close()
    assert list(theirs.state_dict()) == before


def test_parts_that_do_not_belong_together_are_refused(policy):
    other = replace(policy.spec, horizon=16)
    with pytest.raises(InputError, match="horizon"):
        PolicyEngine(policy.engine, other, policy.graph)
    renamed = replace(policy.spec, observations=policy.spec.observations[:2])
    with pytest.raises(InputError, match="encoder"):
        PolicyEngine(policy.engine, renamed, policy.graph)

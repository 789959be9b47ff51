"""compatibility="diffusers": its DDIMScheduler's noise levels for any configuration, also where its stride is off."""

import json
import logging
import random
import shutil

import numpy as np
import pytest
import torch
from engines import build
from tiny_networks import Curve
from tolerances import DIFFUSERS_LOOP

import skipstep
from skipstep import NoiseSchedule, Plan
from skipstep.demo import SHIPPED_MODEL
from skipstep.errors import PlanError

diffusers = pytest.importorskip("diffusers")


def configurations(seed):
    """One random configuration of a scheduler, and a number of steps."""
    rng = random.Random(seed)
    length = rng.choice((7, 20, 33, 50, 100))
    return rng.randint(1, min(length, 12)), {
        "num_train_timesteps": length,
        "beta_end": 0.3,
        "timestep_spacing": rng.choice(("leading", "trailing", "linspace")),
        "set_alpha_to_one": rng.random() < 0.5,
        "clip_sample": rng.random() < 0.5,
        "prediction_type": rng.choice(("epsilon", "v_prediction", "sample")),
    }


@pytest.fixture(scope="module")
def engine():
    with build(Curve(), sample_shape=(1, 4, 4), batch_sizes=[2]) as made:
        yield made


def drawn_by_diffusers(scheduler, x, **options):
    curve = Curve()
    for t in scheduler.timesteps:
        x = scheduler.step(curve(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def test_random_configurations(engine):
    differing = refused = 0
    for seed in range(200):
        steps, config = configurations(seed)
        scheduler = diffusers.DDIMScheduler(**config)
        scheduler.set_timesteps(steps)
        x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        options = {
            "schedule": NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy()),
            "steps": steps,
            "spacing": config["timestep_spacing"],
            "prediction_type": config["prediction_type"],
            "clip": 1.0 if config["clip_sample"] else None,
            "final_alpha_bar": float(scheduler.final_alpha_cumprod),
        }
        theirs = drawn_by_diffusers(scheduler, x_T).numpy()
        try:
            same = Plan(**options, stride="diffusers")
        except PlanError:
            refused += 1
            continue
        stride = config["num_train_timesteps"] // steps
        pairs = [(int(t), int(t) - stride if t >= stride else None) for t in scheduler.timesteps]
        assert list(same.pairs) == pairs, config
        ours = engine.sample(plan=same, x_T=x_T.numpy())
        assert np.linalg.norm(ours - theirs) <= DIFFUSERS_LOOP * np.linalg.norm(theirs), (steps, config)
        differing += Plan(**options).pairs != same.pairs
    assert differing > 30
    assert refused < 20


def test_the_rest_of_a_plan_keeps_its_stride():
    plan = Plan(schedule=NoiseSchedule.linear(1000), steps=30, spacing="linspace", stride="diffusers")
    assert plan.stride == 33
    assert plan.started_at(10).pairs == plan.pairs[10:]
    again = Plan(schedule=plan.schedule, **plan.options())
    assert (again.key, again.pairs, again) == (plan.key, plan.pairs, plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "stride": "diffusers", "solver": "heun"}, "supported by ddim"),
        ({"steps": 3, "stride": "diffusers", "spacing": "karras"}, "one of leading, trailing, linspace"),
        ({"steps": 3, "stride": 10}, "leave it out, or pass timesteps"),
        ({"timesteps": [9, 4], "stride": "diffusers"}, "an integer from 1"),
        ({"timesteps": [9, 4], "stride": 0}, "an integer from 1"),
        ({"timesteps": [9, 4], "stride": True}, "an integer from 1"),
    ],
)
def test_other_strides_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        Plan(schedule=NoiseSchedule.linear(100), **options)


def test_a_folder_draws_what_diffusers_draws_or_says_that_it_does_not(tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED_MODEL, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    contents = json.loads(config.read_text()) | {"timestep_spacing": "linspace"}
    config.write_text(json.dumps(contents))
    options = {"plans": [10], "backend": "torch", "device": "cpu"}
    with caplog.at_level(logging.WARNING, "skipstep"), skipstep.Engine.build(folder, **options) as engine:
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert "compatibility='diffusers'" in said[0]
        ours = engine.select_plan(steps=10)
    caplog.clear()
    with skipstep.Engine.build(folder, compatibility="diffusers", **options) as engine:
        assert not caplog.records
        theirs = engine.select_plan(steps=10)
        assert theirs.stride == 100
        assert theirs.pairs != ours.pairs
        assert engine.add_plan(7).stride == 142

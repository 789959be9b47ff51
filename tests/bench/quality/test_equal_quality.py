"""What is timed beside our fitted plans: diffusers' loops draw what our plans of the same name draw."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from tolerances import DIFFUSERS_SIGMA_LOOP

from skipstep import Plan, load
from skipstep.bench.quality import equal_quality
from skipstep.demo import SHIPPED_BUNDLE, SHIPPED_MODEL


@pytest.mark.parametrize(
    ("scheduler", "solver", "steps"),
    [(diffusers.DDIMScheduler, "ddim", 20), (diffusers.UniPCMultistepScheduler, "unipc_2", 10)],
)
def test_both_draw_the_same_images(scheduler, solver, steps):
    unet = diffusers.UNet2DModel.from_pretrained(SHIPPED_MODEL, subfolder="unet").eval()
    configuration = diffusers.DDIMScheduler.from_pretrained(SHIPPED_MODEL, subfolder="scheduler").config
    x_T = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).numpy()
    drawn = equal_quality.theirs(unet, scheduler.from_config(configuration), steps, 2)()
    with load(SHIPPED_BUNDLE, compile_on_miss=True) as engine:
        plan = engine.add_plan(Plan(**{**engine.plan_defaults, "steps": steps, "solver": solver}))
        ours = engine.sample(plan=plan, x_T=x_T, class_labels=[0, 1], guidance_scale=equal_quality.GUIDANCE)
    assert np.linalg.norm(ours - drawn) < 10 * DIFFUSERS_SIGMA_LOOP * np.linalg.norm(drawn)


@pytest.mark.slow
def test_every_call_is_timed_in_every_round():
    seconds = equal_quality.measure(1, 2)
    assert equal_quality.BASE in seconds
    assert len(seconds) == 8
    assert all(len(each) == 2 and min(each) > 0.0 for each in seconds.values())

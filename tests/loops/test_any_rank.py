"""States of any rank: vectors, sequences, images and videos go through the same plans, kernels, graphs and bundles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import SCHEDULE, build
from fake_cuda import FakeDevice, build_on
from tiny_networks import Labelled
from tolerances import BATCH_INVARIANCE, FLOAT32_LOOP

from skipstep import Plan, load
from skipstep.errors import InputError

SHAPES = [(5,), (2, 7), (1, 4, 4), (2, 3, 4, 5)]
PLANS = {
    "ddim": Plan(schedule=SCHEDULE, steps=4),
    "noise": Plan(schedule=SCHEDULE, steps=4, eta=1.0, clip="dynamic", dynamic_quantile=0.9),
    "multistep": Plan(schedule=SCHEDULE, steps=5, solver="dpm_solver_pp_2m", clip=None),
}
CALL = {"seeds": [1, 2, 3], "class_labels": [0, 1, 2], "guidance_scale": [1.5, 2.0, 3.0], "guidance_rescale": 0.5}
LABELS = {"num_classes": 4, "null_label": 3}
ids = [f"rank {len(shape)}" for shape in SHAPES]


def engine_of(shape, **options):
    return build(Labelled(), plans=list(PLANS.values()), sample_shape=shape, batch_sizes=[3], **LABELS, **options)


@pytest.fixture
def device_engine(monkeypatch, kernel_device):
    if kernel_device != "cpu":
        pytest.skip("the stand-in device runs Triton's interpreter")
    device = FakeDevice()
    build_on(monkeypatch, device)
    return engine_of


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_a_state_is_its_elements(shape):
    """The network treats every element alike: in any shape the same numbers are drawn."""
    flat = engine_of((int(np.prod(shape)),))
    engine = engine_of(shape)
    for plan in PLANS.values():
        drawn = engine.sample(plan=plan, **CALL)
        assert drawn.shape == (3, *shape)
        np.testing.assert_array_equal(drawn.reshape(3, -1), flat.sample(plan=plan, **CALL))
    images = engine.sample(plan=PLANS["ddim"], seeds=[1, 2], class_labels=1)
    found = engine.invert(images, plan=PLANS["ddim"], class_labels=1, refinements=2)
    assert found.latents.shape == (2, *shape)
    assert engine.interpolate(1, 2, 3, plan=PLANS["ddim"], class_labels=0).shape == (3, *shape)
    with pytest.raises(InputError, match="sample"):
        engine.sample(plan=PLANS["ddim"], x_T=np.zeros((2, *shape, 1), np.float32), class_labels=1)


@pytest.mark.parametrize("shape", [SHAPES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in SHAPES[1:])])
def test_kernels_draw_what_the_host_draws(shape, device_engine):
    on_device = device_engine(shape)
    assert on_device.captures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipstep.building.resolve_device", lambda name, **_: torch.device(name))
        host = engine_of(shape)
    for plan in PLANS.values():
        found, expected = on_device.sample(plan=plan, **CALL), host.sample(plan=plan, **CALL)
        np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOOP * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(5,), (2, 7)], ids=["rank 1", "rank 2"])
def test_a_bundle_holds_it(shape, tmp_path):
    engine = engine_of(shape, backend="onnxruntime")
    engine.save(tmp_path / "bundle", license="MIT", targets=["onnx-loop"])
    with load(tmp_path / "bundle") as loaded:
        for plan in PLANS.values():
            expected = engine_of(shape).sample(plan=plan, **CALL)
            np.testing.assert_allclose(loaded.sample(plan=plan, **CALL), expected, rtol=0, atol=BATCH_INVARIANCE)


def test_pictures_have_two_spatial_axes():
    with pytest.raises(InputError, match="pictures") as caught:
        engine_of((2, 7)).sample(plan=PLANS["ddim"], seeds=1, class_labels=0, output_type="pil")
    assert "output_type='np'" in caught.value.remedy

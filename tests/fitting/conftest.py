"""Engines to fit plans to."""

import pytest
from engines import SCHEDULE, build
from fitting_cases import DEVIATION, MEAN, SHAPE
from tiny_networks import Curve, GaussianEps, tiny_unet


@pytest.fixture(scope="module")
def gaussian():
    """The exact network of normal data, whose trajectories are known."""
    with build(GaussianEps(SCHEDULE.alpha_bar, mean=MEAN, deviation=DEVIATION), sample_shape=SHAPE) as engine:
        engine.plans.defaults["clip"] = None
        yield engine


@pytest.fixture(scope="module")
def curve():
    with build(Curve(), sample_shape=SHAPE, batch_sizes=[16]) as engine:
        yield engine


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "bundle"
    unet = tiny_unet(num_class_embeds=4)
    with build(unet, backend="onnxruntime", plans=[3], batch_sizes=[1, 16], num_classes=3, null_label=3) as engine:
        engine.save(folder, license="MIT")
    return folder

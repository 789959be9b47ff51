"""Fixtures of this folder."""

from __future__ import annotations

import pytest
from bundle_cases import PLANS, make
from tiny_networks import tiny_unet

from skipstep.bundles.cache import ArtefactCache


@pytest.fixture(scope="module")
def engine():
    conditions = {"num_classes": 3, "null_label": 3, "fractional_timesteps": True}
    return make(tiny_unet(num_class_embeds=4), plans=PLANS, batch_sizes=[1, 3], **conditions)


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    engine.save(folder, license="MIT", name="tiny")
    return folder


@pytest.fixture
def cache(tmp_path):
    return ArtefactCache(tmp_path / "cache")

"""Tiles whose seams do not show, and torch's normal numbers without torch."""

from __future__ import annotations

import numpy as np
import pytest
import tolerances
import torch
from tiny_pipelines import tiny_pipeline

from skipstep import Engine
from skipstep.calls.torch_noise import TorchNoise
from skipstep.errors import InputError, NonFiniteError
from skipstep.pipelines.pictures import decode_tiled, encode_tiled


def _enlarged(latents):
    return latents.repeat(2, axis=2).repeat(2, axis=3)


@pytest.mark.parametrize("size", [(8, 8), (9, 21), (8, 12), (13, 40)])
def test_tiles_of_what_looks_at_one_pixel_are_the_whole(size):
    latents = np.random.default_rng(0).standard_normal((2, 3, *size), np.float32)
    found = decode_tiled(_enlarged, latents, tile=(8, 8), factor=2)
    np.testing.assert_allclose(found, _enlarged(latents), atol=1e-6)
    pictures = _enlarged(latents)
    mean, deviation = encode_tiled(
        lambda each: np.concatenate([each, -each], 1)[..., ::2, ::2], pictures, tile=(8, 8), factor=2
    )
    np.testing.assert_allclose(mean, latents, atol=1e-6)
    np.testing.assert_allclose(deviation, -latents, atol=1e-6)


def test_seams_are_blended():
    """Each tile adds its own constant: the picture has no jump larger than a ramp's step."""
    constants = iter(np.linspace(0.0, 1.0, 2))
    latents = np.zeros((1, 1, 16, 28), np.float32)
    found = decode_tiled(lambda each: _enlarged(each) + np.float32(next(constants)), latents, tile=(16, 16), factor=2)
    assert found[0, 0, 0, 0] == 0
    assert found[0, 0, 0, -1] == 1
    assert 0 < np.abs(np.diff(found[0, 0, 5])).max() <= 1 / 4


@pytest.mark.slow
def test_a_pipeline_works_in_tiles_above_a_size():
    pytest.importorskip("transformers")
    pipeline, folder = tiny_pipeline("sd")
    size = {"height": 32, "width": 48, "tile": 24}
    with Engine.build(str(folder), plans=[2], device="cpu", backend="torch", **size) as tiled:
        latents = np.random.default_rng(0).standard_normal((1, 4, 16, 24), np.float32)
        found = tiled.decode(latents)
    assert found.shape == (1, 3, 32, 48)
    own = torch.from_numpy(latents) / pipeline.vae.config.scaling_factor
    with torch.no_grad():  # In the corners there is one tile alone.
        first, last = (
            pipeline.vae.decode(own[part]).sample.numpy().clip(-1, 1)
            for part in (np.s_[..., :12, :12], np.s_[..., 4:, 12:])
        )
    np.testing.assert_allclose(found[..., :8, :8], first[..., :8, :8], atol=tolerances.PIPELINE_LATENTS)
    np.testing.assert_allclose(found[..., -8:, -8:], last[..., -8:, -8:], atol=tolerances.PIPELINE_LATENTS)


def test_nan_is_refused():
    latents = np.zeros((3, 1, 8, 8), np.float32)
    latents[1, 0, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"samples \[1\] of 3"):
        decode_tiled(_enlarged, latents, tile=(8, 8), factor=2)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1, 4, 5), (1, 1, 16), (4, 64, 48)])
def test_noise_is_that_of_torchs_generators(shape):
    seeds = np.array([0, 7, 2**32 + 5, 2**64 - 1], np.uint64)
    noise = TorchNoise(seeds)
    generators = [torch.Generator().manual_seed(int(seed) & 0xFFFFFFFFFFFF) for seed in seeds]
    for _ in range(2):  # The second call continues.
        expected = np.concatenate([torch.randn((1, *shape), generator=each).numpy() for each in generators])
        np.testing.assert_allclose(noise.normals(shape), expected, atol=tolerances.TORCH_NOISE)
    with pytest.raises(InputError, match="16"):
        noise.normals((1, 3, 5))

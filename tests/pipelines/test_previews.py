"""Previews of latents: a linear map that is fitted to the decoder, and a small decoder in its place."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from tiny_pipelines import small_decoder, tiny_pipeline

from skipstep import Engine
from skipstep.backends import onnxruntime
from skipstep.backends.denoiser import Target
from skipstep.errors import InputError, ModelFormatError
from skipstep.pipelines.pictures import fit_preview
from skipstep.pipelines.pipeline import Pipeline
from skipstep.pipelines.spec import SPEC_FILE, read_pipeline_spec

OPTIONS: dict[str, Any] = {"plans": [4], "device": "cpu", "backend": "torch"}


def test_a_linear_decoder_is_found_exactly():
    weights = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)

    def decode(latents):
        pictures = np.einsum("bchw,cd->bdhw", latents, weights[:-1]) + weights[-1][:, None, None]
        return pictures.repeat(4, axis=2).repeat(4, axis=3)

    found = fit_preview(decode, channels=4, tile=(12, 20), factor=4)
    np.testing.assert_allclose(found, weights, atol=1e-5)


def test_previews_of_the_way():
    pytest.importorskip("transformers")
    seen: list[np.ndarray] = []
    with Engine.build(str(tiny_pipeline("sd")[1]), **OPTIONS) as engine:
        call = {"steps": 4, "seeds": [1], "prompt": "a cat"}
        _, trajectory = engine.sample(
            **call, trajectory=True, callback=lambda event: seen.append(engine.preview(event.x0))
        )
        for step, found in enumerate(seen):
            np.testing.assert_array_equal(found, engine.preview(trajectory.x0[step]))
        latents = trajectory.x0[:, 0]
        graph = engine.runner.pipeline._graph("decoder", "pictures", "latents")
        colours = fit_preview(graph, channels=4, tile=(8, 8), factor=2)
        expected = np.einsum("bchw,cd->bdhw", latents, colours[:-1]) + colours[-1][:, None, None]
        np.testing.assert_allclose(engine.preview(latents), expected.clip(-1, 1), atol=1e-5)
        assert engine.preview(latents, output_type="pil")[0].size == (8, 8)
        with pytest.raises(InputError, match="latents of shape"):
            engine.preview(latents[:, :2])


def test_a_small_decoder_is_one_of_the_parts(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = small_decoder()
    small.save_pretrained(tmp_path / "small")
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    folder = str(tiny_pipeline("sd")[1])
    with Engine.build(folder, **OPTIONS, preview=tmp_path / "small") as engine:
        files = dict(engine.runner.pipeline.files())
    with torch.no_grad():
        expected = small.decode(torch.from_numpy(latents)).sample.clip(-1, 1)
    make = partial(onnxruntime.part, target=Target())
    read = Pipeline(read_pipeline_spec(files[SPEC_FILE], 4), files.__getitem__, make)  # As from a bundle.
    np.testing.assert_allclose(read.preview(latents), expected, atol=tolerances.PIPELINE_LATENTS)
    small_decoder(latent_channels=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelFormatError, match="3 latent channels"):
        Engine.build(folder, **OPTIONS, preview=tmp_path / "other")

"""Inversion, edits and interpolation of a pipeline: pictures and prompts in, pictures out, as of latents by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tolerances
from PIL import Image
from tiny_pipelines import tiny_pipeline

from skipstep import Engine
from skipstep.errors import InputError

pytest.importorskip("transformers")
CAT, DOG = {"steps": 4, "prompt": "a cat"}, {"steps": 4, "prompt": "the dog"}


@pytest.fixture(scope="module", params=["sd", pytest.param("xl", marks=pytest.mark.slow)])
def engine(request: Any) -> Iterator[Engine]:
    with Engine.build(str(tiny_pipeline(request.param)[1]), plans=[4], device="cpu", backend="torch") as made:
        yield made


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


def near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerances.BACKENDS_AGREE)


def test_inversion_and_reconstruction(engine, picture):
    latents = engine.encode([picture] * 2)
    noise = engine.invert(latents, **CAT).latents
    near(engine.invert([picture] * 2, **CAT).latents, noise)
    assert np.abs(noise - engine.invert(latents, **DOG).latents).max() > 0.01
    near(engine.reconstruct([picture] * 2, **CAT), engine.sample(x_T=noise, **CAT))
    again = engine.reconstruct(picture, **CAT, guidance_scale=1.5, negative_prompt="red", output_type="pil")
    assert again[0].size == (16, 16)


def test_edits(engine, picture):
    pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    seeds = {"strength": 0.5, "seeds": [1, 2]}
    edited = engine.edit(picture, **DOG, **seeds)
    near(edited, engine.edit(pixels, **DOG, **seeds))
    near(edited, engine.decode(engine.edit(engine.encode(picture), **DOG, **seeds, output_type="latent")))
    plan = engine.select_plan(steps=4).started_at(2)
    engine.add_plan(plan)
    kept = engine.edit(picture, **DOG, strength=0.5, method="invert", source_prompt="a cat")
    noise = engine.invert(picture, plan=plan, prompt="a cat").latents
    near(kept, engine.sample(x_T=noise, plan=plan, prompt="the dog"))
    with pytest.raises(InputError, match="source_prompt with"):
        engine.edit(picture, **DOG, **seeds, source_prompt="a cat")
    with pytest.raises(InputError, match="mask="):
        engine.edit(picture, **DOG, **seeds, mask=picture)


def test_between_pictures(engine, picture):
    done: list[tuple[int, int]] = []
    noise = engine.invert(picture, **CAT).latents[0]
    between = engine.interpolate(picture, 7, 3, **CAT, progress=lambda *given: done.append(given))
    near(between, engine.interpolate(noise, 7, 3, **CAT))
    assert done[-1][0] == done[-1][1]
    assert [each[0] for each in done] == sorted(each[0] for each in done)
    grid = {"rows": 2, "columns": 2, **CAT, "output_type": "pil"}
    corners = engine.interpolate_grid([picture, 7, 8, picture], **grid)
    assert corners[0].size == (16, 16)
    np.testing.assert_array_equal(corners[0], corners[3])

"""Latents and pictures against diffusers' own pipelines of random weights, with the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import tolerances
import torch
from PIL import Image
from tiny_pipelines import compare, generators, tiny_pipeline

from skipstep import Engine

pytest.importorskip("transformers")

PROMPTS = ["a cat", "The red DOG, and\n the cat's", "é 😀 猫"]
SEEDS = [5, 2**40 + 7, 0]


@cache
def engine(name: str, **options: Any) -> Engine:
    kinds = {"plans": [1] if name == "lcm" else [20], "compatibility": None if name == "lcm" else "diffusers"}
    return Engine.build(
        str(tiny_pipeline(name)[1]), batch_sizes=[1, 2], backend="torch", device="cpu", **kinds, **options
    )


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    engine.cache_clear()


def pictures(number: int, size: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(number)]


@pytest.mark.parametrize("name", ["sd", "pixels", pytest.param("xl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("negative", [None, "the dog"])
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_latents_of_prompts(name, scale, negative, batch):
    pipeline, prompts, seeds = tiny_pipeline(name)[0], PROMPTS[-batch:], SEEDS[-batch:]
    found = engine(name).sample(
        prompt=prompts,
        negative_prompt=negative,
        guidance_scale=scale,
        steps=20,
        seeds=seeds,
        noise="torch",
        output_type="latent",
    )
    negatives = None if negative is None else [negative] * batch
    given = {"prompt": prompts, "negative_prompt": negatives, "guidance_scale": scale}
    compare(found, pipeline, seeds, **given)


@pytest.mark.slow
def test_pictures_in_another_size():
    drawn = engine("sd", height=24, width=16).sample(
        prompt=PROMPTS[0], steps=20, seeds=[3], guidance_scale=7.5, noise="torch", output_type="pil"
    )
    call = {"guidance_scale": 7.5, "height": 24, "width": 16, "generator": generators([3])}
    expected = tiny_pipeline("sd")[0](PROMPTS[0], num_inference_steps=20, **call).images
    assert drawn[0].size == expected[0].size == (16, 24)
    off = np.abs(np.asarray(drawn[0], int) - np.asarray(expected[0], int))
    assert np.mean(off <= 1) >= tolerances.PIPELINE_PIXELS
    assert np.asarray(drawn[0]).std() > 10  # Not one colour.


@pytest.mark.slow
def test_a_consistency_models_guidance_is_an_input():
    found = engine("lcm").sample(
        prompt=PROMPTS, guidance_scale=8.5, steps=1, seeds=SEEDS, noise="torch", output_type="latent"
    )
    compare(found, tiny_pipeline("lcm")[0], SEEDS, steps=1, prompt=PROMPTS, guidance_scale=8.5)


@pytest.mark.slow
def test_pictures_of_an_unconditional_pipeline():
    found = engine("ldm").sample(steps=20, seeds=SEEDS, noise="torch")
    call = {"batch_size": 3, "num_inference_steps": 20, "generator": generators(SEEDS), "output_type": "np"}
    expected = tiny_pipeline("ldm")[0](**call).images.transpose(0, 3, 1, 2) * 2 - 1
    # Of a codebook: where two entries are as near, the rounding of the latents decides.
    assert np.mean(np.abs(found - expected) <= 2 / 255) >= tolerances.PIPELINE_PIXELS


def compare_from_pictures(
    name: str, kind: Any, strength: float, inputs: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Latents from pictures, ours with these `inputs` and those of diffusers' pipeline of this kind."""
    given, seeds = pictures(2, (16, 16)), SEEDS[:2]
    call = {"prompt": PROMPTS[:2], "image": given, "strength": strength, "guidance_scale": 7.5}
    found = engine(name).sample(steps=20, seeds=seeds, noise="torch", output_type="latent", **call, **inputs)
    pipeline = kind(**tiny_pipeline(name)[0].components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    compare(found, pipeline, seeds, **call, **theirs)


AT_ENDS = [pytest.param(each, marks=pytest.mark.slow) for each in (0.3, 1.0)]


@pytest.mark.parametrize("strength", [0.62, *AT_ENDS])
def test_image_to_image(strength):
    compare_from_pictures("sd", diffusers.StableDiffusionImg2ImgPipeline, strength, {}, {})


@pytest.mark.parametrize("name", ["sd", pytest.param("inpaint", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_by_the_loop_and_by_a_network_for_it(name, strength):
    mask = Image.fromarray(np.uint8(255) * (np.indices((16, 16)).sum(axis=0) < 13).astype(np.uint8))
    theirs = {"mask_image": [mask] * 2, "height": 16, "width": 16}
    compare_from_pictures(name, diffusers.StableDiffusionInpaintPipeline, strength, {"mask": mask}, theirs)


def test_pictures_to_latents_and_back():
    given, pipeline = pictures(2, (16, 16)), tiny_pipeline("sd")[0]
    latents = engine("sd").encode(given)
    tensor = pipeline.image_processor.preprocess(given)
    with torch.no_grad():
        expected = pipeline.vae.encode(tensor).latent_dist.mean * pipeline.vae.config.scaling_factor
        pixels = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample.clip(-1, 1)
    np.testing.assert_allclose(latents, expected, atol=tolerances.PIPELINE_LATENTS)
    np.testing.assert_allclose(engine("sd").decode(expected), pixels, atol=tolerances.PIPELINE_LATENTS)
    assert engine("sd").decode(latents, output_type="pil")[1].size == (16, 16)


def test_pixels_in_squares_are_the_latents_of_a_pipeline_without_autoencoder():
    given = pictures(2, (16, 16))
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in given])).permute(0, 3, 1, 2) / 127.5 - 1
    latents = engine("pixels").encode(given)
    np.testing.assert_allclose(latents, torch.nn.functional.pixel_unshuffle(pixels, 2), atol=1e-6)
    assert [np.asarray(each).tobytes() for each in engine("pixels").decode(latents, output_type="pil")] == [
        np.asarray(each).tobytes() for each in given
    ]


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_a_picture_is_blended_in_the_background_too(name):
    mask = np.zeros((1, 16, 16), np.float32)
    call = {"prompt": "a cat", "image": pictures(1, (16, 16)), "mask": mask, "steps": 20, "seeds": [1]}
    kept = engine(name).sample_async(**call, output_type="latent").result()
    np.testing.assert_allclose(kept, engine(name).encode(call["image"]), atol=tolerances.PIPELINE_LATENTS)

"""The latent upscaler against diffusers' own pipeline of random weights, with the same noise; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from PIL import Image
from tiny_pipelines import compare, generators, tiny_pipeline

import skipstep
from skipstep import Engine, accelerate
from skipstep.errors import InputError, ModelFormatError, PlanError

pytest.importorskip("transformers")

SEEDS, PROMPTS = [5, 2**40 + 7], ["a cat", "the red DOG"]
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (2, 16, 16, 3), np.uint8)
LATENTS = RNG.standard_normal((2, 4, 8, 8), np.float32)
BUILT: dict[str, Any] = {"plans": [3, 20], "device": "cpu", "backend": "torch", "batch_sizes": [1, 2]}
DRAWN: dict[str, Any] = {"steps": 20, "noise": "torch", "output_type": "latent"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.build(str(tiny_pipeline("upscaler")[1]), **BUILT) as made:
        yield made


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_latents_in_twice_the_size(engine, scale, batch, kind):
    pil, latents = [Image.fromarray(each) for each in PICTURES[:batch]], LATENTS[:batch]
    call = {"prompt": PROMPTS[:batch], "guidance_scale": scale}
    found = engine.sample(image=pil if kind == "pictures" else latents, seeds=SEEDS[:batch], **call, **DRAWN)
    assert found.shape == (batch, 4, 16, 16)
    theirs = pil if kind == "pictures" else torch.from_numpy(latents)
    compare(found, tiny_pipeline("upscaler")[0], SEEDS[:batch], image=theirs, **call)


def test_prompt_and_image_matter(engine):
    call = {"image": LATENTS[:1], "seeds": SEEDS[:1], **DRAWN}
    found = engine.sample(prompt="a cat", **call)
    for other in ({"prompt": "dog"}, {"prompt": "a cat", "image": LATENTS[1]}):
        assert np.abs(engine.sample(**{**call, **other}) - found).max() > 1e-3 * np.abs(found).max()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_levels_and_initial_noise_of_the_other_spacings(spacing, tmp_path):
    pipeline, folder = tiny_pipeline("upscaler")
    # As in files that were converted from another scheduler's, which Euler's rule does not look at.
    said = {"timestep_spacing": spacing, "prediction_type": "original_sample", "set_alpha_to_one": False}
    configure(Path(shutil.copytree(folder, tmp_path / "copy")), **said)
    usual = pipeline.scheduler
    pipeline.scheduler = type(usual).from_config(usual.config, timestep_spacing=spacing)
    call = {"prompt": PROMPTS[0], "guidance_scale": 7.5}
    try:
        with Engine.build(str(tmp_path / "copy"), compatibility="diffusers", **BUILT) as made:
            found = made.sample(image=LATENTS[:1], seeds=[3], **call, **DRAWN)
        compare(found, pipeline, [3], image=torch.from_numpy(LATENTS[:1]), **call)
    finally:
        pipeline.scheduler = usual


@pytest.mark.slow
def test_pictures_of_a_bundle(tmp_path):
    pipeline, folder = tiny_pipeline("upscaler")
    given = Image.fromarray(PICTURES[0])
    with Engine.build(str(folder), **{**BUILT, "plans": [3]}) as made:
        made.save(tmp_path / "bundle", license="none")
    call = {"prompt": PROMPTS[0], "guidance_scale": 7.5, "image": given}
    with skipstep.load(tmp_path / "bundle", compile_on_miss=True) as loaded:
        found = [loaded.sample(steps=n, seeds=[3], noise="torch", output_type="pil", **call)[0] for n in (3, 7)]
    for n, picture in zip((3, 7), found, strict=True):
        expected = pipeline(num_inference_steps=n, generator=generators([3]), **call).images[0]
        assert picture.size == expected.size == (32, 32)
        off = np.abs(np.asarray(picture, int) - np.asarray(expected, int))
        assert np.mean(off <= 1) >= tolerances.PIPELINE_PIXELS


CALLS = {
    "no image": {},
    "mask or strength": {"image": LATENTS, "strength": 0.5},
    "mask or strength for": {"image": LATENTS, "mask": np.ones((1, 1, 16, 16), np.float32)},
    "image of shape": {"image": np.zeros((1, 4, 16, 16), np.float32)},
    "NaN": {"image": np.full_like(LATENTS, np.nan)},
    "conditions=3": {"image": LATENTS, "conditions": 3},
    "3 seeds": {"image": LATENTS, "seeds": [1, 2, 3]},
    "no seeds": {"image": LATENTS, "seeds": None},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_are_refused(engine, message):
    with pytest.raises(InputError, match=message):
        engine.sample(**{"prompt": "a cat", "steps": 3, "seeds": [0], **CALLS[message]})


def configure(folder: Path, file: str = "scheduler/scheduler_config.json", **changes: Any) -> None:
    contents = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(contents))


def test_folders_and_options_that_are_refused(tmp_path):
    pipeline, whole = tiny_pipeline("upscaler")
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    for option in ({"scheduler": str(folder / "scheduler")}, {"schedule": skipstep.NoiseSchedule.linear()}):
        with pytest.raises(InputError, match="for an upscaler"):
            Engine.build(str(folder), **option, **BUILT)
    with pytest.raises(InputError, match="latents of 15 by 16"):
        Engine.build(str(folder), sample_shape=(4, 15, 16), **BUILT)
    with pytest.raises(PlanError, match="edm"):
        Engine.build(
            str(folder), **{**BUILT, "plans": [skipstep.Plan(schedule=skipstep.NoiseSchedule.linear(), steps=3)]}
        )
    with pytest.raises(InputError, match="StableDiffusionLatentUpscalePipeline"):
        accelerate(pipeline, plans=[3])
    configure(folder, prediction_type="epsilon")
    with pytest.raises(ModelFormatError, match="prediction_type='epsilon' for an upscaler"):
        Engine.build(str(folder), **BUILT)
    configure(folder, "unet/config.json", in_channels=9)
    with pytest.raises(ModelFormatError, match="9 channels"):
        Engine.build(str(folder), **BUILT)

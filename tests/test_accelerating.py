"""`skipstep.accelerate`: the calls of diffusers' pipelines, and their results, drawn by an engine."""

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
from tiny_pipelines import tiny_pipeline

import skipstep
from skipstep.errors import EngineStateError, InputError, PlanNotFoundError

pytest.importorskip("transformers")
STEPS = 4


@cache
def pipelines(name: str, kind: str | None = None) -> tuple[Any, Any]:
    """A pipeline of diffusers, and the accelerated one."""
    theirs = tiny_pipeline(name)[0]
    if kind is not None:
        checker = {} if "XL" in kind else {"requires_safety_checker": False}
        theirs = getattr(diffusers, kind)(**theirs.components, **checker)
        theirs.set_progress_bar_config(disable=True)
    return theirs, skipstep.accelerate(theirs, plans=[STEPS], backend="torch", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    pipelines.cache_clear()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def compare(both: tuple[Any, Any], make: Any = dict, **call: Any) -> None:
    """`make` gives what a call changes, such as generators."""
    call = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    expected, found = (pipeline(**call, **make()).images for pipeline in both)
    assert found.dtype == expected.dtype
    assert torch.abs(found - expected).max() <= tolerances.PIPELINE_LATENTS * torch.abs(expected).max()


MASK = Image.fromarray(np.uint8(255) * (np.indices((16, 16)).sum(axis=0) < 13).astype(np.uint8))
TWO = {"prompt": ["a cat", "the dog"], "guidance_scale": 7.5}
PICTURES = {**TWO, "image": [picture(0), picture(1)]}
INPAINTING = {**PICTURES, "mask_image": [MASK] * 2, "height": 16, "width": 16}
SIZES = {"original_size": (20, 16), "crops_coords_top_left": (1, 2), "target_size": (16, 24)}
SIZES |= {"negative_original_size": (4, 5), "negative_target_size": (6, 7)}
CASES = {
    "guidance": ("sd", None, {**TWO, "negative_prompt": ["red", ""], "guidance_rescale": 0.7}),
    "no guidance": ("sd", None, {**TWO, "guidance_scale": 0.5}),
    "several of each prompt": ("sd", None, {**TWO, "num_images_per_prompt": 2}),
    "two prompts and sizes": (
        "xl",
        None,
        {**TWO, "prompt_2": ["a red", "cat"], "negative_prompt": ["", "dog"], "clip_skip": 1, **SIZES},
    ),
    "steps with noise": ("lcm", None, {**TWO, "guidance_scale": 8.5}),
    "image to image": ("sd", "StableDiffusionImg2ImgPipeline", {**PICTURES, "strength": 0.6}),
    "spaced anew": ("lcm", "LatentConsistencyModelImg2ImgPipeline", {**PICTURES, "strength": 0.6}),
    "inpainting by the loop": ("sd", "StableDiffusionInpaintPipeline", {**INPAINTING, "strength": 0.8}),
    "inpainting of XL": ("xl", "StableDiffusionXLInpaintPipeline", INPAINTING),
    "a network for inpainting": ("inpaint", None, INPAINTING),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_are_the_pipelines_own(case):
    name, kind, call = CASES[case]
    count = 2 * call.get("num_images_per_prompt", 1)
    # A generator for all, continued from one call's noise to the next, and one each.
    compare(pipelines(name, kind), lambda: {"generator": generators(3)[0]}, **call)
    compare(pipelines(name, kind), lambda: {"generator": generators(*range(count))}, **call)


def test_the_class_and_the_kinds_of_results():
    theirs, ours = pipelines("sd")
    assert isinstance(ours, diffusers.StableDiffusionPipeline)
    assert type(ours).__name__ == "StableDiffusionPipeline"
    assert ours.unet is theirs.unet
    call = {"prompt": "a cat", "num_inference_steps": STEPS}
    for kind in ("pil", "np", "pt"):
        expected, found = (each(**call, generator=generators(1)[0], output_type=kind) for each in (theirs, ours))
        assert type(found) is type(expected)
        assert type(found.images) is type(expected.images)
        pair = [np.stack([np.asarray(image, float) for image in each.images]) for each in (found, expected)]
        assert np.mean(np.abs(pair[0] - pair[1]) <= (1 if kind == "pil" else 1 / 255)) >= tolerances.PIPELINE_PIXELS
    torch.manual_seed(0)
    images, flagged = ours("a cat", num_inference_steps=STEPS, return_dict=False, output_type="latent")
    torch.manual_seed(0)
    np.testing.assert_array_equal(images, ours(**call, output_type="latent").images)
    assert flagged is None
    latents = torch.randn(1, 4, 8, 8, generator=generators(2)[0])
    compare((theirs, ours), lambda: {"latents": latents.clone()}, prompt="a cat")


def test_a_callback_sees_and_changes_the_latents():
    seen: list[Any] = []

    def callback(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, int(timestep), given["latents"].clone()))
        pipeline._interrupt = step == 2
        return {"latents": given["latents"] * 0.9} if step == 1 else {}

    compare(pipelines("sd"), lambda: {"generator": generators(1)[0]}, prompt="a cat", callback_on_step_end=callback)
    assert len(seen) == 6
    for expected, found in zip(seen[:3], seen[3:], strict=True):
        assert found[:2] == expected[:2]
        torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)


def _edits(name: str) -> Any:
    def callback(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if name == "guidance_scale":
            pipeline._guidance_scale = 2.0
            return {}
        return {name: given[name] + 1.0}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


REFUSED = {
    "cross_attention_kwargs=": {"cross_attention_kwargs": {"scale": 0.5}},
    "ip_adapter_image=": {"ip_adapter_image": picture(0)},
    "timesteps=": {"timesteps": [9, 5]},
    "eta=0.5": {"eta": 0.5},
    "a callback that changes encoder_hidden_states": _edits("prompt_embeds"),
    "a callback that changes guidance_scale": _edits("guidance_scale"),
    "12 by 8 latents": {"height": 24, "width": 16},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_do_is_refused_by_name(message):
    with pytest.raises(InputError, match=message):
        pipelines("sd")[1]("a cat", num_inference_steps=STEPS, **REFUSED[message])


def test_step_counts_that_are_not_held(caplog):
    theirs, ours = pipelines("sd")
    with pytest.raises(PlanNotFoundError, match="num_inference_steps=50") as caught:
        ours("a cat")
    assert "compile_on_miss=True" in caught.value.remedy
    parts = {**theirs.components, "scheduler": diffusers.PNDMScheduler(steps_offset=1)}
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    options = {"backend": "torch", "device": "cpu", "height": 24}
    made = skipstep.accelerate(other, plans=[2], compile_on_miss=True, **options)
    assert "PNDMScheduler" in caplog.text
    assert made("a cat", num_inference_steps=3, output_type="np").images.shape == (1, 24, 16, 3)


def test_what_is_no_such_pipeline_and_what_changed_since():
    ours = pipelines("sd")[1]
    for given in (ours, ours.unet, None):
        with pytest.raises(InputError, match="accelerated already"):
            skipstep.accelerate(given, plans=[2])
    with pytest.raises(InputError, match="height=17"):
        skipstep.accelerate(tiny_pipeline("sd")[0], plans=[2], height=17)
    changed = skipstep.accelerate(tiny_pipeline("sd")[0], plans=[2], backend="torch", device="cpu")
    changed.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(EngineStateError, match="scheduler changed"):
        changed("a cat", num_inference_steps=2)


def test_an_unconditional_pipeline():
    theirs, ours = pipelines("ldm")
    call = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "np"}
    expected, found = (each(**call, generator=generators(1)[0]).images for each in (theirs, ours))
    assert np.mean(np.abs(found - expected) <= 1 / 255) >= tolerances.PIPELINE_PIXELS

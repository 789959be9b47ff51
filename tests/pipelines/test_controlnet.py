"""ControlNets against diffusers' own pipeline: one, two with weights, with and without guidance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import tolerances
import torch
from PIL import Image
from tiny_pipelines import embedded, tiny_pipeline

import skipstep
from skipstep import Engine
from skipstep.errors import InputError, ModelFormatError

pytest.importorskip("transformers")

rng = np.random.default_rng(0)
FIRST, SECOND, THIRD = (Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(3))
SCALES = [0.8, 0.5]


@cache
def engine(nets: int, **options: Any) -> Engine:
    """With one ControlNet of a folder beside a pipeline that has none; with two those of the pipeline's folder."""
    folder = tiny_pipeline("control")[1]
    control = {"controlnet": str(folder / "controlnet_1")} if nets == 1 else {}
    backend = "torch" if nets == 1 else "onnxruntime"
    return Engine.build(
        str(folder), plans=[20], backend=backend, device="cpu", compatibility="diffusers", **control, **options
    )


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    engine.cache_clear()


def of_diffusers(nets: int) -> Any:
    both = tiny_pipeline("control")[0]
    if nets == 2:
        return both
    parts = {**both.components, "controlnet": both.controlnet.nets[1]}
    made = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def check(found: Any, nets: int, **call: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = of_diffusers(nets)(num_inference_steps=20, output_type="latent", generator=generators, **call)
    expected = expected.images.numpy()
    assert np.abs(found - expected).max() <= tolerances.PIPELINE_LATENTS * np.abs(expected).max()


@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_latents_are_those_of_diffusers(nets, scale):
    prompts = ["a cat", "the dog"]
    control: Any = [SECOND, THIRD] if nets == 1 else [[FIRST, SECOND], [SECOND, THIRD]]
    call = {"prompt": prompts, "guidance_scale": scale}
    weights = 0.8 if nets == 1 else SCALES
    drawn = {**call, "steps": 20, "seeds": [5, 6], "noise": "torch", "output_type": "latent"}
    found = engine(nets).sample(control_image=control, controlnet_conditioning_scale=weights, **drawn)
    theirs = control if nets == 1 else [list(each) for each in zip(*control, strict=True)]
    check(found, nets, image=theirs, controlnet_conditioning_scale=weights, **call)
    other = engine(nets).sample(control_image=control, controlnet_conditioning_scale=0, **drawn)
    assert np.abs(found - other).max() > 1e-3


def test_what_follows_from_the_pictures_alone_is_computed_before_the_loop():
    partition = engine(2).source.partition()
    names = {each.name for each in onnx.load_from_string(partition.graphs.step).graph.input}
    assert not {"control_image_0", "control_image_1", "encoder_hidden_states"} & names
    prompt = onnx.load_from_string(partition.graphs.prompt)
    assert {"control_image_0", "control_image_1"} <= {each.name for each in prompt.graph.input}
    assert sum(node.op_type == "Conv" for node in prompt.graph.node) == 2 * 4


def test_a_bundle_and_the_network_alone_draw_the_same(tmp_path):
    call = {"steps": 20, "seeds": [5], "output_type": "latent", "prompt": "a cat"}
    control = {"control_image": [FIRST, SECOND], "controlnet_conditioning_scale": SCALES}
    found = engine(2).sample(**call, **control)
    engine(2).save(tmp_path / "bundle", license="Apache-2.0")
    with skipstep.load(tmp_path / "bundle") as loaded:
        np.testing.assert_array_equal(loaded.sample(**call, **control), found)


@pytest.mark.slow
def test_long_prompts_are_masked_in_the_controlnet_too():
    text = "the red cat and the dog and the cat"
    found = engine(1, prompt_chunks=3).sample(
        prompt=text, control_image=FIRST, steps=20, seeds=[5], noise="torch", output_type="latent"
    )
    embeds = embedded(tiny_pipeline("control")[0], [(text, 1.0)], 2)
    generator = torch.Generator().manual_seed(5)
    call = {"num_inference_steps": 20, "output_type": "latent", "guidance_scale": 1.0, "generator": generator}
    expected = of_diffusers(1)(prompt_embeds=embeds, image=FIRST, **call).images.numpy()
    assert np.abs(found - expected).max() <= tolerances.PIPELINE_LATENTS * np.abs(expected).max()


CALLS: dict[str, dict[str, Any]] = {
    "no control_image": {},
    "1 as control_image": {"control_image": [FIRST]},
    "3 numbers": {"control_image": [FIRST, SECOND], "controlnet_conditioning_scale": [1, 2, 3]},
    "conditioning_scale=nan": {"control_image": [FIRST, SECOND], "controlnet_conditioning_scale": float("nan")},
    "control_image of shape": {"control_image": [np.zeros((3, 8, 8), np.float32)] * 2},
    "control_image twice": {"control_image": [FIRST, SECOND], "conditions": {"control_image_0": 1}},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_contradict_themselves(message):
    with pytest.raises(InputError, match=message):
        engine(2).sample(prompt="a cat", steps=20, seeds=[0], **CALLS[message])


def test_other_folders_are_refused(tmp_path):
    folder = tiny_pipeline("control")[1]
    other = shutil.copytree(folder / "controlnet", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 40}))
    call: dict[str, Any] = {"plans": [2], "backend": "torch", "device": "cpu"}
    with pytest.raises(ModelFormatError, match="cross_attention_dim=40"):
        Engine.build(str(folder), controlnet=[folder / "controlnet", other], **call)
    with pytest.raises(ModelFormatError, match="UNet2DConditionModel"):
        Engine.build(str(folder), controlnet=folder / "unet", **call)
    with pytest.raises(InputError, match="controlnet= beside"):
        Engine.build(torch.nn.Identity(), controlnet=folder / "controlnet", **call)

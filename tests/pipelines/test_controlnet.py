"""ControlNets against diffusers' own pipeline: one, two with weights, with and without guidance."""

from __future__ import annotations

import itertools
import json
import shutil
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tiny_pipelines import LENGTH, compare, embedded, tiny_pipeline

import skipstep
from skipstep import Condition, Engine
from skipstep.commands.main import main
from skipstep.errors import InputError, ModelFormatError
from skipstep.networks.spec import NetworkSpec
from skipstep.pipelines.conditions import read_conditions
from skipstep.pipelines.spec import PipelineSpec

pytest.importorskip("transformers")

PICTURES = [Image.fromarray(each) for each in np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)]
SEEDS = [5, 6]
SCALES = [0.8, 0.5]
PROMPTS = ["a cat", "the dog"]
BUILT: dict[str, Any] = {"plans": [20], "device": "cpu", "compatibility": "diffusers"}
DRAWN: dict[str, Any] = {"steps": 20, "noise": "torch", "output_type": "latent"}


def of_diffusers(nets: int) -> Any:
    both = tiny_pipeline("control")[0]
    if nets == 2:
        return both
    parts = {**both.components, "controlnet": both.controlnet.nets[1]}
    made = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("nets", [1, 2])
def test_a_network_alone_with_controlnets(nets):
    pipeline, folder = tiny_pipeline("control")
    folders = [folder / "controlnet", folder / "controlnet_1"][-nets:]
    options = {"scheduler": folder / "scheduler/scheduler_config.json", "prompt_shape": (LENGTH, 16)}
    pixels = [np.asarray(picture, np.float32).transpose(2, 0, 1) / 255 for picture in PICTURES]
    given = {f"control_image_{i}": np.stack(pixels[i : i + 2]) for i in range(nets)}
    embeds, negative = (
        torch.cat([embedded(pipeline, [(text, 1.0)], 1) for text in texts]) for texts in (PROMPTS, ["", ""])
    )
    with Engine.build(folder / "unet", controlnet=folders, backend="torch", **options, **BUILT) as engine:
        for scale in (1.0, 7.5):
            call = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "guidance_scale": scale}
            conditions = {**given, "controlnet_conditioning_scale": SCALES[:nets]}
            found = engine.sample(seeds=SEEDS, conditions=conditions, **call, **{**DRAWN, "output_type": "np"})
            theirs: Any = PICTURES[:2] if nets == 1 else [list(each) for each in itertools.pairwise(PICTURES)]
            weights = SCALES[0] if nets == 1 else SCALES
            compare(found, of_diffusers(nets), SEEDS, image=theirs, controlnet_conditioning_scale=weights, **call)


@pytest.mark.slow
def test_a_pipelines_folder_with_controlnets(tmp_path):
    folder = tiny_pipeline("control")[1]
    call = {"prompt": "a cat", "guidance_scale": 7.5, "controlnet_conditioning_scale": SCALES}
    with Engine.build(folder, backend="onnxruntime", **BUILT) as engine:
        found = engine.sample(control_image=PICTURES[:2], seeds=SEEDS[:1], **call, **DRAWN)
        partition = engine.source.partition()
        engine.save(tmp_path / "bundle", license="Apache-2.0")
    compare(found, of_diffusers(2), SEEDS[:1], image=PICTURES[:2], **call)
    with skipstep.load(tmp_path / "bundle") as loaded:
        again = loaded.sample(control_image=PICTURES[:2], seeds=SEEDS[:1], **call, **DRAWN)
        other = loaded.sample(control_image=PICTURES[1:], seeds=SEEDS[:1], **call, **DRAWN)
    np.testing.assert_array_equal(again, found)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for picture, file in zip(PICTURES, files, strict=False):
        picture.save(file)
    asked = ["--model", str(tmp_path / "bundle"), "--prompt", "a cat", "--seeds", "5", "--out", str(tmp_path / "a.npz")]
    assert main(["sample", *asked, "--control-image", *files]) == 0
    with skipstep.load(tmp_path / "bundle") as loaded:
        drawn = loaded.sample(prompt="a cat", guidance_scale=7.5, control_image=PICTURES[:2], seeds=[5], steps=20)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["steps_20"], drawn)
    assert np.abs(other - found).max() > 1e-3
    # The pictures are embedded before the loop: each by four convolutions.
    step, prompt = (onnx.load_from_string(each).graph for each in (partition.graphs.step, partition.graphs.prompt))
    assert not {"control_image_0", "control_image_1"} & {each.name for each in step.input}
    assert sum(node.op_type == "Conv" for node in prompt.node) == 2 * 4


@pytest.mark.slow
def test_long_prompts_are_masked_in_a_controlnet_too():
    pipeline, folder = tiny_pipeline("control")
    text = "the red cat and the dog and the cat " * 2
    with Engine.build(folder, controlnet=folder / "controlnet_1", backend="torch", prompt_chunks=3, **BUILT) as engine:
        found = engine.sample(prompt=text, control_image=PICTURES[0], seeds=SEEDS[:1], **DRAWN)
    compare(
        found,
        of_diffusers(1),
        SEEDS[:1],
        prompt_embeds=embedded(pipeline, [(text, 1.0)], 2),
        image=PICTURES[0],
        guidance_scale=1.0,
    )


SPEC = PipelineSpec("StableDiffusionControlNetPipeline", (), 2, 3, (8, 8), False, True)
PICTURE = Condition((3, 16, 16), null="same")
CONTROLS = {f"control_image_{i}": PICTURE for i in (0, 1)} | {
    "controlnet_conditioning_scale": Condition((2,), null="same")
}
CALLS: dict[str, dict[str, Any]] = {
    "no control_image": {},
    "1 as control_image": {"control_image": PICTURES[:1]},
    "3 as controlnet_conditioning_scale": {"control_image": PICTURES[:2], "controlnet_conditioning_scale": [1, 2, 3]},
    "conditioning_scale=nan": {"control_image": PICTURES[:2], "controlnet_conditioning_scale": float("nan")},
    "control_image of shape": {"control_image": [np.zeros((3, 8, 8), np.float32)] * 2},
    "control_image twice": {"control_image": PICTURES[:2], "conditions": {"control_image_0": 1}},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_contradict_themselves(message):
    with pytest.raises(InputError, match=message):
        read_conditions(SPEC, None, NetworkSpec((4, 8, 8), conditions=CONTROLS), CALLS[message])


def test_a_call_without_a_controlnet():
    with pytest.raises(InputError, match="without a ControlNet"):
        read_conditions(SPEC, None, NetworkSpec((4, 8, 8)), {"control_image": PICTURES[0]})


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
    for model, given in (
        (torch.nn.Identity(), {"controlnet": folder / "controlnet"}),
        (tiny_pipeline("control")[0], {}),
    ):
        with pytest.raises(InputError, match="a ControlNet beside a"):
            Engine.build(model, **given, **call)

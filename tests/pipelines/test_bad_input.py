"""Folders with something missing, sizes that do not divide, calls that contradict themselves, broken weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_pipeline

from skipstep import Engine
from skipstep.errors import InputError, ModelFormatError, NonFiniteError, UnsafeCheckpointError

pytest.importorskip("transformers")


def build(folder: Path, **options: Any) -> Engine:
    return Engine.build(str(folder), plans=[2], device="cpu", backend="torch", **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_pipeline("sd")[1], tmp_path / "sd"))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with build(tiny_pipeline("sd")[1]) as made:
        yield made


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named_and_the_network_alone_can_be_built(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ModelFormatError, match=f"without {part} ") as caught:
        build(folder)
    assert str(folder / "unet") in caught.value.remedy
    with build(folder / "unet", scheduler=str(folder / "scheduler" / "scheduler_config.json")) as alone:
        prompts = np.zeros((1, 77, 16), np.float32)
        assert alone.sample(steps=2, seeds=[0], prompt_embeds=prompts).shape == (1, 4, 8, 8)
        with pytest.raises(InputError, match="a network alone"):
            alone.sample(steps=2, seeds=[0], prompt="a cat")


def test_a_network_of_latents_without_an_autoencoder_is_refused(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    with pytest.raises(ModelFormatError, match="4 channels in a pipeline without a vae") as caught:
        build(folder)
    assert str(folder / "unet") in caught.value.remedy


def test_parts_of_other_kinds_are_refused(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["transformers", "T5EncoderModel"]}))
    with pytest.raises(ModelFormatError, match="T5EncoderModel"):
        build(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeCheckpointError, match="pickle"):
        build(folder)


@pytest.mark.parametrize(
    ("size", "near"), [({"height": 17}, 16), ({"width": 18}, 16), ({"height": 27, "width": 16}, 28)]
)
def test_sizes_that_do_not_divide(size, near):
    with pytest.raises(InputError, match="a multiple of 4") as caught:
        build(tiny_pipeline("sd")[1], **size)
    assert caught.value.remedy.endswith(f"={near}")


def test_nan_from_the_autoencoder_is_said(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"] = torch.full_like(weights["decoder.conv_out.bias"], torch.nan)
    save_file(weights, path)
    with pytest.raises(NonFiniteError, match="decoder"):
        build(folder)


PICTURE = np.zeros((1, 3, 16, 16), np.float32)
CALLS = {
    "without image": {"prompt": "a cat", "strength": 0.5},
    "values outside": {"prompt": "a cat", "image": PICTURE + 7},
    "image of shape": {"prompt": "a cat", "image": PICTURE[..., :9]},
    "leaves none": {"prompt": "a cat", "image": PICTURE, "strength": 0.1},
    "strength=0": {"prompt": "a cat", "image": PICTURE, "strength": 0},
    "beside prompt_embeds": {"prompt": "a cat", "prompt_embeds": np.zeros((1, 12, 16), np.float32)},
    "negative_prompt without prompt": {"negative_prompt": "a cat"},
    "prompt=3": {"prompt": 3},
    "noise='ours'": {"prompt": "a cat", "noise": "ours"},
    "beside x_T": {"prompt": "a cat", "noise": "torch", "x_T": np.zeros((1, 4, 8, 8), np.float32)},
    "3 images, 2 prompts": {"prompt": ["a", "b"], "image": np.repeat(PICTURE, 3, axis=0)},
    "same number of each": {"prompt": ["a", "b"], "seeds": [1, 2, 3]},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_contradict_themselves(engine, message):
    with pytest.raises(InputError, match=message):
        engine.sample(**{"steps": 2, "seeds": [0], **CALLS[message]})


def test_an_unconditional_pipeline_reads_no_prompts():
    with build(tiny_pipeline("ldm")[1]) as made, pytest.raises(InputError, match="LDMPipeline"):
        made.sample(prompt="a cat", steps=2, seeds=[0])

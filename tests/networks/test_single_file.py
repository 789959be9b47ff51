"""Single weight files: in diffusers' layout beside their configuration, and in the original one with config=."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from onnx_files import text_unet
from original_layout import original_names
from safetensors.torch import load_file, save_file
from tiny_networks import tiny_unet

from skipstep import Engine
from skipstep.errors import InputError, ModelFormatError, UnsafeCheckpointError
from skipstep.networks.checkpoint import load_unet, read_checkpoint

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def family(tmp_path):
    """A pipeline's folder without weights, as config= wants it."""
    folder = tmp_path / "family"
    text_unet().save_config(folder / "unet")
    diffusers.DDIMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def original(tmp_path):
    file = tmp_path / "original.safetensors"
    tensors = original_names(text_unet().state_dict(), layers=1, attention_above=True)
    # What else a pipeline's file holds.
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(3)
    save_file(tensors, file)
    return file


@pytest.fixture
def no_network(monkeypatch):
    def refused(*arguments):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)


def test_the_original_layout(original, family, no_network):
    checkpoint = read_checkpoint(original, config=family)
    assert (checkpoint.name, checkpoint.prompt_shape, checkpoint.sample_shape) == ("original", (77, 6), (2, 8, 8))
    assert checkpoint.scheduler.prediction_type == "v_prediction"
    loaded, expected = load_unet(checkpoint).state_dict(), text_unet().state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_an_engine_of_the_original_layout_draws_the_same_samples(original, family, tmp_path):
    text_unet().save_pretrained(family / "unet")
    with (
        Engine.build(original, config=family, plans=[3], backend="torch", device="cpu") as engine,
        Engine.build(family, plans=[3], backend="torch", device="cpu") as same,
    ):
        call = {"steps": 3, "seeds": 1, "prompt_embeds": np.ones((1, 77, 6), np.float32)}
        np.testing.assert_array_equal(engine.sample(**call), same.sample(**call))


def test_without_a_configuration_the_remedy_names_it(original, family):
    with pytest.raises(ModelFormatError, match="config=") as caught:
        Engine.build(original, plans=[3])
    assert "nothing is downloaded" in caught.value.remedy
    Engine.build(original, plans=[3], config=family, backend="torch", device="cpu").close()


@pytest.mark.parametrize("lost", ["time_embed.0.bias", "input_blocks.1.0.in_layers.0.weight", "out.2.weight"])
def test_a_missing_tensor_is_no_random_weight(original, family, lost):
    tensors = load_file(original)
    del tensors["model.diffusion_model." + lost]
    # As many numbers as before.
    tensors["filler"] = torch.zeros(1 << 12)
    save_file(tensors, original)
    with pytest.raises(ModelFormatError, match=r"original\.safetensors"):
        load_unet(read_checkpoint(original, config=family))


def test_a_configuration_of_a_larger_model_is_refused_before_it_is_built(original, family):
    path = family / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [8, 4096]}))
    with pytest.raises(ModelFormatError, match="numbers where the configuration needs"):
        load_unet(read_checkpoint(original, config=family))


def test_a_file_in_diffusers_layout(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    checkpoint = read_checkpoint(tmp_path / WEIGHTS)
    assert checkpoint.name == "diffusion_pytorch_model"
    assert torch.equal(load_unet(checkpoint).conv_in.weight, tiny_unet().conv_in.weight)
    moved = tmp_path / "weights.safetensors"
    shutil.move(tmp_path / WEIGHTS, moved)
    load_unet(read_checkpoint(moved, config=tmp_path))
    load_unet(read_checkpoint(moved, config=tmp_path / "unet"))


def test_what_is_no_weight_file(tmp_path):
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"x": torch.ones(2)}}, pickled)
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_checkpoint(pickled)
    exec(caught.value.remedy.split("python -c ", 1)[1].strip('"'))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], torch.ones(2))
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ModelFormatError, match=r"notes\.txt"):
        read_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(ModelFormatError, match="no file"):
        read_checkpoint(tmp_path / "missing.safetensors")
    tiny_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="leave config out"):
        read_checkpoint(tmp_path, config=tmp_path)

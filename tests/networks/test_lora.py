"""LoRA files of every layout against W + scale · alpha / rank · up · down, and files that do not fit."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from lora_files import LAYOUTS, factors_of, share, updated, write_lora
from safetensors.torch import load_file, save_file
from tiny_pipelines import unet

from skipstep.errors import InputError, ModelFormatError
from skipstep.networks.lora import fit, named, read_loras
from skipstep.networks.lora_layers import Loras, fuse, layers_of


@cache
def network() -> Any:
    torch.manual_seed(0)
    return unet()


def layers() -> Any:
    return named({path: tuple(each.weight.shape) for path, each in layers_of(network()).items()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_add_what_the_formula_says(layout, tmp_path):
    def wanted(path: str) -> bool:  # The oldest layout has attention alone; the others also convolutions.
        return "attn" in path if layout == "processors" else "time_emb" not in path

    one, two = factors_of(network(), 4, 1, wanted), factors_of(network(), 2, 2)
    files = [
        write_lora(tmp_path / "a.safetensors", {"unet": one}, layout),
        write_lora(tmp_path / "b.safetensors", {"unet": two}),
    ]
    made = copy.deepcopy(network())
    Loras(read_loras([(files[0], 0.8), (files[1], -0.5)])).apply("unet", made, "network")
    for path, layer in layers_of(network()).items():
        pairs = [(0.8 * share(layout, 4), *one[path])] if path in one else []
        pairs += [(-0.5 * share("peft", 2), *two[path])] if path in two else []
        found = layers_of(made)[path].weight
        torch.testing.assert_close(found.double(), updated(layer.weight, pairs), rtol=0, atol=1e-5)
        assert bool(pairs) != torch.equal(found, layer.weight)


def test_a_convolution_is_two_in_a_row(tmp_path):
    layer = torch.nn.Conv2d(6, 5, 3, padding=1, stride=2)
    (down, up) = factors_of(torch.nn.ModuleDict({"conv": layer}), 2, 0, lambda path: True)["conv"]
    file = write_lora(tmp_path / "a.safetensors", {"unet": {"conv": (down, up)}}, "kohya")
    x = torch.randn(2, 6, 8, 8)
    expected = layer(x) + 1.5 * 3 / 2 * torch.conv2d(torch.conv2d(x, down, stride=2, padding=1), up)
    fuse(torch.nn.ModuleDict({"conv": layer}), fit(read_loras([(file, 1.5)]), "unet", named({"conv": (5, 6, 3, 3)})))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_names_of_the_original_code_are_those_that_diffusers_translates():
    from diffusers.loaders import lora_conversion_utils as theirs

    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 96),
            cross_attention_dim=16,
            transformer_layers_per_block=(1, 2, 3),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            use_linear_projection=True,
        )
    layers = layers_of(network)
    names = named({path: tuple(each.weight.shape) for path, each in layers.items()})
    original = {name: path for name, (path, _) in names.items() if name != path.replace(".", "_")}
    assert sorted(original.values()) == sorted(layers), "each has one name in the original code"
    for name, path in original.items():
        given = {f"lora_unet_{name}.{end}": torch.zeros(1) for end in ("lora_down.weight", "lora_up.weight", "alpha")}
        mapped = theirs._maybe_map_sgm_blocks_to_diffusers(given, network.config)
        found = theirs._convert_non_diffusers_lora_to_diffusers(mapped)[0]
        paths = {key.rpartition(".down.")[0].removesuffix("lora").rstrip("._") for key in found}
        assert f"unet.{path}" in {each.replace(".processor", "") + end for each in paths for end in ("", ".0")}, name


def test_diffusers_with_peft_fuses_the_same(tmp_path):
    pytest.importorskip("peft")
    from tiny_pipelines import tiny_pipeline

    pipeline = tiny_pipeline("sd")[0]
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    plain = {name: copy.deepcopy(each) for name, each in parts.items()}
    for layout in ("peft", "kohya"):
        factors = {name: factors_of(each, 4, 1) for name, each in plain.items()}
        file = write_lora(tmp_path / f"{layout}.safetensors", factors, layout)
        pipeline.load_lora_weights(file)
        pipeline.fuse_lora(lora_scale=0.7)
        loras = Loras(read_loras([(file, 0.7)]))
        for name in parts:
            made = copy.deepcopy(plain[name])
            loras.apply(name, made, "encoder")
            for path, layer in layers_of(made).items():
                theirs = parts[name].get_submodule(path)
                theirs = getattr(theirs, "base_layer", theirs).weight
                torch.testing.assert_close(layer.weight, theirs, rtol=0, atol=1e-6)
                changed = not torch.equal(layer.weight, plain[name].get_submodule(path).weight)
                assert changed == (path in factors[name])
        pipeline.unfuse_lora()
        pipeline.unload_lora_weights()


def test_a_lora_for_another_network_says_which_keys_do_not_fit(tmp_path):
    other = unet(cross_attention_dim=24)
    file = write_lora(tmp_path / "a.safetensors", {"unet": factors_of(other, 2, 0)})
    with pytest.raises(
        InputError, match=r"of \d+ layers of the unet that it updates 8 are of another shape .*attn2"
    ) as caught:
        fit(read_loras([file]), "unet", layers())
    assert "(16, 24) for" in caught.value.got
    tensors = {f"unet.elsewhere.{i}.lora_{end}.weight": torch.ones(1, 1) for i in range(5) for end in "AB"}
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"of 5 layers .* 5 are not there \(unet\.elsewhere"):
        fit(read_loras([file]), "unet", layers())


BAD = {
    "no factor of a LoRA": lambda good: {**good, "unet.x.dora_scale": torch.ones(1)},
    "one factor alone": lambda good: dict(list(good.items())[:1]),
    "NaN": lambda good: {name: each * np.nan for name, each in good.items()},
    "without any LoRA": lambda good: {},
}


@pytest.mark.parametrize("message", BAD)
def test_files_that_are_no_lora(message, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", {"unet": factors_of(network(), 2, 0)})
    save_file(BAD[message](load_file(file)), file)
    with pytest.raises(ModelFormatError, match=message):
        read_loras([file])


def test_arguments_that_are_no_list_of_files(tmp_path):
    pickled = tmp_path / "a.pt"
    pickled.write_bytes(pickle.dumps({}))
    for given, message in (([pickled], "pickles"), ([Path("missing.safetensors")], "missing")):
        with pytest.raises(ModelFormatError, match=message):
            read_loras(given)
    for given in ("a.safetensors", [("a", 1, 2)], [("a", "b")], [3], [("a", float("nan"))]):
        with pytest.raises(InputError):
            read_loras(given)

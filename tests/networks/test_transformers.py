"""Transformers of diffusers: folders and pipelines of DiT, and what is refused by name before weights are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from condition_families import FAMILIES, transformer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
)

from skipstep import Condition, Engine
from skipstep.backends.module_call import ModuleCall
from skipstep.errors import InputError, ModelFormatError
from skipstep.networks.checkpoint import read_checkpoint
from skipstep.networks.spec import NetworkSpec
from skipstep.opening import open_model

SCALE = 4.0


@pytest.fixture
def pipeline():
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    return DiTPipeline(FAMILIES["DiT"].network(), vae, DDIMScheduler(clip_sample=False))


@torch.inference_mode()
def its_own_loop(pipeline, labels, x):
    """As DiTPipeline calls its network: both halves at once, the null label 10, guidance of the predicted noise."""
    pipeline.scheduler.set_timesteps(4)
    both = torch.tensor([*labels, *[10] * len(labels)])
    for t in pipeline.scheduler.timesteps:
        eps = pipeline.transformer(torch.cat([x, x]).float(), t.expand(len(both)), both).sample[:, :4].double()
        conditional, unconditional = eps.chunk(2)
        x = pipeline.scheduler.step(unconditional + SCALE * (conditional - unconditional), t, x).prev_sample
    return x.numpy()


def test_a_pipelines_folder_draws_what_its_own_loop_draws(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    names = {str(i): f"name {i}" for i in range(10)}  # DiTPipeline reads them from there, and does not write them.
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.class_name, checkpoint.num_classes, checkpoint.null_label) == ("DiTTransformer2DModel", 10, 10)
    x_T = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = its_own_loop(pipeline, [3, 7], x_T)
    options = {"plans": [4], "device": "cpu", "batch_sizes": [2]}
    for model in (tmp_path, tmp_path / "transformer", pipeline):
        scheduler = {"scheduler": pipeline.scheduler} if model == tmp_path / "transformer" else {}
        with Engine.build(model, backend="torch", **options, **scheduler) as engine:
            drawn = engine.sample(steps=4, x_T=x_T.float(), class_labels=[3, 7], guidance_scale=SCALE)
            assert engine.network.learns_variance
            assert engine.network.fractional_timesteps
        assert np.abs(drawn - expected).max() < 1e-5 * np.abs(expected).max()
    assert open_model(tmp_path).network.class_names == tuple(names.values())
    index.write_text(json.dumps({"id2label": {"0": "one name"}}))
    with pytest.raises(ModelFormatError, match="1 class names"):
        open_model(tmp_path)


def test_prompts_of_pixart(tmp_path):
    network = transformer(PixArtTransformer2DModel, cross_attention_dim=24, caption_channels=32)
    network.save_pretrained(tmp_path / "transformer")
    found = open_model(tmp_path).network
    assert (found.prompt_shape, dict(found.conditions), found.num_classes) == ((120, 32), {}, None)
    assert open_model(tmp_path, prompt_shape=(300, 32)).network.prompt_shape == (300, 32)
    with pytest.raises(InputError, match=r"prompt_shape=\(77, 32\)"):
        NetworkSpec.of_module(network)


CONFIGS = {
    "SD3Transformer2DModel": {},
    "FluxTransformer2DModel": {},
    "WanTransformer3DModel": {},
    "Transformer2DModel": {"norm_type": "layer_norm", "patch_size": None},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_others_are_refused_by_name_before_the_weights_are_looked_for(name, tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": name, **CONFIGS[name]}))
    with pytest.raises(ModelFormatError, match=f"{name}.*wrap it in a module"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: SD3Transformer2DModel(
                sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16
            ),
            "one joint sequence",
        ),
        (
            lambda: FluxTransformer2DModel(
                num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(2, 2, 4)
            ),
            "rotary tables",
        ),
        (
            lambda: Transformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=4, norm_num_groups=2, sample_size=8
            ),
            "norm_type='layer_norm'",
        ),
    ],
)
def test_loaded_ones_are_refused_by_name(made, said):
    with pytest.raises(ModelFormatError, match=said):
        open_model(made())


class Late(torch.nn.Module):
    def forward(self, hidden, context=None, timestep=None, **rest):
        return hidden * timestep.view(-1, 1) + (0 if context is None else context) + rest.get("shift", 0)


def test_a_timestep_that_comes_later_goes_by_its_name():
    x, t = torch.ones(2, 3), torch.tensor([2.0, 3.0])
    for names, values, expected in (((), (), 2.0), (("context", "shift"), (x, 5 * x), 8.0)):
        call = ModuleCall.of(Late(), dict.fromkeys(names, Condition((3,))))
        arguments, keywords = call.arranged(x, t, values)
        assert Late()(*arguments, **keywords)[0, 0] == expected

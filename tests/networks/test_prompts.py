"""Text-conditional networks: prompts in, guidance against negative ones, keys and values computed once per call."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler
from engines import build
from tiny_networks import tiny_text_unet
from tolerances import BACKENDS_AGREE, DIFFUSERS_LOOP

from skipstep import Engine, NoiseSchedule, Plan, load
from skipstep.errors import InputError
from skipstep.export.graph_cost import partition_costs
from skipstep.networks.graphs import Binding

SCHEDULE = NoiseSchedule.scaled_linear()
PLAN = Plan(schedule=SCHEDULE, steps=4, convention="paper", spacing="leading")
TOKENS, WIDTH = 7, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_text_unet().save_pretrained(folder / "unet")
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False).save_pretrained(
        folder / "scheduler"
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": TOKENS}))
    return folder


@pytest.fixture(scope="module", params=["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def engine(request, folder):
    return build(folder, plans=[PLAN, 3], batch_sizes=[1, 3], backend=request.param)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return rng.standard_normal((3, TOKENS, WIDTH), dtype=np.float32), rng.standard_normal((TOKENS, WIDTH), np.float32)


def test_the_folder_says_what_a_prompt_is(engine):
    assert engine.network.prompt_shape == (TOKENS, WIDTH)
    assert engine.network.can_guide
    assert f"prompts of {TOKENS}×{WIDTH}, with guidance" in engine.describe()


def test_draws_what_diffusers_draws_with_guidance(engine, prompts):
    """The loop of a text-to-image pipeline, written out with diffusers' own scheduler."""
    positive, negative = prompts
    unet = tiny_text_unet()
    scheduler = DDIMScheduler.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    )
    scheduler.set_timesteps(4)
    x_T = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x_T
    states = torch.from_numpy(np.concatenate([positive, np.broadcast_to(negative, positive.shape)]))
    with torch.inference_mode():
        for t in scheduler.timesteps:
            conditional, unconditional = unet(torch.cat([x, x]), t, states).sample.chunk(2)
            x = scheduler.step(unconditional + 7.5 * (conditional - unconditional), t, x).prev_sample
    drawn = engine.sample(
        plan=PLAN, x_T=x_T, prompt_embeds=positive, negative_prompt_embeds=negative, guidance_scale=7.5
    )
    assert np.linalg.norm(drawn - x.numpy()) < 4 * DIFFUSERS_LOOP * np.linalg.norm(drawn)


def test_a_sample_does_not_depend_on_the_prompts_beside_it(engine, prompts):
    positive, negative = prompts
    guided = {"negative_prompt_embeds": negative, "guidance_scale": 3.0}
    together = engine.sample(plan=PLAN, seeds=[1, 2, 3], prompt_embeds=positive, **guided)
    for i in range(3):
        alone = engine.sample(plan=PLAN, seeds=i + 1, prompt_embeds=positive[i], **guided)
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=BACKENDS_AGREE)
    shared = engine.sample(plan=PLAN, seeds=[1, 2, 3], prompt_embeds=positive[0], **guided)
    np.testing.assert_allclose(shared[0], together[0], rtol=0, atol=BACKENDS_AGREE)
    assert np.abs(shared[1] - together[1]).max() > 10 * BACKENDS_AGREE


def test_latents_are_found_again(engine, prompts):
    images = engine.sample(plan=PLAN, seeds=[1], prompt_embeds=prompts[0][0])
    again = engine.reconstruct(images, plan=PLAN, prompt_embeds=prompts[0][0], refinements=8)
    assert np.abs(again - images).max() < 0.05 * np.abs(images).max()


@pytest.mark.slow
def test_keys_and_values_leave_the_loop(folder):
    engine = build(folder, plans=[PLAN], backend="onnxruntime")
    parts = engine.source.partition()
    state = tiny_text_unet().state_dict()
    keys_and_values = [name for name in state if ".attn2.to_k." in name or ".attn2.to_v." in name]
    assert len(parts.crossing[Binding.PROMPT]) == len(keys_and_values) > 0
    assert partition_costs(parts)["prompt"].weight_bytes >= 4 * sum(state[name].numel() for name in keys_and_values)
    left = onnx.load_from_string(parts.graphs.step).graph.initializer
    assert not any(WIDTH in tensor.dims for tensor in left)


@pytest.mark.slow
def test_a_bundle_takes_prompts(folder, prompts, tmp_path):
    engine = build(folder, plans=[PLAN], backend="onnxruntime")
    engine.save(tmp_path / "bundle", license="MIT")
    conditions = {"prompt_embeds": prompts[0][:1], "negative_prompt_embeds": prompts[1], "guidance_scale": 5.0}
    np.testing.assert_array_equal(
        load(tmp_path / "bundle").sample(plan=PLAN, seeds=3, **conditions),
        engine.sample(plan=PLAN, seeds=3, **conditions),
    )


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({}, "no prompt_embeds"),
        (
            {"prompt_embeds": np.zeros((1, TOKENS, WIDTH), np.float32), "guidance_scale": 2.0},
            "no negative_prompt_embeds",
        ),
        ({"prompt_embeds": np.zeros((1, TOKENS + 1, WIDTH), np.float32)}, r"\[1, 8, 24\]"),
        ({"prompt_embeds": np.zeros((0, TOKENS, WIDTH), np.float32)}, r"\[0, 7, 24\]"),
        ({"prompt_embeds": np.full((1, TOKENS, WIDTH), np.nan, np.float32)}, "NaN"),
        ({"prompt_embeds": "a cat"}, "prompt_embeds of type str"),
        ({"prompt_embeds": np.zeros((2, TOKENS, WIDTH), np.float32)}, "2 prompt_embeds"),
        ({"prompt_embeds": np.zeros((1, TOKENS, WIDTH), np.float32), "class_labels": 1}, "unconditional network"),
    ],
)
def test_bad_prompts_are_refused(engine, conditions, said):
    with pytest.raises(InputError, match=said):
        engine.sample(plan=PLAN, seeds=[1, 2, 3], **conditions)


def test_prompts_for_another_network_are_refused():
    from tiny_networks import tiny_unet

    engine = build(tiny_unet(), plans=[3])
    with pytest.raises(InputError, match="a network without prompts"):
        engine.sample(steps=3, seeds=1, prompt_embeds=np.zeros((1, TOKENS, WIDTH), np.float32))


def test_a_module_needs_the_number_of_tokens():
    with pytest.raises(InputError, match="unknown number of tokens") as caught:
        Engine.build(tiny_text_unet(), plans=[3], schedule=SCHEDULE)
    assert "prompt_shape=(77, 24)" in caught.value.remedy


def test_conditions_that_no_configuration_describes_are_asked_for(tmp_path):
    tiny_text_unet().save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "addition_embed_type": "text_image"}))
    with pytest.raises(InputError, match="addition_embed_type='text_image'"):
        Engine.build(tmp_path, plans=[3], schedule=SCHEDULE)

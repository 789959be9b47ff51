"""Conditions that are missing, unknown, of another shape or for half of a guided batch: errors that say what to do."""

from __future__ import annotations

import numpy as np
import pytest
from condition_families import FAMILIES, NEGATIVE, PLAN, PROMPT, PROMPTS, TEXT, rows
from engines import build
from family_loops import assert_drawn, engine_of
from tiny_networks import tiny_text_unet

from skipstep import Condition
from skipstep.errors import InputError, SkipstepError

SDXL = {**FAMILIES["SDXL"].given}


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ({"text_embeds": None}, {}, r"no conditions\['text_embeds'\]"),
        ({"time_ids": None}, {}, r"no conditions\['time_ids'\]"),
        (
            {"text_embed": rows(20)},
            {},
            r"conditions\['text_embed'\]; expected one of encoder_hidden_states, text_embeds",
        ),
        ({"text_embeds": rows(21)}, {}, r"of shape \[2, 21\]; expected \[B, 20\]"),
        ({"text_embeds": rows(20, count=3)}, {}, r"3 conditions\['text_embeds'\]"),
        ({"text_embeds": "a cat"}, {}, r"conditions\['text_embeds'\] of type str"),
        ({"text_embeds": np.full((2, 20), np.nan, np.float32)}, {}, "NaN"),
        ({"class_labels": 1}, {}, "class_labels=1 for an unconditional network"),
        ({}, {"prompt_embeds": rows(*PROMPT)}, "encoder_hidden_states twice"),
        ({}, {"conditions": [rows(20)]}, r"conditions=\["),
        ({}, {"guidance_scale": 2.0}, "no negative_prompt_embeds beside guidance_scale"),
        (
            {},
            {"guidance_scale": 2.0, "negative_conditions": NEGATIVE},
            r"no negative_conditions\['text_embeds'\] beside guidance_scale",
        ),
        ({}, {"negative_conditions": {"size": 1}}, r"negative_conditions\['size'\]"),
    ],
)
def test_bad_conditions_are_refused_before_anything_is_drawn(change, more, said):
    call = {"conditions": {**SDXL, **change}, **more}
    with pytest.raises(InputError, match=said):
        engine_of("SDXL", "torch").sample(plan=PLAN, seeds=[1, 2], **call)


def test_the_guidance_scale_of_a_distilled_network_is_no_condition_of_a_caller():
    engine = engine_of("LCM", "torch")
    with pytest.raises(InputError, match="timestep_cond") as caught:
        engine.sample(plan=PLAN, seeds=1, conditions={**PROMPTS, "timestep_cond": rows(16)})
    assert "guidance_scale" in caught.value.remedy
    with pytest.raises(InputError, match="guidance_rescale"):
        engine.sample(plan=PLAN, seeds=[1, 2], conditions=PROMPTS, guidance_scale=2.0, guidance_rescale=0.7)
    # Every sample has a scale of its own, and the network is evaluated once.
    together = engine.sample(plan=PLAN, seeds=[1, 2], conditions=PROMPTS, guidance_scale=[1.5, 8.0])
    for sample, scale in enumerate((1.5, 8.0)):
        alone = engine.sample(plan=PLAN, seeds=[1, 2], conditions=PROMPTS, guidance_scale=scale)
        assert_drawn(together[sample], alone[sample])


@pytest.mark.parametrize(
    ("network", "options", "said"),
    [
        ({"in_channels": 9}, {}, "reads 9 channels and predicts 4"),
        ({"in_channels": 3}, {}, "predicts 4 channels for a state of 3"),
        ({}, {"conditions": {"hint": Condition((3,))}}, "does not read: hint"),
        ({"in_channels": 5}, {"conditions": {"mask": Condition((1, 4, 4), concat_to_state=True)}}, "concatenated to"),
        ({}, {"conditions": {"sample": Condition()}}, "called 'sample'"),
        ({}, {"conditions": {"mid_block_additional_residual": (32, 4, 4)}}, "skipstep.Condition"),
        ({}, {"conditions": {"down_block_additional_residuals_1": Condition((16, 8, 8))}}, "residuals_0 to"),
        ({}, {"conditions": "text_embeds"}, "conditions='text_embeds'"),
    ],
)
def test_conditions_that_do_not_fit_the_network_are_refused(network, options, said):
    with pytest.raises(InputError, match=said) as caught:
        build(tiny_text_unet(**network), plans=[3], **TEXT, **options)
    if "in the order" in caught.value.remedy:  # It is followed to the letter.
        code = caught.value.remedy.removeprefix("pass conditions=").split(", in the order")[0]
        conditions = eval(code, {"Condition": Condition})
        build(tiny_text_unet(**network), plans=[3], **TEXT, conditions=conditions).close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (0,)},
        {"shape": 5},
        {"dtype": "float16"},
        {"dtype": ["bool"]},
        {"null": "none"},
        {"null": float("nan")},
        {"null": True},
        {"null": 0.5, "dtype": "int64"},
        {"concat_to_state": True},
        {"from_guidance": "embedding"},
        {"from_guidance": "scale", "shape": (3,)},
        {"from_guidance": "yes", "shape": (8,)},
    ],
)
def test_a_condition_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(SkipstepError, match="Remedy"):
        Condition(**wrong)

"""Prompts with weights and of several chunks, against transformers and diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_pipelines import LENGTH, compare, embedded, tiny_pipeline

from skipstep import Engine
from skipstep.errors import InputError
from skipstep.pipelines.prompts import weighted_sections

pytest.importorskip("transformers")

READ = {
    "": [[]],
    "a cat": [[("a cat", 1.0)]],
    "a (cat:1.0), \\(the \\[dog\\]\\\\": [[("a cat, (the [dog]\\", 1.0)]],
    "a (cat) [and] a (dog:0.5)": [
        [("a ", 1.0), ("cat", 1.1), (" ", 1.0), ("and", 1 / 1.1), (" a ", 1.0), ("dog", 0.5)]
    ],
    "(the)(cat)": [[("thecat", 1.1)]],
    "((the) cat:2)": [[("the", 2.2), (" cat", 2.0)]],
    "(the [cat": [[("the ", 1.1), ("cat", 1.1 / 1.1)]],
    "the) cat] :1.3) (dog:x)": [[("the) cat] :1.3) ", 1.0), ("dog:x", 1.1)]],
    "(cat : -0.5 ) (dog:.5)": [[("cat ", -0.5), (" ", 1.0), ("dog", 0.5)]],
    "cat BREAK (dog BREAK:2) BREAKS\\x": [[("cat", 1.0)], [("", 1.0), ("dog", 2.0)], [("", 2.0), (" BREAKS\\x", 1.0)]],
}


@pytest.mark.parametrize("prompt", READ)
def test_brackets_are_weights(prompt):
    found, expected = weighted_sections(prompt), READ[prompt]
    assert [[text for text, _ in each] for each in found] == [[text for text, _ in each] for each in expected]
    assert [w for each in found for _, w in each] == pytest.approx([w for each in expected for _, w in each])


@pytest.mark.parametrize("prompt", ["(" * 65 + "cat", "(cat:1001)", "((cat:900):900)", "(cat:" + "9" * 400 + ")"])
def test_weights_that_no_prompt_has_are_refused(prompt):
    with pytest.raises(InputError):
        weighted_sections(prompt)


@pytest.mark.slow
def test_weights_and_chunks_are_those_of_transformers_and_diffusers():
    pipeline, folder = tiny_pipeline("sd")
    text = [("the red ", 1.0), ("cat", 1.3), (" and the dog " * 2, 1.0), ("in the red", 1 / 1.1), (" cat", 1.0)]
    written = "the red (cat:1.3) and the dog  and the dog [in the red] cat"
    negative = [("the dog and " * 4, 1.0)]
    call: dict[str, Any] = {"guidance_scale": 7.5}
    with Engine.build(
        str(folder), plans=[4], backend="torch", device="cpu", compatibility="diffusers", prompt_chunks=3
    ) as engine:
        assert engine.network.prompt_shape == (3 * LENGTH, 16)
        drawn = {"steps": 4, "seeds": [3], "noise": "torch", "output_type": "latent", **call}
        long = engine.sample(prompt=written, negative_prompt="the dog and " * 4, prompt_syntax="a1111", **drawn)
        mixed = engine.sample(prompt=["a cat", written.replace("(", "")], **{**drawn, "seeds": [3, 3]})
    embeds = {"prompt_embeds": embedded(pipeline, text, 2), "negative_prompt_embeds": embedded(pipeline, negative, 2)}
    for found, given in ((long, embeds), (mixed[:1], {"prompt": "a cat"})):
        compare(found, pipeline, [3], steps=4, **given, **call)
    assert np.abs(mixed[1] - long[0]).max() > 1e-3


PROMPTS_2 = {
    "first": {"prompt": "a cat", "prompt_2": "the dog", "negative_prompt": "red", "negative_prompt_2": "and"},
    "zeros": {"prompt": ["a cat", "the"], "prompt_2": ["the dog", "red"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PROMPTS_2)
def test_the_second_encoder_reads_its_own_prompt(case):
    pipeline, folder = tiny_pipeline("xl")
    given = PROMPTS_2[case]
    count = 2 if case == "zeros" else 1
    built: dict[str, Any] = {"plans": [4], "backend": "torch", "device": "cpu", "compatibility": "diffusers"}
    with Engine.build(str(folder), prompt_chunks=2, **built) as engine:
        found = engine.sample(
            steps=4, seeds=[5, 6][:count], noise="torch", guidance_scale=7.5, output_type="latent", **given
        )
        for wrong in ({"prompt_2": "a"}, {"prompt": ["a"] * 3, "prompt_2": ["b"] * 2}):
            with pytest.raises(InputError, match="prompt_2"):
                engine.sample(steps=4, seeds=[1], **wrong)
        with pytest.raises(InputError, match="negative_prompt_2 without"):
            engine.sample(steps=4, seeds=[1], prompt="a", negative_prompt_2="b", guidance_scale=2.0)
    compare(found, pipeline, [5, 6][:count], steps=4, guidance_scale=7.5, **given)


def test_a_prompt_is_encoded_once_whatever_is_beside_it():
    with Engine.build(str(tiny_pipeline("sd")[1]), plans=[4], backend="onnxruntime", device="cpu") as engine:
        pipeline, encoded = engine.runner.pipeline, []
        encode = pipeline._encode
        pipeline._encode = lambda given: encoded.append(given) or encode(given)
        both = pipeline.embed([("a red cat",), ("a dog",)])["embeds"]
        np.testing.assert_array_equal(pipeline.embed([("a dog",)])["embeds"][0], both[1])
        assert len(encoded) == 2
        weighted = pipeline.embed([("a (dog:1.3)",)], weighted=True)["embeds"]
        assert len(encoded) == 3
        assert np.abs(weighted - both[1:]).max() > 0.01
        for number in range(70):
            pipeline.embed([(f"{number} cats",)])
        np.testing.assert_array_equal(pipeline.embed([("a red cat",)])["embeds"][0], both[0])
        assert len(encoded) == 74

"""Token ids against transformers', and what is said of prompts that are cut off."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from odd_strings import odd_strings
from tiny_pipelines import LENGTH, tokenizer

from skipstep.errors import BundleError, InputError, ModelFormatError
from skipstep.pipelines.prompts import plain_sections, weighted_sections
from skipstep.pipelines.spec import TextSpec
from skipstep.pipelines.tokenizer import PromptTokenizer, check_prompts, read_tokenizer

pytest.importorskip("transformers")


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_ids_are_those_of_transformers(tmp_path, pad, files):
    theirs = tokenizer(tmp_path / "words", pad=pad)
    theirs.save_pretrained(tmp_path / "saved")
    if files == "vocab.json":  # As folders of older versions are.
        (tmp_path / "saved/tokenizer.json").unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(tmp_path / "words" / name, tmp_path / "saved" / name)
    ours = PromptTokenizer(*read_tokenizer(tmp_path / "saved", pooled=False))
    given = odd_strings(1000)
    expected = theirs(given, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    found = [ours.chunks(plain_sections(text))[0][0].tolist() for text in given]
    assert [text for text, a, b in zip(given, found, expected, strict=True) if a != b] == []


def test_what_is_cut_off_is_quoted(tmp_path, caplog):
    tokenizer(tmp_path / "words").save_pretrained(tmp_path)
    ours = PromptTokenizer(*read_tokenizer(tmp_path, pooled=False))
    with caplog.at_level(logging.WARNING, "skipstep"):
        ours.chunks(plain_sections("the cat " * 5))
        assert not caplog.records
        ours.chunks(plain_sections("the cat " * 5 + "and Ünder the dog"))
        ours.chunks(weighted_sections("the (cat:1.2) " * 10 + "(and Ünder the dog) BREAK cat"), most=2)
    assert caplog.messages[1].endswith("cut off: 'and Ünder the dogcat'")
    assert caplog.messages[0].endswith("cut off: 'and Ünder the dog'")


@pytest.mark.parametrize("given", ["", 3, [], ["a", 3], None, "\ud800"])
def test_prompts_that_are_none(given):
    if given == "":
        assert check_prompts("prompt", given) == [""]
        return
    with pytest.raises(InputError):
        check_prompts("prompt", given)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    tokenizer(tmp_path / "words").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "T5Tokenizer"}))
    with pytest.raises(ModelFormatError, match="T5Tokenizer"):
        read_tokenizer(tmp_path, pooled=False)
    path.write_text(json.dumps({"model_max_length": LENGTH}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path, pooled=False)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelFormatError, match=r"vocab\.json"):
        read_tokenizer(tmp_path, pooled=False)


def test_a_file_that_is_no_tokenizer_is_refused():
    with pytest.raises(BundleError):
        PromptTokenizer("{}", TextSpec(77, 0, False))

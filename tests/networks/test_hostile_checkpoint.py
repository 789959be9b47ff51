"""Configurations of a checkpoint that no network has: refused in words, before time or memory is spent on them."""

import contextlib
import json
import shutil
import time

import pytest
from attack_count import tried

from skipstep import Engine, NoiseSchedule
from skipstep.demo import SHIPPED_MODEL
from skipstep.errors import SkipstepError
from skipstep.plans.scheduler_config import read_scheduler_config
from skipstep.storage.untrusted import read_json_object

pytest.importorskip("diffusers")

NESTED = json.loads("[" * 900 + "]" * 900)
VALUES = (
    None,
    True,
    "text",
    -1,
    0,
    2**40,
    10**12,
    10**400,
    1e308,
    [],
    {},
    [None],
    NESTED,
    [2**40] * 3,
    [2**40] * 300,
    "٣",
)
NETWORK = (
    "_class_name",
    "in_channels",
    "out_channels",
    "sample_size",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "attention_head_dim",
    "num_class_embeds",
    "down_block_types",
    "act_fn",
    "norm_eps",
    "freq_shift",
    "time_embedding_type",
    "dropout",
)
SCHEDULER = (
    "_class_name",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
)


@pytest.fixture
def folder(tmp_path):
    copied = tmp_path / "model"
    shutil.copytree(SHIPPED_MODEL, copied)
    return copied


def build(folder):
    Engine.build(folder, plans=[2], backend="torch", device="cpu").close()


def change(file, **values):
    contents = json.loads(file.read_text())
    file.write_text(json.dumps(contents | values))


@pytest.mark.parametrize("key", NETWORK)
def test_a_network(folder, key):
    config = folder / "unet" / "config.json"
    original = config.read_text()
    for value in VALUES:
        config.write_text(original)
        change(config, **{key: value})
        started = time.perf_counter()
        tried("configurations of a network and a scheduler")
        with contextlib.suppress(SkipstepError):
            build(folder)
        assert time.perf_counter() - started < 10, (key, value)


@pytest.mark.parametrize("key", [*SCHEDULER, "no_such_key"])
def test_a_scheduler(folder, key):
    config = folder / "scheduler" / "scheduler_config.json"
    original = config.read_text()
    for value in (*VALUES, ["0.1"] * 1000, [True] * 1000, [10**400] * 1000, [0.1] * 999):
        config.write_text(original)
        change(config, **{key: value})
        for read in (read_scheduler_config, lambda file: NoiseSchedule.from_diffusers(json.loads(file.read_text()))):
            started = time.perf_counter()
            tried("configurations of a network and a scheduler")
            with contextlib.suppress(SkipstepError):
                read(config)
            assert time.perf_counter() - started < 2, (key, value)


def test_what_real_tokenizers_hold_is_read(tmp_path):
    """Long texts, and 1e30 as an integer, which says that a prompt has no bound."""
    contents = {"model_max_length": 10**30, "chat_template": "x" * 10_000, "names": {str(i): i for i in range(5000)}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(contents))
    assert read_json_object(tmp_path / "tokenizer_config.json", remedy="none") == contents


def test_text_is_no_beta():
    for betas in (["0.1"] * 3, [True] * 3, [None] * 3, "0.1", b"0.1"):
        with pytest.raises(SkipstepError):
            NoiseSchedule.from_betas(betas)
        with pytest.raises(SkipstepError):
            NoiseSchedule.from_diffusers({"num_train_timesteps": 3, "trained_betas": betas})


@pytest.mark.parametrize("header", [b"{}", b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [0, 1e400], "shape": [1]}}'])
def test_a_header_of_weights(folder, header):
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SkipstepError):
        build(folder)

"""LoRAs in an engine: fused at build, and swapped beside the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from argument_walk import walk
from lora_files import attention, factors_of, write_lora
from tiny_pipelines import tiny_pipeline
from torch import Tensor, nn

from skipstep import Engine, NoiseSchedule
from skipstep.errors import EngineStateError, InputError
from skipstep.networks.checkpoint import read_checkpoint
from skipstep.serving import Batcher

CALL = {"steps": 2, "seeds": [3, 4], "prompt_embeds": np.random.default_rng(0).standard_normal((2, 5, 6), np.float32)}
SPACE: dict[str, Any] = {"plans": [2], "schedule": NoiseSchedule.scaled_linear(1000), "device": "cpu"}
SPACE |= {"sample_shape": (2, 4, 4), "prompt_shape": (5, 6)}


class Attending(nn.Module):
    """Layers of every binding time: of the timestep, of the prompt alone, of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv1 = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.time_emb_proj = nn.Linear(1, 8)
        attn = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(6, 8), "to_v": nn.Linear(6, 8)})
        self.attentions = nn.ModuleList([nn.ModuleDict({"proj_in": nn.Conv2d(8, 8, 1), "attn2": attn})])

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        times = self.time_emb_proj(timestep.float()[:, None] / 1000)
        hidden = self.attentions[0]["proj_in"](self.conv_in(sample) + times[:, :, None, None])
        attn = self.attentions[0]["attn2"]
        key, value = (attn[name](encoder_hidden_states) for name in ("to_k", "to_v"))
        weights = (attn["to_q"](hidden.flatten(2).mT) @ key.mT).softmax(-1)
        return self.conv1(hidden + (weights @ value).mT.reshape(hidden.shape))


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return Attending()


@pytest.fixture(scope="module")
def files(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("loras")

    made = {"a": (4, 1, lambda path: path != "conv_in"), "b": (2, 2, attention), "large": (9, 3, attention)}
    return {
        name: write_lora(folder / f"{name}.safetensors", {"unet": factors_of(network, *given)}, "kohya")
        for name, given in made.items()
    }


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def engine(request: Any, network: Any, files: Mapping[str, str]) -> Iterator[Engine]:
    with Engine.build(network, backend=request.param, loras=[(files["a"], 0.8)], lora_rank=6, **SPACE) as made:
        yield made


def fused(network: Any, *loras: tuple[str, float]) -> Any:
    """Of the torch backend with these in its weights; the network itself stays as it is."""
    before = copy.deepcopy(network.state_dict())
    with Engine.build(network, backend="torch", loras=loras, **SPACE) as made:
        drawn = made.sample(**CALL)
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())
    return drawn


def test_there_and_back_gives_the_same_bits(engine, network, files):
    a, b = (files["a"], 0.8), (files["b"], -1.0)
    drawn = {}
    for name, loras in {"a": [a], "b": [b], "again": [a], "both": [a, b], "none": []}.items():
        engine.swap_loras(loras)
        drawn[name] = engine.sample(**CALL)
        np.testing.assert_allclose(drawn[name], fused(network, *loras), atol=1e-4)
    assert np.array_equal(drawn["a"], drawn["again"])
    assert min(np.abs(drawn["a"] - drawn[name]).max() for name in ("b", "both", "none")) > 1e-2


def test_what_does_not_fit_changes_nothing(engine, files, tmp_path):
    engine.swap_loras([files["a"]])
    before = engine.sample(**CALL)
    with pytest.raises(InputError, match="of rank 9 together") as caught:
        engine.swap_loras([files["large"]])
    assert "lora_rank=9" in caught.value.remedy
    convolutions = {"conv_in": (torch.ones(1, 2, 3, 3), torch.ones(8, 1, 1, 1))}
    with pytest.raises(InputError, match="1 are not there"):
        engine.swap_loras([files["a"], write_lora(tmp_path / "c.safetensors", {"unet": convolutions})])
    with pytest.raises(InputError, match="text_encoder"):
        engine.swap_loras([write_lora(tmp_path / "d.safetensors", {"text_encoder": convolutions})])
    with pytest.raises(EngineStateError, match="callback"):
        engine.sample(**CALL, callback=lambda event: engine.swap_loras([]))
    assert np.array_equal(engine.sample(**CALL), before)
    walk("swap_loras", engine.swap_loras, lambda: {"loras": [files["a"]]}, (2, 2, 4, 4))


def test_swaps_wait_for_calls_and_are_not_saved_or_shared(engine, files, tmp_path):
    engine.swap_loras([files["a"]])
    expected, begun = engine.sample(**CALL), engine.sample_async(**CALL)
    engine.swap_loras([])
    assert any(np.array_equal(begun.result(), each) for each in (expected, engine.sample(**CALL)))
    with pytest.raises(InputError, match="to be saved"):
        engine.save(tmp_path / "x.bundle", license="none")
    with pytest.raises(InputError, match="share evaluations"):
        Batcher(engine)


def test_where_loras_cannot_be(network, files):
    for given, message in (
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_rank": 4, "backend": "openvino"}, "lora_rank=4 with openvino"),
        ({"loras": [files["a"]], "lora_rank": 2}, "of rank 4"),
    ):
        with pytest.raises(InputError, match=message):
            Engine.build(network, **{"backend": "torch", **SPACE, **given})
    with Engine.build(network, backend="torch", **SPACE) as plain, pytest.raises(InputError, match="lora_rank="):
        plain.swap_loras([])


@pytest.mark.slow
def test_prompts_of_a_pipeline_change_with_its_text_encoder(tmp_path):
    pipeline, folder = tiny_pipeline("sd")
    parts = {name: factors_of(getattr(pipeline, name), 3, 1) for name in ("unet", "text_encoder")}
    both = write_lora(tmp_path / "a.safetensors", parts, "kohya")
    call = {"prompt": "a cat", "steps": 2, "seeds": [1], "output_type": "latent"}

    def build(**options: Any) -> Engine:
        return Engine.build(str(folder), plans=[2], device="cpu", backend="torch", **options)

    digests = {read_checkpoint(folder / "unet").digest()}
    with build(lora_rank=3) as engine:
        base = engine.sample(**call)
        for loras in ([(both, 0.5)], []):
            engine.swap_loras(loras)
            found = engine.sample(**call)
            with build(loras=loras) as expected:
                digests |= {expected.source.digest, engine.source.digest}
                np.testing.assert_allclose(found, expected.sample(**call), atol=1e-4)
            assert (np.abs(found - base).max() > 1e-3) == bool(loras)
        assert np.array_equal(found, base)
        assert len(digests) == 3, "as it is, with the LoRA, and with room for one"


def test_a_network_alone_leaves_the_text_encoders_part_out(network, files, tmp_path, caplog):
    parts = {"unet": factors_of(network, 1, 0), "text_encoder": {"encoder.x": (torch.ones(1, 2), torch.ones(2, 1))}}
    Engine.build(network, backend="torch", loras=[write_lora(Path(tmp_path, "a.safetensors"), parts)], **SPACE).close()
    assert "also updates text_encoder" in caplog.text

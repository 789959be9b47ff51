"""Whole loops of networks with all kinds of conditions against the textbook's over the same module."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from condition_families import FAMILIES, GUIDED, PLAN, rows
from engines import build
from fake_cuda import FakeDevice, build_on
from family_loops import arguments, assert_drawn, engine_of, textbook
from torch import Tensor, nn

from skipstep import Condition, load
from skipstep.export.onnx_sampler import build_sampler

# Exports take long: of those, one is quick enough.
EXPORTED = [pytest.param(name, marks=[] if name == "DiT" else [pytest.mark.slow]) for name in FAMILIES]
CASES = [
    pytest.param(*name.values, guided, backend, marks=[] if backend == "torch" else name.marks)
    for name in EXPORTED
    for guided in (False, True)[: 1 + (name.values[0] in GUIDED)]
    for backend in ("torch", "onnxruntime")
]


@pytest.mark.parametrize(("name", "guided", "backend"), CASES)
def test_draws_what_the_networks_own_loop_draws(name, guided, backend):
    if FAMILIES[name].from_guidance and not guided:
        pytest.skip("its network has no other loop")
    assert_drawn(engine_of(name, backend).sample(**arguments(name, guided=guided)), textbook(name, guided=guided))


@pytest.mark.parametrize("name", EXPORTED)
def test_what_follows_from_conditions_and_time_leaves_the_loop(name):
    family, engine = FAMILIES[name], engine_of(name, "onnxruntime")
    assert tuple(engine.network.conditions)[: len(family.told)] == family.told
    assert engine.network.sample_shape == family.shape
    assert engine.source.partition().crossing[family.hoisted]
    assert engine.network.takes_guidance == family.from_guidance


SAVED = ("SDXL", "LCM", "inpainting", "attention mask", "IP-Adapter", "DiT", "PixArt", "sequence")


@pytest.mark.parametrize("name", [each for each in EXPORTED if each.values[0] in SAVED])
def test_a_bundle_takes_the_same_conditions(name, tmp_path):
    engine = engine_of(name, "onnxruntime")
    engine.save(tmp_path / "bundle", license="MIT", targets=["cpu", "onnx-loop"])
    with load(tmp_path / "bundle") as loaded:
        assert loaded.network == engine.network
        for guided in (False, True)[: 1 + (name in GUIDED)]:
            call = arguments(name, guided=guided)
            np.testing.assert_array_equal(loaded.sample(**call), engine.sample(**call))


class Conditioned(nn.Module):
    """Reads a number, a vector, a mask and the guidance scale itself."""

    def forward(self, x: Tensor, t: Tensor, *, level: Tensor, kind: Tensor, mask: Tensor, strength: Tensor) -> Tensor:
        shift = level.mean(1) + 0.01 * kind.to(x.dtype) + 0.1 * strength + 0.001 * t.to(x.dtype)
        return 0.1 * x + shift[:, None] * torch.where(mask, 1.0, 0.5)


OWN = {"level": Condition((3,)), "kind": Condition((), "int64", null=0), "mask": Condition((5,), "bool", null="same")}


@pytest.mark.parametrize("takes_guidance", [False, True], ids=["guided", "distilled"])
def test_every_form_of_the_loop_reads_them(takes_guidance, monkeypatch, kernel_device, tmp_path):
    """The host's loop, the device's on a stand-in, one ONNX graph of the whole loop: the same samples."""
    if kernel_device != "cpu":
        pytest.skip("the stand-in device runs Triton's interpreter")
    last = Condition((), from_guidance="scale") if takes_guidance else Condition((), null=0.5)
    options = {"sample_shape": (5,), "conditions": {**OWN, "strength": last}, "plans": [PLAN], "batch_sizes": [1, 2]}
    call = {
        "seeds": [1, 2, 3],
        "guidance_scale": [1.5, 2.0, 1.0],
        "conditions": {"level": rows(3, count=3), "kind": [1, 2, 3], "mask": [True, False, True, True, False]},
        "negative_conditions": {"level": np.zeros(3)},
    }
    engines = {backend: build(Conditioned(), backend=backend, **options) for backend in ("torch", "onnxruntime")}
    device = FakeDevice()
    build_on(monkeypatch, device)
    engines["device"] = build(Conditioned(), **options)
    drawn = {name: engine.sample(plan=PLAN, **call) for name, engine in engines.items()}
    for name in ("onnxruntime", "device"):
        assert_drawn(drawn[name], drawn["torch"])
    parts, network = engines["onnxruntime"].source.partition(), engines["onnxruntime"].network
    assert network.can_guide is not takes_guidance
    whole = build_sampler(parts, network, PLAN, batch_size=None, guided=not takes_guidance)
    graph = onnxruntime.InferenceSession(whole)
    x_T = rows(5, count=3)
    given = {
        "x_T": x_T,
        "guidance_scale": np.float32(call["guidance_scale"]),
        "level": call["conditions"]["level"],
        "kind": np.array([1, 2, 3]),
        "mask": np.array([call["conditions"]["mask"]] * 3),
        "negative_level": np.zeros((3, 3), np.float32),
        "strength": np.full(3, 0.5, np.float32),
    }
    found = graph.run(None, {each.name: given[each.name] for each in graph.get_inputs()})[0]
    del call["seeds"]
    assert_drawn(found, engines["torch"].sample(plan=PLAN, x_T=x_T, **call))

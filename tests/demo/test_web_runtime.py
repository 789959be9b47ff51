"""Whole loops in onnxruntime-web under Node: WebAssembly draws what the engine draws, from the same seeds."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engines import labelled_engine
from noise_graphs import noise_graph
from odd_strings import odd_strings

import skipstep
from skipstep import NoiseSchedule, Plan
from skipstep.calls.images import to_pil
from skipstep.calls.noise import standard_normal
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.demo.browser import WEB
from skipstep.editing.interpolation import slerp
from skipstep.export.onnx_sampler import build_sampler
from skipstep.kernels.layout import Stream
from skipstep.pipelines.prompts import plain_sections
from skipstep.pipelines.spec import TextSpec
from skipstep.pipelines.tokenizer import PromptTokenizer

pytestmark = pytest.mark.slow

# What an image may be off by in another runtime, in float32.
IMAGES_AGREE = 1e-5
SEEDS = [0, 7, 2**64 - 1]


@pytest.fixture(scope="module")
def in_node(packages):
    def run(model, **asked):
        asked |= {"model": str(model), "sampler": str(WEB / "sampler.js")}
        asked["runtime"] = str(packages / "onnxruntime-web" / "dist" / "ort.node.min.mjs")
        done = subprocess.run(
            ["node", str(Path(__file__).parent / "web.mjs")],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def tensor(array):
    return [array.dtype.name, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def floats(text, *shape):
    return np.frombuffer(base64.b64decode(text), np.float32).reshape(shape)


def test_the_noise_has_the_engines_bits(in_node, tmp_path):
    (tmp_path / "noise.onnx").write_bytes(noise_graph(50_000, Stream.STEP))
    seeds = np.array(SEEDS, np.uint64)
    found = in_node(tmp_path / "noise.onnx", run={"seeds": tensor(seeds), "stages": tensor(np.array([0, 49]))})
    expected = np.stack([standard_normal(seeds, 50_000, stage=stage, stream=Stream.STEP) for stage in (0, 49)])
    (values,) = found.values()
    np.testing.assert_array_equal(floats(values, 2, 3, 50_000).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("evaluations", [6, 10, 50])
def test_the_demo_draws_the_engines_images(in_node, site, evaluations):
    """As the page does: stage by stage, through its own module."""
    about = json.loads((site / "site.json").read_text())
    plan = next(each for each in about["plans"] if each["evaluations"] == evaluations)
    asked = {"seeds": [str(seed) for seed in SEEDS], "labels": [0, 7, 9], "guidance": 2.0}
    found = in_node(site / "graphs" / f"{plan['key']}.onnx", plan=plan, shape=about["shape"], draw=asked)
    with skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, backend="onnxruntime") as engine:
        drawn = engine.plans[plan["key"]]
        expected = engine.sample(plan=drawn, seeds=SEEDS, class_labels=[0, 7, 9], guidance_scale=2.0)
    images, noise = floats(found["x_0"], 3, 1, 28, 28), floats(found["noise"], 3, 1, 28, 28)
    np.testing.assert_allclose(images, expected, rtol=0, atol=IMAGES_AGREE)
    assert found["stages"] == [3 * 784] * evaluations
    assert found["stopped"]
    normals = standard_normal(np.array(SEEDS, np.uint64), 784, stage=0, stream=Stream.INITIAL)
    np.testing.assert_array_equal(noise.reshape(3, 784), normals)
    between = floats(found["between"], 1, 28, 28)
    np.testing.assert_allclose(between, slerp(noise[0], noise[1], [0.25])[0], rtol=0, atol=1e-6)
    pixels = np.frombuffer(base64.b64decode(found["pixels"]), np.uint8).reshape(3, 28, 28)
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(picture) for picture in to_pil(images)]))


def test_prompts_have_the_engines_tokens(in_node, site):
    about = json.loads((site / "site.json").read_text())["prompted"]
    tokenizer = site / about["tokenizer"]
    ours = PromptTokenizer(tokenizer.read_text(), TextSpec(about["length"], about["pad"], pooled=False))
    given = odd_strings(200)
    found = in_node("", tokenizer=str(tokenizer), about=about, tokenize=given)["read"]
    expected = [ours.chunks(plain_sections(text), most=32)[0] for text in given]
    assert [text for text, a, b in zip(given, found, expected, strict=True) if a["ids"] != b[0].tolist()] == []
    assert [text for text, a, b in zip(given, found, expected, strict=True) if (a["cut"] > 0) != (len(b) > 1)] == []
    assert any(each["cut"] for each in found)


def test_a_prompt_draws_the_engines_picture(in_node, site, prompted):
    about = json.loads((site / "site.json").read_text())["prompted"]
    files = {"tokenizer": str(site / about["tokenizer"]), "encoder": str(site / about["encoder"])}
    plan, asked = about["plans"][-1], {"prompt": "A blue  apple", "seeds": [str(2**64 - 1)]}
    graph = site / "graphs" / f"{plan['key']}.onnx"
    found = floats(in_node(graph, plan=plan, about=about, **files, **asked)["x_0"], 1, 3, 32, 32).clip(-1, 1)
    with skipstep.load(prompted, backend="onnxruntime") as engine:
        given = {"guidance_scale": about["guidance"], "seeds": [2**64 - 1]}
        expected, other = (engine.sample(prompt=each, steps=10, **given) for each in (asked["prompt"], "red moon"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=IMAGES_AGREE)
    assert b"/stored" in (site / about["encoder"]).read_bytes()  # Weights in half the bytes, as a network's.
    assert np.abs(found - other).max() > 100 * IMAGES_AGREE


@pytest.mark.parametrize("form", ["loop", "unrolled"])
def test_both_forms_run(in_node, tmp_path, form):
    """With fresh noise at each step: drawn from the seeds in a loop, given where nothing of the graph is uint64."""
    engine = labelled_engine()
    plan = engine.add_plan(Plan(schedule=NoiseSchedule.linear(1000), timesteps=[599, 399, 199], solver="ddpm"))
    given, seeds = {"class_labels": np.array([0, 2])}, np.array(SEEDS[1:], np.uint64)
    if form == "loop":
        given["seeds"] = seeds
    else:
        given["x_T"] = standard_normal(seeds, 16, stage=0, stream=Stream.INITIAL).reshape(2, 1, 4, 4)
        steps = standard_normal(seeds, 16, stage=range(3), stream=Stream.STEP)
        given["noise"] = steps.reshape(3, 2, 1, 4, 4)
    noise = "seeds" if form == "loop" else "given"
    graph = build_sampler(engine.source.partition(), engine.network, plan, batch_size=None, form=form, noise=noise)
    (tmp_path / "loop.onnx").write_bytes(graph)
    found = in_node(tmp_path / "loop.onnx", run={name: tensor(value) for name, value in given.items()})
    expected = engine.sample(plan=plan, seeds=SEEDS[1:], class_labels=[0, 2])
    np.testing.assert_allclose(floats(found["x_0"], 2, 1, 4, 4), expected, rtol=0, atol=IMAGES_AGREE)

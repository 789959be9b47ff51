"""A pipeline as a bundle: the same pictures without torch, from the command line, and nothing changed is run."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_pipelines import tiny_pipeline

import skipstep
from skipstep import Engine, demo
from skipstep.commands import sample
from skipstep.commands.main import main
from skipstep.errors import BundleError, IntegrityError
from skipstep.export import bundle_files, large_model
from skipstep.fitting.reference import conditions_of

pytest.importorskip("transformers")

_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "diffusers"):
    sys.modules[name] = None
import numpy as np, skipstep
with skipstep.load(sys.argv[1], num_threads=1) as engine:
    call = {"prompt": "the cat", "negative_prompt": "a dog", "guidance_scale": 7.5, "steps": 4, "seeds": [1]}
    drawn = engine.sample(**call, noise="torch")
    again = engine.sample(**call, image=drawn, strength=0.5)
np.savez(sys.argv[2], drawn=drawn, again=again)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Any:
    """The bundle, and the engine that it was made of."""
    folder = tmp_path_factory.mktemp("bundles") / "sd"
    with Engine.build(str(tiny_pipeline("sd")[1]), plans=[4], device="cpu", backend="onnxruntime") as made:
        made.save(folder, license="Apache-2.0", notice=__file__)
        yield folder, made


@pytest.fixture
def copied(saved: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def _replaced(folder: Path, name: str, data: bytes) -> None:
    """As someone would who knows the format: with the new hash in the manifest."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_same_pictures_without_torch(saved, tmp_path):
    folder, made = saved
    subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, folder, tmp_path / "drawn.npz"], check=True)
    found = np.load(tmp_path / "drawn.npz")
    call = {"prompt": "the cat", "negative_prompt": "a dog", "guidance_scale": 7.5, "steps": 4, "seeds": [1]}
    drawn = made.sample(**call, noise="torch")
    again = made.sample(**call, image=drawn, strength=0.5)
    np.testing.assert_allclose(found["drawn"], drawn, atol=tolerances.BACKENDS_AGREE)
    np.testing.assert_allclose(found["again"], again, atol=tolerances.BACKENDS_AGREE)
    assert np.abs(drawn - again).max() > 0.01


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_openvino_runs_the_other_parts_too(saved, precision, monkeypatch):
    library = pytest.importorskip("skipstep.backends.openvino_library")
    if precision == "bfloat16" and "BF16" not in library.capabilities():
        pytest.skip("a processor without bfloat16")
    call = {"prompt": "the cat", "negative_prompt": "a dog", "guidance_scale": 7.5, "steps": 4, "seeds": [1]}
    latents = saved[1].sample(**call, output_type="latent")
    expected = saved[1].decode(latents)
    encoded, rounded = saved[1].encode(expected), 0.0 if precision == "float32" else 0.05
    monkeypatch.setattr(skipstep.backends.onnxruntime, "part", None)
    with skipstep.load(saved[0], backend="openvino", precision=precision) as engine:
        pictures = engine.decode(latents)
        np.testing.assert_allclose(pictures, expected, atol=max(tolerances.BACKENDS_AGREE, rounded))
        assert (np.abs(pictures - expected).max() > tolerances.BACKENDS_AGREE) == (precision == "bfloat16")
        np.testing.assert_allclose(engine.encode(expected), encoded, atol=tolerances.BACKENDS_AGREE)
        engine.runner.pipeline.check(rounded)


@pytest.mark.parametrize("shipped", [False, True])
def test_pictures_from_the_command_line(saved, tmp_path, capsys, monkeypatch, shipped):
    arguments = ["--prompt", "a cat", "the dog", "--num", "3", "--steps", "4", "--out", str(tmp_path / "out")]
    if shipped:  # Without --model: at a guidance scale of its own.
        monkeypatch.setattr(sample, "PICTOGRAMS", saved[0])
    else:
        arguments += ["--model", str(saved[0])]
    assert main(["sample", *arguments]) == 0, capsys.readouterr().err
    files = sorted(path.name for path in (tmp_path / "out/0004-steps").iterdir())
    assert files == ["0000-seed0-a_cat.png", "0001-seed1-the_dog.png", "0002-seed2-a_cat.png"]
    scale = 3.0 if shipped else 7.5
    drawn = saved[1].sample(prompt="the dog", guidance_scale=scale, steps=4, seeds=[1], output_type="pil")[0]
    found = Image.open(tmp_path / "out/0004-steps" / files[1])
    assert np.abs(np.asarray(found, int) - np.asarray(drawn, int)).max() <= 1


def test_the_command_line_says_what_it_cannot_draw(saved, tmp_path, capsys, monkeypatch):
    for module in (sample, demo):
        monkeypatch.setattr(module, "PICTOGRAMS", tmp_path / "none.bundle")
    assert main(["sample", "--prompt", "red apple"]) == 2
    assert "no none.bundle in this installation" in capsys.readouterr().err
    asked = ["sample", "--model", str(saved[0]), "--prompt", "a (cat:1.3", "--out", str(tmp_path / "a.npz")]
    assert main([*asked, "--control-image", __file__]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main([*asked, "--prompt-syntax", "a1111", "--steps", "4"]) == 0
    call = {"guidance_scale": 7.5, "steps": 4, "seeds": [0]}
    drawn, plain = (saved[1].sample(prompt="a (cat:1.3", **call, prompt_syntax=each) for each in ("a1111", "plain"))
    found = np.load(tmp_path / "a.npz")["steps_4"]
    np.testing.assert_allclose(found, drawn, atol=tolerances.BACKENDS_AGREE)
    assert np.abs(drawn - plain).max() > 10 * tolerances.BACKENDS_AGREE


def test_plans_are_tuned_for_prompts(saved, copied, capsys):
    asked = ["--steps", "2", "--noises", "8", "--held-out", "8", "--nodes", "24", "--rounds", "0", "--guidance", "3"]
    assert main(["tune", str(copied), *asked]) == 2
    assert "prompt_embeds" in capsys.readouterr().err
    assert main(["tune", str(copied), *asked, "--prompt", "a cat", "the dog", "red"]) == 0, capsys.readouterr().err
    with skipstep.load(copied) as engine:
        [plan] = [each for each in engine.plans.values() if each.steps == 2]
        assert engine.sample(prompt="a cat", plan=plan, guidance_scale=3.0, seeds=[0]).shape == (1, 3, 16, 16)
    turns = [conditions_of(saved[1].network, 4, {"prompt": ["a", "b", "c"]}, first)["prompt"] for first in (0, 4)]
    assert turns == [["a", "b", "c", "a"], ["b", "c", "a", "b"]]


def test_golden_samples_of_the_parts_are_compared(saved, copied):
    assert main(["verify", str(saved[0])]) == 0
    assert (copied / "NOTICE.txt").read_bytes() == Path(__file__).read_bytes()
    golden = load_file(copied / "pipeline/golden.safetensors")
    golden["embeds"] = golden["embeds"] + np.float32(0.1)
    save_file(golden, copied / "other.safetensors")
    _replaced(copied, "pipeline/golden.safetensors", (copied / "other.safetensors").read_bytes())
    with skipstep.load(copied) as engine, pytest.raises(IntegrityError, match="embeds"):
        engine.runner.pipeline.check()


@pytest.mark.parametrize("name", ["pipeline/text-0.onnx", "pipeline/decoder.onnx", "pipeline/tokenizer-0.json"])
def test_a_changed_part_is_not_run(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with skipstep.load(copied) as engine, pytest.raises(IntegrityError, match=name):
        engine.sample(prompt="a cat", steps=4, seeds=[0])


@pytest.mark.slow
def test_an_encoder_above_the_limit_of_one_file(monkeypatch, tmp_path):
    """As SDXL's second one, with weights in half precision; the limit is lowered."""
    pipeline, whole = tiny_pipeline("sd")
    folder = Path(shutil.copytree(whole, tmp_path / "sd"))
    path = folder / "text_encoder/model.safetensors"
    save_file({name: each.astype(np.float16) for name, each in load_file(path).items()}, path, {"format": "pt"})
    for module, name, value in (
        (large_model, "LARGE_BYTES", 1),
        (large_model, "WEIGHT_BYTES", 1 << 10),
        (bundle_files, "PART_BYTES", 1 << 14),
    ):
        monkeypatch.setattr(module, name, value)
    with Engine.build(str(folder), plans=[2], device="cpu", backend="torch") as made:
        found = made.runner.pipeline.embed([("the cat",)])["embeds"]
        made.save(tmp_path / "bundle", license="none")
    encoder = type(pipeline.text_encoder).from_pretrained(folder / "text_encoder", dtype=torch.float32)
    words = pipeline.tokenizer("the cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        np.testing.assert_allclose(found, encoder(words).last_hidden_state, atol=tolerances.PIPELINE_LATENTS)
    parts = sorted((tmp_path / "bundle/pipeline").glob("text-0.onnx.*"))
    assert len(parts) > 1
    assert {each.dtype for part in parts for each in load_file(part).values()} == {np.dtype(np.float16)}
    with skipstep.load(tmp_path / "bundle") as loaded:
        np.testing.assert_array_equal(loaded.runner.pipeline.embed([("the cat",)])["embeds"], found)
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"\xff")
    with skipstep.load(tmp_path / "bundle") as loaded, pytest.raises(IntegrityError, match=r"text-0\.onnx\.0"):
        loaded.sample(prompt="the cat", steps=2, seeds=[1])


@pytest.mark.parametrize(
    "change", [{"factor": 0}, {"schema": 9}, {"texts": [{}]}, {"tile": [8]}, {"more": 1}, {"pixels": True}]
)
def test_a_description_that_makes_no_sense_is_refused(copied, change):
    contents = {**json.loads((copied / "pipeline/pipeline.json").read_text()), **change}
    _replaced(copied, "pipeline/pipeline.json", json.dumps(contents).encode())
    with pytest.raises(BundleError):
        skipstep.load(copied)


def test_the_shipped_pictograms_are_what_their_prompts_name():
    assert main(["verify", str(demo.PICTOGRAMS)]) == 0
    with skipstep.load(demo.PICTOGRAMS, allow_hard_links=True) as engine:
        assert {plan.steps for plan in engine.plans.values() if plan.solver == "fitted"} == {4, 6, 8}
        call = {"prompt": ["red apple", "blue heart"], "seeds": [0, 1], "guidance_scale": demo.PICTOGRAMS_GUIDANCE}
        for steps in (6, 20):
            apple, heart = engine.sample(steps=steps, **call)
            for picture, color in ((apple, 0), (heart, 2)):
                inside, corner = picture[:, 12:20, 12:20].mean(axis=(1, 2)), picture[:, :2, :2]
                assert inside.argmax() == color
                assert inside[color] > inside.mean() + 0.3
                assert corner.min() > 0.9, "the corner is white"

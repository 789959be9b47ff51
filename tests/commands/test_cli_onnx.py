"""`skipstep sample`, `export` and `build` on an existing .onnx file."""

import shutil

import numpy as np
import onnx
import pytest
from onnx_files import small_model
from PIL import Image

import skipstep
from skipstep import Engine
from skipstep.commands.main import main

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def model(tmp_path):
    onnx.save(small_model(), tmp_path / "net.onnx")
    diffusers.DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    return tmp_path / "net.onnx"


@pytest.fixture
def run(capsys):
    def command(*arguments):
        status = main([*map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return command


def test_sample(model, run, tmp_path):
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    call = ("sample", "--model", model, "--steps", "2", "--seeds", "7", "--out", tmp_path / "out", "--device", "cpu")
    status, said = run(*call, "--inputs", "sample=x", "timestep=t", "--scheduler", scheduler)
    assert status == 0, said
    assert "compiled net.onnx for onnxruntime" in said
    drawn = np.asarray(Image.open(tmp_path / "out/0002-steps/0000-seed7.png"))
    with Engine.build(model, plans=[2], scheduler=scheduler, device="cpu") as engine:
        np.testing.assert_array_equal(drawn, np.asarray(engine.sample(steps=2, seeds=7, output_type="pil")[0]))
    # Without names it says what it took for what.
    status, said = run(*call, "--scheduler", scheduler.parent)
    assert status == 0
    assert "sample is 'x', by its name; timestep is 't', by its name" in said


def test_without_a_scheduler_and_the_remedies(model, run, tmp_path):
    call = ("sample", "--model", model, "--steps", "2", "--num", "1", "--out", tmp_path / "out", "--device", "cpu")
    status, said = run(*call)
    assert status == 2
    assert "pass --scheduler FILE, or copy the file into the folder of the model" in said
    shutil.copy(tmp_path / "scheduler/scheduler_config.json", tmp_path)
    assert run(*call)[0] == 0


def test_export_and_build(model, run, tmp_path):
    scheduler = tmp_path / "scheduler"
    status, said = run("build", model)
    assert status == 2
    command = said.split("first run skipstep ")[1].split(", then")[0]
    words = command.replace("LICENSE", "none").replace("BUNDLE", str(tmp_path / "bundle")).split()
    status, said = run(*words, "--scheduler", scheduler, "--steps", "2", "3", "--batch", "1")
    assert status == 0, said
    with (
        skipstep.load(tmp_path / "bundle", compile_on_miss=True) as loaded,
        Engine.build(model, plans=[3, 5], scheduler=scheduler, device="cpu") as engine,
    ):
        assert loaded.source.name == "net"
        # Also plans that are not in it are those of the scheduler's configuration.
        for steps in (3, 5):
            np.testing.assert_array_equal(loaded.sample(steps=steps, seeds=1), engine.sample(steps=steps, seeds=1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--inputs", "x"), "sample=noisy timestep=sigma"),
        (("--inputs", "sample="), "sample=noisy timestep=sigma"),
        (("--inputs", "sample=y"), "for a network with the inputs x float32"),
        (("--sample-shape", "3", "8", "8"), "leave sample_shape out"),
        (("--num-classes", "3"), "leave num_classes out"),
        (("--config", "folder"), "leave config out"),
        (("--scheduler", "missing.json"), "missing.json"),
    ],
)
def test_options_that_do_not_fit(model, run, tmp_path, options, said):
    shutil.copy(tmp_path / "scheduler/scheduler_config.json", tmp_path)
    for command in (("sample", "--device", "cpu"), ("export", "--license", "none")):
        status, found = run(*command, "--model", model, "--out", tmp_path / "out", "--steps", "2", *options)
        assert (status, said in found) == (2, True), found


def test_a_bundle_says_everything_of_itself(run, tmp_path):
    status, said = run("sample", "--num", "1", "--null-label", "3", "--out", tmp_path / "out")
    assert status == 2
    assert "--null-label for a bundle" in said

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_networks import tiny_unet

from skipstep import __version__
from skipstep.commands.main import main
from skipstep.latency.table import format_table


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A conditional checkpoint with three named classes and a null label."""
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("model")
    tiny_unet(num_class_embeds=4).save_pretrained(folder / "unet")
    DDIMScheduler(timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    names = {"0": "shoe", "1": "../hat", "2": "bag"}
    (folder / "model_index.json").write_text(json.dumps({"id2label": names}))
    return folder


@pytest.fixture
def sample(model, tmp_path, capsys):
    """Run `skipstep sample` on the small model; returns status, standard output and standard error."""

    def run(*arguments: str, folder=model, backend="torch"):
        command = ["sample", "--model", folder, "--out", tmp_path / "out", "--backend", backend, "--device", "cpu"]
        status = main([*map(str, command), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def pictures(folder) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_writes_a_grid_the_single_pictures_and_a_table(sample, tmp_path, backend):
    status, out, err = sample("--steps", "2", "4", "--num", "3", "--classes", "bag", "1", backend=backend)
    # On a slow machine a progress bar has been there; an error has not.
    assert status == 0
    assert "skipstep" not in err
    drawn = pictures(tmp_path / "out")
    assert list(drawn) == [
        "0002-steps/0000-seed0-bag.png",
        "0002-steps/0001-seed1-___hat.png",
        "0002-steps/0002-seed2-bag.png",
        "0004-steps/0000-seed0-bag.png",
        "0004-steps/0001-seed1-___hat.png",
        "0004-steps/0002-seed2-bag.png",
        "grid.png",
    ]
    assert all(picture.shape == (8, 8) for name, picture in drawn.items() if name != "grid.png")
    lines = out.splitlines()
    assert re.search(rf"compiled .* for {backend} in", lines[0])
    header = next(i for i, line in enumerate(lines) if line.startswith("steps"))
    for line, steps in zip(lines[header + 1 : header + 3], (2, 4), strict=True):
        assert re.fullmatch(rf" *{steps} +\d+\.\d +{backend} on cpu +[0-9a-f]+", line)
    assert str(tmp_path / "out" / "grid.png") in lines[-1]


def test_a_picture_is_that_of_its_seed(sample, tmp_path):
    sample("--steps", "3", "--seeds", "7", "9", "--classes", "shoe")
    together = pictures(tmp_path / "out")
    sample("--steps", "3", "--seeds", "9", "--classes", "shoe")
    alone = pictures(tmp_path / "out")["0003-steps/0000-seed9-shoe.png"]
    assert np.abs(together["0003-steps/0001-seed9-shoe.png"].astype(int) - alone).max() <= 1


def test_options_reach_the_sampler(sample, tmp_path):
    def drawn(*arguments: str) -> np.ndarray:
        assert sample("--steps", "3", "--seeds", "1", "--classes", "bag", *arguments)[0] == 0
        return pictures(tmp_path / "out")["0003-steps/0000-seed1-bag.png"]

    base = drawn()
    assert np.array_equal(base, drawn("--guidance", "2", "--eta", "0"))
    assert not np.array_equal(base, drawn("--guidance", "5"))
    assert not np.array_equal(base, drawn("--eta", "1"))


def test_all_classes_are_drawn_where_none_is_named(sample, tmp_path):
    sample("--steps", "2", "--num", "4")
    names = [path.stem for path in sorted((tmp_path / "out" / "0002-steps").iterdir())]
    assert names == ["0000-seed0-shoe", "0001-seed1-___hat", "0002-seed2-bag", "0003-seed3-shoe"]


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("unconditional")
    tiny_unet().save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return folder


def test_an_unconditional_model_is_labelled_by_its_seeds(sample, unconditional, tmp_path):
    status, _, _ = sample("--steps", "2", "--seeds", "5", folder=unconditional)
    assert status == 0
    assert (tmp_path / "out" / "0002-steps" / "0000-seed5.png").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--steps", "0"], ["steps=0"]),
        (["--steps", "1001"], ["1001", "1000"]),
        (["--steps", "2", "--eta", "1.5"], ["eta=1.5", "0 to 1"]),
        (["--steps", "2", "--num", "0"], ["--num 0"]),
        (["--steps", "2", "--seeds", "-1"], ["-1"]),
        (["--steps", "2", "--classes", "sock"], ["sock", "shoe"]),
        (["--steps", "2", "--classes", "3"], ["3", "0 to 2"]),
        (["--steps", "2", "--guidance", "nan"], ["nan"]),
        (["--steps", "2", "--backend", "tpu"], ["tpu", "onnxruntime"]),
        (["--steps", "2", "--model", "/nowhere"], ["/nowhere"]),
    ],
)
def test_bad_input_ends_with_an_explanation_and_no_picture(sample, tmp_path, arguments, names):
    status, out, err = sample(*arguments)
    assert status == 2
    assert "skipstep: " in err
    for name in (*names, "emedy"):
        assert name in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "out").exists()


def test_classes_of_an_unconditional_model_are_refused(sample, unconditional):
    status, _, err = sample("--classes", "1", folder=unconditional)
    assert status == 2
    assert "unconditional" in err


def test_states_that_are_no_pictures_are_written_as_numbers(sample, tmp_path):
    from diffusers import DDIMScheduler

    latents = tmp_path / "latents"
    tiny_unet(in_channels=4, out_channels=4).save_pretrained(latents / "unet")
    DDIMScheduler().save_pretrained(latents / "scheduler")
    status, _, err = sample("--steps", "2", folder=latents)
    assert status == 2
    assert "4×8×8, which are no pictures" in err
    out = re.search(r"pass --out (\S+\.npz)", err)[1]
    assert sample("--steps", "2", "3", "--seeds", "4", "5", "--out", out, folder=latents)[0] == 0
    with np.load(out) as written:
        assert {name: written[name].shape for name in written} == {
            "steps_2": (2, 4, 8, 8),
            "steps_3": (2, 4, 8, 8),
            "seeds": (2,),
        }


def test_help_teaches(capsys):
    for arguments in (["--help"], ["sample", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model", "--steps", "--seeds", "--num", "--classes", "--guidance", "--eta", "--out", "--backend"):
        assert option in text
    assert "examples:" in text


def test_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "skipstep", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"skipstep {__version__}"


def test_table_columns_line_up():
    lines = format_table(("steps", "ms", "key"), [("10", "1.5", "ab"), ("1000", "120.0", "cd")]).splitlines()
    assert lines == ["steps  ms     key", "   10    1.5  ab", " 1000  120.0  cd"]

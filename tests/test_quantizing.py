"""The network in 8 bits, as an engine and in a bundle."""

import json

import numpy as np
import pytest
import torch
from engines import build
from PIL import Image
from torch import nn

import skipstep
from skipstep.commands.main import main
from skipstep.errors import InputError
from skipstep.export.sensitivity import BOUND, PixelError
from skipstep.networks.spec import NetworkSpec
from skipstep.quantizing import read_calls


class Small(nn.Module):
    """Convolutions whose prediction follows the state smoothly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, x, t):
        return 0.9 * x + 0.1 * self.layers(x) + 0.0 * t[:, None, None, None]


OPTIONS = {"plans": [3], "batch_sizes": [2], "sample_shape": (1, 8, 8)}
CALL = {"steps": 3, "seeds": [7, 8]}


@pytest.fixture(scope="module")
def exact():
    return build(Small(), backend="onnxruntime", **OPTIONS)


@pytest.fixture(scope="module")
def bundle(exact, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "bundle"
    exact.save(path, license="MIT", precision="int8", calibration=[0, 1])
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engine_draws_within_the_bound_and_other_samples(exact, backend):
    engine = build(Small(), backend=backend, precision="int8", calibration=[0, 1], **OPTIONS)
    error = PixelError.between(engine.sample(**CALL), exact.sample(**CALL))
    assert engine.precision == "int8"
    assert error.within(BOUND)
    assert error.largest > 1e-6


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_bundle_holds_the_network_and_states_its_error(exact, bundle, backend):
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    name = f"step-int8-{backend}"
    assert manifest["graphs"][name] in manifest["files"]
    stated = manifest["quantized"][name]
    assert (stated["layers"], stated["samples"]) == (2, 16)
    assert 0 < stated["largest"] <= stated["bound"]["largest"]
    with skipstep.load(bundle, backend=backend, precision="int8") as engine:
        error = PixelError.between(engine.sample(**CALL), exact.sample(**CALL))
    assert error.within(BOUND)
    assert error.largest > 1e-6


def test_calibration_from_a_folder_draws_the_calls_in_it(tmp_path):
    np.savez(tmp_path / "call.npz", seeds=[0, 1])
    np.savez(tmp_path / "other.npz", x_T=np.zeros((2, 1, 8, 8)))
    assert read_calls(str(tmp_path), NetworkSpec((1, 8, 8)), 1) == [{"seeds": [1_000_003, 1_000_004]}] * 2
    (tmp_path / "other.npz").unlink()
    engine = build(Small(), backend="onnxruntime", precision="int8", calibration=tmp_path, **OPTIONS)
    seeded = build(Small(), backend="onnxruntime", precision="int8", calibration=[0, 1], **OPTIONS)
    np.testing.assert_array_equal(engine.sample(**CALL), seeded.sample(**CALL))


def test_calibration_from_pictures_draws_from_them_with_noise_on(tmp_path):
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
    [call] = read_calls(str(tmp_path), NetworkSpec((1, 8, 8)))
    [other] = read_calls(str(tmp_path), NetworkSpec((1, 8, 8)), 1)
    assert not set(other["seeds"]) & set(call["seeds"])
    np.testing.assert_array_equal(other["images"], call["images"])
    np.testing.assert_allclose(call["images"][1, 0], pixels / 127.5 - 1, atol=1e-6)
    engine = build(Small(), backend="onnxruntime", precision="int8", calibration=tmp_path, **OPTIONS)
    assert engine.sample(**CALL).shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match="8x8 pixels"):
        read_calls(str(tmp_path), NetworkSpec((1, 4, 4)))


def test_build_adds_the_network_in_8_bits_and_an_engine_of_it(exact, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    path = str(tmp_path / "bundle")
    exact.save(path, license="MIT")
    assert main(["build", path, "--target", "rtx:sm89", "--precision", "fp8", "--calibration", "0", "1"]) == 0
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_bytes())
    [engine] = manifest["engines"]
    assert engine["precision"] == "fp8"
    assert manifest["quantized"]["step-fp8"]["layers"] > 0
    assert {manifest["graphs"]["step-fp8"], engine["file"]} <= manifest["files"].keys()
    # What the description names are layers of the model.
    assert "in layers." in engine["facts"]["largest"][0]
    replay = skipstep.load(path)
    np.testing.assert_array_equal(replay.sample(**CALL), exact.sample(**CALL))
    # Without the option the network in 8 bits is the one that engines are built of.
    assert main(["build", path, "--target", "rtx:sm86"]) == 2
    assert main(["build", path, "--target", "rtx:sm120"]) == 0
    capsys.readouterr()
    assert main(["inspect", path]) == 0
    told = capsys.readouterr().out
    assert "rtx:sm120, fp8" in told
    assert "step-fp8: 2 of 2 layers, " in told


def test_bundle_without_the_network_says_how_to_get_it(exact, tmp_path):
    exact.save(tmp_path / "bundle", license="MIT")
    with pytest.raises(InputError, match="precision='int8'"):
        skipstep.load(tmp_path / "bundle", precision="int8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int8"}, "pass calibration="),
        ({"calibration": [0]}, "leave calibration out"),
        ({"precision": "int8", "calibration": []}, "calibration without seeds"),
        ({"precision": "int8", "calibration": 3}, "pass calibration="),
        ({"precision": "int8", "calibration": "/nowhere"}, "neither a picture nor"),
        ({"precision": "fp8", "calibration": [0]}, "precision='fp8'"),
    ],
)
def test_what_is_wrong_is_said(options, said):
    with pytest.raises(InputError, match=said):
        build(Small(), backend="onnxruntime", **OPTIONS, **options)


@pytest.mark.parametrize("name", ["call.npz", "picture.png"])
def test_damaged_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(InputError, match=name):
        build(Small(), backend="onnxruntime", precision="int8", calibration=tmp_path, **OPTIONS)


def test_fp8_needs_a_target_that_computes_in_it(exact, tmp_path):
    with pytest.raises(InputError, match="rtx:sm89"):
        exact.save(tmp_path / "bundle", license="MIT", precision="fp8", calibration=[0])


def test_engine_in_int8_is_not_saved_but_the_float_one_is(tmp_path):
    engine = build(Small(), backend="onnxruntime", precision="int8", calibration=[0, 1], **OPTIONS)
    with pytest.raises(InputError, match="save it with precision='int8'"):
        engine.save(tmp_path / "bundle", license="MIT")

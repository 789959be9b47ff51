"""The commands around bundles, as a user types them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_networks import tiny_unet

from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.bundles.bundle import open_bundle, read_engine
from skipstep.bundles.manifest import EngineEntry
from skipstep.bundles.tables import plan_values, read_plans
from skipstep.calls.conditioning import Conditioning, distinct
from skipstep.commands import inspect
from skipstep.commands.main import COMMANDS, main
from skipstep.cuda.probe import DeviceFacts
from skipstep.demo import SHIPPED_BUNDLE, SHIPPED_MODEL
from skipstep.errors import DeviceUnavailableError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("models") / "little"
    tiny_unet(num_class_embeds=3).save_pretrained(folder / "unet")
    DDIMScheduler(timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"id2label": {"0": "shoe", "1": "hat"}}))
    return folder


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles") / "little"
    arguments = ["export", "--model", model, "--out", out, "--license", "MIT", "--steps", 2, 3, "--batch", 1, 2]
    # A process of its own: here the kernels are loaded for Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "skipstep", *map(str, arguments), "--target", "cpu,tensorrt,sm_87,onnx-loop"],
        check=True,
        env=environment,
    )
    return out


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_kernels_come_with_all_that_a_gpu_without_torch_needs(bundle):
    opened = open_bundle(bundle)
    manifest = opened.manifest
    spec = manifest.network
    assert {each.facts.get("purpose", "step") for each in manifest.kernels} == {"step", "noise", "statistics"}
    arrays = opened.read_arrays(manifest.tables)
    graphs = {part: opened.read_graph(name) for part, name in manifest.graphs.items() if part in ("plan", "call")}
    for plan in read_plans(manifest, arrays):
        timesteps, conditioning = plan.evaluation_timesteps[:, None], Conditioning.of_labels(np.array([1, 0, 2]), 3)
        tables = {distinct(timesteps)[0].tobytes(): plan_values(plan, arrays)}
        timesteps = np.broadcast_to(timesteps, (len(timesteps), 3))
        # No graph that could be run.
        stored = EarlyGraphs(dict.fromkeys(graphs, b""), spec, tables=tables).compute(timesteps, conditioning)
        expected = EarlyGraphs(graphs, spec).compute(timesteps, conditioning)
        assert expected.call.keys() == stored.call.keys()
        for name in expected.call:
            np.testing.assert_allclose(stored.expanded(name), expected.expanded(name), rtol=1e-5, atol=1e-6)


LAUNCHES = {"kernels": [9, 8], "profiles": [1, 2], "largest": ["2.00 MFLOP in mid.conv", None]}
ENGINES = (
    EngineEntry("engines/a.engine", "rtx:sm89", "float16", {"not_fused": ["1 × norm", 3], **LAUNCHES}),
    # Of an earlier version, or damaged.
    EngineEntry("engines/b.engine", "tensorrt", "float16", {"not_fused": "1 × norm", "kernels": 3}),
)


def test_inspect_says_what_is_inside(bundle, capsys):
    status, out, _ = run(capsys, "inspect", bundle)
    assert status == 0
    for said in (
        "little",
        "MIT",
        "2 classes, guidance",
        "2 steps",
        "3 steps",
        "sm_87",
        "onnx-loop/2-",
        "network/step.onnx",
        "MFLOP",
    ):
        assert said in out
    status, out, _ = run(capsys, "inspect", bundle, "--json")
    assert status == 0
    assert json.loads(out)["model"] == "little"


def test_inspect_says_what_an_engine_launches_and_does_not_fuse():
    said = [f"{name:<12}{value}" for engine in ENGINES for name, value in inspect._engine_lines(engine)]
    assert said == [
        "engine      rtx:sm89, float16, engines/a.engine",
        "  kernels   9, 8 an evaluation at batch 1, 2",
        "  largest   2.00 MFLOP in mid.conv",
        "  not fused 1 × norm",
        "engine      tensorrt, float16, engines/b.engine",
    ]


def test_inspect_lists_every_kernel_of_an_engine():
    """Of TensorRT-RTX alone: engines of full TensorRT have no plan in text."""
    plan = b'\nmain {\n  function={ name=__myl_Add layers="[ONNX Layer: a][ONNX Layer: b]" }\n  corrltn={ name="c" }\n}'
    files = {"engines/a.engine": plan, "engines/b.engine": b"another"}
    bundle = SimpleNamespace(manifest=SimpleNamespace(engines=ENGINES), read=files.__getitem__)
    assert json.loads(json.dumps(inspect._kernels(bundle))) == {
        "engines/a.engine": [
            [
                {"kind": "function", "name": "__myl_Add", "nodes": ["a", "b"]},
                {"kind": "corrltn", "name": "c", "nodes": ["c"]},
            ]
        ]
    }


def test_verify_hashes_and_draws(bundle, capsys, tmp_path):
    status, out, _ = run(capsys, "verify", bundle)
    assert status == 0
    assert "golden      on cpu, error 0, at most" in out
    copy = shutil.copytree(bundle, tmp_path / "copy")
    data = bytearray((copy / "golden.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "golden.safetensors").write_bytes(data)
    status, _, err = run(capsys, "verify", copy)
    assert status == 2
    assert "IntegrityError" in err
    assert "golden.safetensors" in err


def test_another_machines_samples_are_told_apart(bundle, capsys, tmp_path):
    """Golden samples that this machine does not draw: whole files, other numbers."""
    from hostile_json import rewrite
    from safetensors.numpy import load_file, save

    copy = shutil.copytree(bundle, tmp_path / "copy")
    arrays = load_file(copy / "golden.safetensors")
    arrays["x_0"] = arrays["x_0"] * np.float32(1.01)
    rewrite(copy, "golden.safetensors", save(arrays))
    status, _, err = run(capsys, "verify", copy)
    assert status == 2
    assert "golden samples with a relative error of 0.0" in err


def test_sample_draws_from_a_bundle_without_torch(bundle, tmp_path):
    code = (
        "import sys; from skipstep.commands.main import main\n"
        f"main(['sample', '--model', {str(bundle)!r}, '--steps', '2', '5', '--num', '3', '--out', {str(tmp_path)!r}])\n"
        "assert not {'torch', 'diffusers', 'onnx'} & set(sys.modules), 'heavy'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "loaded little for onnxruntime" in result.stdout
    assert Image.open(tmp_path / "grid.png").size[0] > 8
    assert len(list(tmp_path.rglob("*.png"))) == 7


def test_a_bundle_runs_on_the_cpu_alone(bundle, capsys):
    status, _, err = run(capsys, "sample", "--model", bundle, "--backend", "torch")
    assert status == 2
    assert "for a bundle" in err


def test_export_does_not_overwrite_unasked(bundle, model, capsys):
    before = open_bundle(bundle).signed_bytes
    arguments = ("export", "--model", model, "--out", bundle, "--license", "MIT", "--steps", 2)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "something at" in err
    assert open_bundle(bundle).signed_bytes == before


def test_build_says_that_a_device_is_missing(bundle, capsys):
    """TensorRT builds where it finds its GPU; here there is none: an explanation, and the bundle as it was."""
    before = open_bundle(bundle).signed_bytes
    status, _, err = run(capsys, "build", bundle)
    assert status == 2
    assert "CUDA" in err
    assert open_bundle(bundle).signed_bytes == before


def test_build_adds_engines(bundle, capsys, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    copy = shutil.copytree(bundle, tmp_path / "copy")
    status, _, err = run(capsys, "build", copy, "--target", "rtx:sm89")
    assert status == 0, err
    engines = open_bundle(copy).manifest.engines
    assert [(engine.target, engine.facts["compute_capability"]) for engine in engines] == [("rtx:sm89", 89)]
    assert engines[0].facts["profiles"] == [1, 2, 4], "one engine for all batch sizes"
    assert all(open_bundle(copy).read(engine.file) for engine in engines)
    # This engine, this library, this architecture: and no other.
    version = engines[0].facts["library_version"]
    device = DeviceFacts("a GPU", 89, 58, 24 << 30, 13000)
    fitting = {"library": "tensorrt_rtx", "version": version, "device": device, "batch_size": 4}
    data, entry = read_engine(open_bundle(copy), **fitting)
    assert hashlib.sha256(data).hexdigest() == entry.facts["sha256"]
    older = dataclasses.replace(device, compute_capability=86)
    for other in ({"version": "9.9"}, {"device": older}, {"library": "tensorrt"}, {"batch_size": 3}):
        with pytest.raises(DeviceUnavailableError, match="sm_89 at batch 4"):
            read_engine(open_bundle(copy), **{**fitting, **other})
    assert run(capsys, "verify", copy)[0] == 0
    # The same again comes from the cache, and takes the place of what was there.
    status, _, _ = run(capsys, "build", copy, "--target", "rtx:sm89")
    assert open_bundle(copy).manifest.engines == engines


def test_signatures_are_required_and_checked(bundle, capsys, tmp_path):
    pytest.importorskip("cryptography")
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert run(capsys, "keygen", tmp_path / "key")[0] == 0
    assert run(capsys, "keygen", tmp_path / "other")[0] == 0
    public = tmp_path / "key.pub"
    status, _, err = run(capsys, "verify", copy, "--require-signature", public)
    assert status == 2
    assert "unsigned bundle" in err
    assert run(capsys, "sign", copy, "--key", tmp_path / "key")[0] == 0
    status, out, _ = run(capsys, "verify", copy, "--require-signature", public)
    assert (status, "signature verified" in out) == (0, True)
    status, _, err = run(capsys, "verify", copy, "--require-signature", tmp_path / "other.pub")
    assert (status, "SignatureError" in err) == (2, True)
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"license": "MIT"', '"license": "BSD"'))
    status, _, err = run(capsys, "verify", copy, "--require-signature", public)
    assert (status, "SignatureError" in err) == (2, True)


def test_cache_lists_and_clears(capsys, tmp_path, monkeypatch):
    from skipstep.bundles.cache import ArtefactCache
    from skipstep.bundles.cache_key import cache_key

    monkeypatch.setenv("SKIPSTEP_CACHE", str(tmp_path / "cache"))
    ArtefactCache().put(cache_key(kind="test"), b"x" * 1000, "an engine for sm_86")
    status, out, _ = run(capsys, "cache")
    assert status == 0
    assert "1 entries" in out
    assert "an engine for sm_86" in out
    assert "removed 1" in run(capsys, "cache", "--clear")[1]
    assert "0 entries" in run(capsys, "cache")[1]


def test_the_shipped_bundle_is_that_of_the_shipped_model(capsys):
    """Whole, made of the checkpoint beside it, and small enough to be kept in version control."""
    from skipstep.networks.checkpoint import read_checkpoint

    assert run(capsys, "verify")[0] == 0
    manifest = open_bundle(SHIPPED_BUNDLE, allow_hard_links=True).manifest
    assert manifest.network.class_names == read_checkpoint(SHIPPED_MODEL).class_names
    assert max(entry.size for entry in manifest.files.values()) < 10_000_000
    plans = [
        (plan.options["solver"], plan.options["steps"] or len(plan.options["timesteps"])) for plan in manifest.plans
    ]
    assert sorted(plans) == [*(("ddim", steps) for steps in (10, 20, 50)), *(("fitted", steps) for steps in (4, 6, 8))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 4

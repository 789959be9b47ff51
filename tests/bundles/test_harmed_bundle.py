"""Bundles that are not whole, by accident or by intent."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from attack_count import tried
from bundle_cases import make
from faults import run_python
from hostile_json import FUZZ, fuzz, rewrite
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import tiny_unet

import skipstep
from skipstep import load
from skipstep.bundles.bundle import is_bundle, open_bundle
from skipstep.errors import (
    BundleError,
    ExportError,
    SkipstepError,
)


@pytest.fixture
def copy(saved, tmp_path):
    """A bundle to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


STEP = "network/step.onnx"


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def swap(a: Path, b: Path) -> None:
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def link(folder: Path, name: str) -> None:
    """Move a file or folder out of the bundle, and leave a link to it."""
    outside = folder.parent / f"moved-{Path(name).name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_plans(folder: Path) -> None:
    """Another plan's tables under this one's name: hashes that match, contents that do not."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    a, b = manifest["plans"][0], manifest["plans"][1]
    a["key"], b["key"] = b["key"], a["key"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refer_outside(folder: Path) -> None:
    """A graph whose weights lie in another file, with the manifest made to fit."""
    path = folder / "network/step.onnx"
    model = onnx.load_from_string(path.read_bytes())
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"
    rewrite(folder, "network/step.onnx", model.SerializeToString())


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: change(folder / STEP, lambda data: data[:-1]), "step.onnx"),
    "flipped": (lambda folder: change(folder / STEP, flip), "step.onnx"),
    "swapped": (lambda folder: swap(folder / "network/plan.onnx", folder / "network/call.onnx"), "network/"),
    "removed": (lambda folder: (folder / "tables.safetensors").unlink(), "tables.safetensors"),
    "a link": (lambda folder: link(folder, STEP), "step.onnx"),
    "a linked folder": (lambda folder: link(folder, "network"), "network"),
    "a hard link": (lambda folder: os.link(folder / STEP, folder.parent / "second.onnx"), "step.onnx"),
    "a pipe": (lambda folder: pipe(folder / STEP), "step.onnx"),
    "a manifest link": (lambda folder: link(folder, "manifest.json"), "manifest.json"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "a truncated manifest": (
        lambda folder: change(folder / "manifest.json", lambda data: data[:-100]),
        "manifest.json",
    ),
    "a bundle of schema 1": (
        lambda folder: change(folder / "manifest.json", lambda data: data.replace(b'"schema": 2', b'"schema": 1')),
        "schema 1.*skipstep export",
    ),
    "swapped plans": (swap_plans, "tables"),
    "weights outside": (refer_outside, "step.onnx"),
}


@pytest.mark.parametrize("name", HARM)
def test_what_is_not_whole_is_refused_by_name(copy, name):
    harm, said = HARM[name]
    harm(copy)
    with pytest.raises(BundleError, match=said) as caught:
        load(copy).sample(steps=2, seeds=0, class_labels=0)
    assert caught.value.remedy


def test_hard_links_are_taken_where_a_package_manager_made_them(copy):
    HARM["a hard link"][0](copy)
    load(copy, allow_hard_links=True).sample(steps=2, seeds=0, class_labels=0)


def test_other_places_are_no_bundles(tmp_path):
    assert not is_bundle(tmp_path)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match=r"no manifest\.json"):
            load(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="file"):
        load(tmp_path / "file")


def test_a_graph_that_the_runtime_refuses_is_an_error_of_ours(copy):
    """Hashes match, the bytes are no graph."""
    rewrite(copy, "network/step.onnx", b"\x08\x07 no graph at all")
    with pytest.raises(ExportError, match="ONNX Runtime"):
        load(copy).sample(steps=2, seeds=0, class_labels=0)


@given(data=st.data())
@fuzz(max(100, FUZZ // 10))
def test_any_harm_to_any_file_is_noticed(saved, tmp_path_factory, data):
    """Random edits, without regard to the manifest: nothing loads that is not byte for byte what was saved."""
    tried("bundles with a file changed, whose hash does not match")
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    shutil.copytree(saved, folder, copy_function=os.link)
    try:
        files = sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "golden.safetensors"
        )
        name = data.draw(st.sampled_from(files))
        original = (folder / name).read_bytes()
        at = data.draw(st.integers(0, len(original)))
        removed = data.draw(st.integers(0, 64))
        piece = data.draw(st.binary(max_size=64))
        edited = original[:at] + piece + original[at + removed :]
        (folder / name).unlink()
        (folder / name).write_bytes(edited)
        if edited == original:
            return
        try:
            load(folder, allow_hard_links=True)
            bundle = open_bundle(folder, allow_hard_links=True)
            for file in bundle.manifest.files:
                bundle.read(file)
        except SkipstepError:
            return
        # An edit of the manifest may leave another good one, but never files that it does not promise.
        assert name == "manifest.json"
    finally:
        shutil.rmtree(folder.parent)


@pytest.mark.slow
def test_a_killed_writer_leaves_what_was_there(saved, tmp_path):
    """SIGKILL while the bundle is written: the old one stays whole, and the next writer removes the rest."""
    folder = Path(shutil.copytree(saved, tmp_path / "bundle"))
    before = open_bundle(folder).manifest
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path[:1]!r} + [{str(Path(__file__).parents[1])!r}]
from tiny_networks import tiny_unet
from skipstep import Engine, NoiseSchedule
from skipstep.export import bundle_writer
schedule = NoiseSchedule.cosine(1000)
engine = Engine.build(tiny_unet(), plans=[2], backend="onnxruntime", device="cpu", schedule=schedule)
bundle_writer.draw_golden = lambda engine: os.kill(os.getpid(), signal.SIGKILL)
engine.save({str(folder)!r}, license="MIT", overwrite=True)
"""
    run_python(code, status=-9)
    assert open_bundle(folder).manifest == before
    load(folder).sample(steps=2, seeds=0, class_labels=0)
    partial = [path for path in tmp_path.iterdir() if path != folder]
    assert len(partial) == 1
    make(tiny_unet(), plans=[2]).save(folder, license="MIT", overwrite=True)
    assert list(tmp_path.iterdir()) == [folder]
    assert skipstep.load(folder).sample(steps=2, seeds=0).shape == (1, 1, 8, 8)

"""Bundles: what was saved draws the same after loading, and what is not whole or not its own is refused by name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hostile_json import FUZZ, fuzz, rewrite
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import tiny_unet
from tolerances import BACKENDS_AGREE

import skipstep
from skipstep import Engine, NoiseSchedule, Plan, load
from skipstep.bundles.bundle import is_bundle, open_bundle
from skipstep.errors import (
    BundleError,
    ExportError,
    InputError,
    IntegrityError,
    PlanError,
    PlanNotFoundError,
    SkipstepError,
    StorageError,
)

SCHEDULE = NoiseSchedule.cosine(1000)
PLANS = [
    2,
    Plan(schedule=SCHEDULE, steps=4, solver="ddpm"),
    Plan(schedule=NoiseSchedule.linear(1000), steps=3, solver="rk4"),
    Plan(schedule=SCHEDULE, timesteps=[900, 400, 10], clip="dynamic", dynamic_quantile=0.8),
]


@pytest.fixture(scope="module")
def engine():
    return Engine.build(
        tiny_unet(num_class_embeds=4),
        plans=PLANS,
        batch_sizes=[1, 3],
        backend="onnxruntime",
        device="cpu",
        schedule=SCHEDULE,
        num_classes=3,
        null_label=3,
        fractional_timesteps=True,
    )


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    engine.save(folder, license="MIT", name="tiny")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A bundle to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def test_a_loaded_engine_draws_what_the_saved_one_drew(engine, saved):
    loaded = load(saved)
    assert list(loaded.plans) == list(engine.plans)
    assert [repr(plan.alpha_bars) for plan in loaded.plans.values()] == [
        repr(plan.alpha_bars) for plan in engine.plans.values()
    ]
    for plan in engine.plans.values():
        for conditions in ({}, {"guidance_scale": 2.0}):
            arguments = {"plan": plan, "seeds": [1, 2], "class_labels": [0, 2], **conditions}
            np.testing.assert_array_equal(loaded.sample(**arguments), engine.sample(**arguments))
    for fact in ("onnxruntime on cpu", "up to 3", "3 classes"):
        assert fact in loaded.describe()


def test_it_takes_new_plans_that_its_loops_cover(engine, saved):
    loaded = load(saved)
    with pytest.raises(PlanNotFoundError):
        loaded.sample(steps=5, seeds=1, class_labels=0)
    for plan in (5, Plan(schedule=SCHEDULE, steps=4, eta=1.0)):
        chosen = loaded.add_plan(plan)
        engine.add_plan(chosen)
        arguments = {"plan": chosen, "seeds": [4], "class_labels": [1]}
        np.testing.assert_array_equal(loaded.sample(**arguments), engine.sample(**arguments))
    images = engine.sample(plan=chosen, seeds=[4], class_labels=[1])
    with pytest.raises(PlanError, match="rescale=True") as caught:
        loaded.sample(plan=chosen, seeds=[4], class_labels=[1], guidance_scale=2.0, guidance_rescale=0.5)
    assert "any_plan" in caught.value.remedy
    found = loaded.invert(images, plan=loaded.add_plan(6), class_labels=1)
    np.testing.assert_array_equal(found.latents, engine.invert(images, plan=engine.add_plan(6), class_labels=1).latents)


def test_any_plan_covers_every_solver(engine, tmp_path):
    engine.save(tmp_path / "any", license="MIT", any_plan=True)
    loaded = load(tmp_path / "any", compile_on_miss=True)
    for options in ({"solver": "heun"}, {"solver": "dpm_solver_pp_2m"}, {"eta": 0.5, "convention": "guided"}):
        plan = Plan(schedule=SCHEDULE, steps=3, **options)
        engine.add_plan(plan)
        arguments = {"plan": plan, "seeds": [4], "class_labels": 1, "guidance_scale": 3.0, "guidance_rescale": 0.5}
        np.testing.assert_array_equal(loaded.sample(**arguments), engine.sample(**arguments))


def test_loading_and_sampling_imports_neither_torch_nor_diffusers(saved):
    code = (
        "import sys, skipstep\n"
        f"skipstep.load({str(saved)!r}).sample(steps=2, seeds=0, class_labels=1)\n"
        "print(*sys.modules)"
    )
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "diffusers", "onnx", "triton", "PIL", "cryptography"}


def test_an_engine_of_another_backend_saves_too(tmp_path):
    """What torch drew is what the bundle's golden samples are."""
    built = Engine.build(tiny_unet(), plans=[3], backend="torch", device="cpu", schedule=SCHEDULE)
    built.save(tmp_path / "bundle", license="MIT")
    drawn = load(tmp_path / "bundle").sample(steps=3, seeds=[1, 2])
    np.testing.assert_allclose(drawn, built.sample(steps=3, seeds=[1, 2]), rtol=0, atol=BACKENDS_AGREE)


def test_a_bundle_says_what_made_it(engine, saved):
    manifest = open_bundle(saved).manifest
    assert manifest.model == "tiny"
    assert manifest.license == "MIT"
    assert {"skipstep", "torch", "onnx", "onnxruntime", "python"} <= manifest.tools.keys()
    assert {plan.key for plan in manifest.plans} >= {plan.key for plan in PLANS[1:]}
    assert {"plan", "call", "step"} <= manifest.partition.keys()
    assert {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()} == {*manifest.files, "manifest.json"}
    onnx.checker.check_model(onnx.load_from_string((saved / "cpu/loop.onnx").read_bytes()))


def test_saving_twice_writes_the_same_bytes(engine, tmp_path):
    for name in "ab":
        engine.save(tmp_path / name, license="MIT", name="tiny")
    a, b = ((tmp_path / name / "manifest.json").read_bytes() for name in "ab")
    assert a == b


def test_nothing_is_overwritten_unasked(engine, saved, tmp_path):
    before = (saved / "manifest.json").read_bytes()
    with pytest.raises(StorageError, match="something at"):
        engine.save(saved, license="MIT")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match="a bundle to replace"):
        engine.save(precious, license="MIT", overwrite=True)
    assert (precious / "thesis.tex").exists()
    assert (saved / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"license": " "}, "licence"),
        ({"precision": "int4"}, "int4"),
        ({"targets": ["gpu"]}, "target 'gpu'"),
        ({"targets": ["sm_1"]}, "sm_1"),
        ({"targets": ["rtx:sm1"]}, "sm"),
    ],
)
def test_bad_requests_leave_nothing(engine, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        engine.save(tmp_path / "bundle", **{"license": "MIT", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(engine, tmp_path):
    """No file may grow beyond this: as on a full disk, writing fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match="bundle"):
            engine.save(tmp_path / "bundle", license="MIT")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_engine_has_nothing_to_save(saved, tmp_path):
    with pytest.raises(InputError, match="loaded from a bundle"):
        load(saved).save(tmp_path / "bundle", license="MIT")


def test_a_loop_that_draws_something_else_is_never_named(engine, tmp_path, monkeypatch):
    """The writer loads what it wrote and compares."""
    from skipstep.export import bundle_writer

    real = bundle_writer.build_loop

    def wrong(*arguments):
        model = onnx.load_from_string(real(*arguments))
        body = model.graph.node[-1].attribute[0].g
        [bound] = [node for node in body.node if body.output[1].name in node.output]
        bound.op_type = {"Max": "Min", "Div": "Mul"}[bound.op_type]
        return model.SerializeToString()

    monkeypatch.setattr(bundle_writer, "build_loop", wrong)
    with pytest.raises(IntegrityError, match="golden"):
        engine.save(tmp_path / "bundle", license="MIT")
    assert list(tmp_path.iterdir()) == []


# ── harm ──


def harm_truncate(folder: Path) -> str:
    path = folder / "cpu/loop.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    return "loop.onnx"


def harm_flip(folder: Path) -> str:
    path = folder / "cpu/loop.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "loop.onnx"


def harm_swap(folder: Path) -> str:
    a, b = folder / "network/plan.onnx", folder / "network/call.onnx"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return "network/"


def harm_remove(folder: Path) -> str:
    (folder / "tables.safetensors").unlink()
    return "tables.safetensors"


def harm_link(folder: Path) -> str:
    path = folder / "cpu/loop.onnx"
    path.rename(folder.parent / "elsewhere.onnx")
    path.symlink_to(folder.parent / "elsewhere.onnx")
    return "loop.onnx"


def harm_link_folder(folder: Path) -> str:
    (folder / "cpu").rename(folder.parent / "cpu")
    (folder / "cpu").symlink_to(folder.parent / "cpu")
    return "cpu"


def harm_hard_link(folder: Path) -> str:
    os.link(folder / "cpu/loop.onnx", folder.parent / "second.onnx")
    return "loop.onnx"


def harm_pipe(folder: Path) -> str:
    (folder / "cpu/loop.onnx").unlink()
    os.mkfifo(folder / "cpu/loop.onnx")
    return "loop.onnx"


def harm_manifest_link(folder: Path) -> str:
    (folder / "manifest.json").rename(folder.parent / "manifest.json")
    (folder / "manifest.json").symlink_to(folder.parent / "manifest.json")
    return "manifest.json"


def harm_manifest_gone(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json"


def harm_manifest_cut(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100])
    return "manifest.json"


def harm_plan(folder: Path) -> str:
    """Another plan's tables under this one's name: hashes that match, contents that do not."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    a, b = manifest["plans"][0], manifest["plans"][1]
    a["key"], b["key"] = b["key"], a["key"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "tables"


def harm_external(folder: Path) -> str:
    """A graph whose weights lie in another file, with the manifest made to fit."""
    path = folder / "cpu/loop.onnx"
    model = onnx.load_from_string(path.read_bytes())
    body = next(a.g for node in model.graph.node for a in node.attribute if a.HasField("g"))
    tensor = max(body.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"
    rewrite(folder, "cpu/loop.onnx", model.SerializeToString())
    return "loop.onnx"


HARM = {name: harm for name, harm in globals().items() if name.startswith("harm_")}


@pytest.mark.parametrize("name", HARM)
def test_what_is_not_whole_is_refused_by_name(copy, name):
    said = HARM[name](copy)
    with pytest.raises(BundleError, match=said) as caught:
        load(copy).sample(steps=2, seeds=0, class_labels=0)
    assert caught.value.remedy


def test_hard_links_are_taken_where_a_package_manager_made_them(copy):
    harm_hard_link(copy)
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
    rewrite(copy, "cpu/loop.onnx", b"\x08\x07 no graph at all")
    with pytest.raises(ExportError, match="ONNX Runtime"):
        load(copy).sample(steps=2, seeds=0, class_labels=0)


@given(data=st.data())
@fuzz(max(100, FUZZ // 10))
def test_any_harm_to_any_file_is_noticed(saved, tmp_path_factory, data):
    """Random edits, without regard to the manifest: nothing loads that is not byte for byte what was saved."""
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


def test_a_killed_writer_leaves_what_was_there(saved, tmp_path):
    """SIGKILL while the bundle is written: the old one stays whole, and the next writer cleans up."""
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -9, result.stderr
    assert open_bundle(folder).manifest == before
    load(folder).sample(steps=2, seeds=0, class_labels=0)
    partial = [path for path in tmp_path.iterdir() if path != folder]
    assert len(partial) == 1
    Engine.build(tiny_unet(), plans=[2], backend="onnxruntime", device="cpu", schedule=SCHEDULE).save(
        folder, license="MIT", overwrite=True
    )
    assert list(tmp_path.iterdir()) == [folder]
    assert skipstep.load(folder).sample(steps=2, seeds=0).shape == (1, 1, 8, 8)

"""Bundles: what was saved draws the same after loading, and what is not whole or not its own is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from attack_count import tried
from engines import build
from faults import file_size_limit, modules_after, run_python
from hostile_json import FUZZ, fuzz, rewrite
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import tiny_unet
from tolerances import BACKENDS_AGREE, BATCH_INVARIANCE

import skipstep
from skipstep import NoiseSchedule, Plan, load
from skipstep.bundles.bundle import is_bundle, open_bundle
from skipstep.errors import (
    BundleError,
    ExportError,
    InputError,
    IntegrityError,
    PlanNotFoundError,
    SkipstepError,
    StorageError,
)
from skipstep.export.weight_storage import expand_weights

SCHEDULE = NoiseSchedule.cosine(1000)
PLANS = [
    2,
    Plan(schedule=SCHEDULE, steps=4, solver="ddpm"),
    Plan(schedule=NoiseSchedule.linear(1000), steps=3, solver="rk4"),
    Plan(schedule=SCHEDULE, timesteps=[900, 400, 10], clip="dynamic", dynamic_quantile=0.8),
]


@pytest.fixture(scope="module")
def engine():
    conditions = {"num_classes": 3, "null_label": 3, "fractional_timesteps": True}
    return make(tiny_unet(num_class_embeds=4), plans=PLANS, batch_sizes=[1, 3], **conditions)


def make(network, **options):
    return build(network, **{"backend": "onnxruntime", "schedule": SCHEDULE, **options})


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
    for fact in ("onnxruntime on cpu", "3 classes"):
        assert fact in loaded.describe()


def test_it_takes_any_new_plan(engine, saved):
    """One step network runs every solver, noise and guidance rescale; no plan needs to be known at export."""
    loaded = load(saved)
    with pytest.raises(PlanNotFoundError):
        loaded.sample(steps=5, seeds=1, class_labels=0)
    guided = {"guidance_scale": 3.0, "guidance_rescale": 0.5}
    for options in ({}, {"solver": "heun"}, {"solver": "dpm_solver_pp_2m"}, {"eta": 0.5, "convention": "guided"}):
        plan = loaded.add_plan(Plan(schedule=SCHEDULE, steps=5, **options))
        engine.add_plan(plan)
        for conditions in ({}, guided):
            arguments = {"plan": plan, "seeds": [4], "class_labels": [1], **conditions}
            images = engine.sample(**arguments)
            np.testing.assert_array_equal(loaded.sample(**arguments), images)
    inverted = loaded.invert(images, plan=loaded.add_plan(6), class_labels=1)
    expected = engine.invert(images, plan=engine.add_plan(6), class_labels=1)
    np.testing.assert_array_equal(inverted.latents, expected.latents)


def test_whole_loops_for_other_hosts(engine, tmp_path):
    """The target onnx-loop: a graph a plan, which ONNX Runtime alone runs to the samples of the engine."""
    engine.save(tmp_path / "bundle", license="MIT", targets=["onnx-loop"])
    bundle = open_bundle(tmp_path / "bundle")
    samplers = {each.plan: each for each in bundle.manifest.samplers}
    assert samplers.keys() == {plan.key for plan in bundle.manifest.plans}
    x_T = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)
    given = {"x_T": x_T, "class_labels": np.array([0, 2, 1]), "guidance_scale": np.full(3, 2.0, np.float32)}
    for plan in engine.plans.values():
        entry = samplers[plan.key]
        assert (entry.form, entry.guided) == ("loop", True)
        if plan.adds_noise:
            continue
        session = onnxruntime.InferenceSession(bundle.read(entry.file), providers=["CPUExecutionProvider"])
        expected = engine.sample(plan=plan, x_T=x_T, class_labels=[0, 2, 1], guidance_scale=2.0)
        [drawn] = session.run(["x_0"], given)
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=BATCH_INVARIANCE)


def test_a_half_precision_network_is_one_more_file(engine, tmp_path):
    """For engines that are built on the device; the CPU's stays float32, and builders get weights as they were."""
    engine.save(tmp_path / "bundle", license="MIT", targets=["tensorrt"], precision="float16")
    bundle = open_bundle(tmp_path / "bundle")
    assert {"step", "step-float16"} <= bundle.manifest.graphs.keys()
    step = bundle.read_graph(bundle.manifest.graphs["step"])
    assert expand_weights(step) == engine.source.partition().graphs.step
    half = onnx.load_from_string(bundle.read_graph("network/step-float16.onnx")).graph
    assert {each.type.tensor_type.elem_type for each in half.output} == {onnx.TensorProto.FLOAT16}
    np.testing.assert_array_equal(
        load(tmp_path / "bundle").sample(steps=2, seeds=1, class_labels=0),
        engine.sample(steps=2, seeds=1, class_labels=0),
    )


def test_loading_and_sampling_imports_neither_torch_nor_diffusers(saved):
    loaded = modules_after(f"import skipstep; skipstep.load({str(saved)!r}).sample(steps=2, seeds=0, class_labels=1)")
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "diffusers", "onnx", "triton", "PIL", "cryptography"}


@pytest.mark.slow
def test_an_engine_of_another_backend_saves_too(tmp_path):
    """What torch drew is what the bundle's golden samples are."""
    built = make(tiny_unet(), plans=[3], backend="torch")
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
    onnx.checker.check_model(onnx.load_from_string((saved / "network/step.onnx").read_bytes()))


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
    with file_size_limit(100_000), pytest.raises(StorageError, match="bundle"):
        engine.save(tmp_path / "bundle", license="MIT")
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_engine_has_nothing_to_save(saved, tmp_path):
    with pytest.raises(InputError, match="loaded from a bundle"):
        load(saved).save(tmp_path / "bundle", license="MIT")


def test_a_network_that_draws_something_else_is_never_named(engine, tmp_path, monkeypatch):
    """The writer loads what it wrote and compares."""
    from skipstep.export import bundle_writer

    def wrong(graph):
        model = onnx.load_from_string(graph)
        for node in model.graph.node:
            node.op_type = {"Sigmoid": "Tanh"}.get(node.op_type, node.op_type)
        return model.SerializeToString()

    monkeypatch.setattr(bundle_writer, "compress_weights", wrong)
    with pytest.raises(IntegrityError, match="golden"):
        engine.save(tmp_path / "bundle", license="MIT")
    assert list(tmp_path.iterdir()) == []


# ── harm ──


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

"""Bundles: what was saved draws the same after loading, and what is not whole or not its own is refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from bundle_cases import PLANS, SCHEDULE, make
from faults import file_size_limit, modules_after
from tiny_networks import tiny_unet
from tolerances import BACKENDS_AGREE, BATCH_INVARIANCE

from skipstep import Plan, load
from skipstep.bundles.bundle import open_bundle
from skipstep.calls.noise import sample_noise, standard_normal
from skipstep.errors import (
    InputError,
    IntegrityError,
    PlanError,
    PlanNotFoundError,
    StorageError,
)
from skipstep.export.weight_storage import expand_weights
from skipstep.kernels.layout import Stream


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


@pytest.mark.slow
def test_whole_loops_for_other_hosts(engine, tmp_path):
    """A graph a plan, which ONNX Runtime alone runs to the samples of the engine: from seeds in a loop, and from given
    noise where nothing of the graph needs control flow or uint64."""
    engine.save(tmp_path / "bundle", license="MIT", targets=["onnx-loop,onnx-unrolled"])
    bundle = open_bundle(tmp_path / "bundle")
    samplers = {(each.plan, each.form): each for each in bundle.manifest.samplers}
    size = 3
    seeds, labels = np.arange(size, dtype=np.uint64), np.arange(size) % 3
    given = {"class_labels": labels, "guidance_scale": np.full(size, 2.0, np.float32)}
    for plan in engine.plans.values():
        expected = engine.sample(plan=plan, seeds=list(range(size)), class_labels=list(labels), guidance_scale=2.0)
        for form, noise in {"loop": "seeds", "unrolled": "given"}.items():
            entry = samplers[plan.key, form]
            assert (entry.noise, entry.guided) == (noise, True)
            session = onnxruntime.InferenceSession(bundle.read(entry.file), providers=["CPUExecutionProvider"])
            draws = {"seeds": seeds}
            if noise == "given":
                draws = {"x_T": sample_noise(engine.network, seeds, Stream.INITIAL)}
                if plan.adds_noise:
                    steps = standard_normal(seeds, 64, stage=range(plan.num_evaluations), stream=Stream.STEP)
                    draws["noise"] = steps.reshape(-1, size, 1, 8, 8)
            [drawn] = session.run(["x_0"], given | draws)
            np.testing.assert_allclose(drawn, expected, rtol=0, atol=BATCH_INVARIANCE)


@pytest.mark.slow
def test_no_plan_may_be_too_long_to_unroll(tmp_path):
    """Those of at most 20 evaluations are unrolled, and one must be there."""
    built = make(tiny_unet(), plans=[21])
    with pytest.raises(PlanError, match="21 and more") as caught:
        built.save(tmp_path / "bundle", license="MIT", targets=["onnx-unrolled"])
    assert "--steps 10" in caught.value.remedy
    short = built.add_plan(2)
    built.save(tmp_path / "bundle", license="MIT", targets=["onnx-unrolled"])
    assert [each.plan for each in open_bundle(tmp_path / "bundle").manifest.samplers] == [short.key]


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

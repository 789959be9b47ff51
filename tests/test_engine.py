from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from engines import SCHEDULE, build
from PIL import Image
from tiny_networks import Curve, Labelled, tiny_unet
from tolerances import BATCH_INVARIANCE

from skipstep import Engine, Plan
from skipstep.calls.noise import standard_normal
from skipstep.errors import (
    DeviceUnavailableError,
    ExportError,
    InputError,
    MissingDependencyError,
    NonFiniteError,
    PlanError,
    PlanNotFoundError,
    SkipstepError,
)
from skipstep.kernels.layout import Stream

NOISY = Plan(schedule=SCHEDULE, steps=4, eta=1.0)


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def engine(request) -> Engine:
    """A conditional UNet with a null label, on each backend."""
    return build(tiny_unet(num_class_embeds=4), plans=[3, NOISY], null_label=3, backend=request.param)


@pytest.fixture(scope="module")
def labelled() -> Engine:
    return build(Labelled(), sample_shape=(1, 4, 4), num_classes=10, null_label=10)


def test_one_step_by_hand(labelled):
    """x_0 = (x_T - sqrt(1-a)·eps)/sqrt(a), clipped, with eps from the closed-form network."""
    plan = Plan(schedule=SCHEDULE, timesteps=[200])
    x_T = np.random.default_rng(0).standard_normal((2, 1, 4, 4)).astype(np.float32)
    a = SCHEDULE.alpha_bar[200]
    eps = 0.1 * x_T + np.array([0.2 + 0.2, 0.7 + 0.2]).reshape(-1, 1, 1, 1)
    expected = np.clip((x_T - np.sqrt(1 - a) * eps) / np.sqrt(a), -1, 1)
    ours = labelled.sample(plan=plan, x_T=x_T, class_labels=[2, 7])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_guidance_contrasts_labelled_with_unlabelled_predictions(labelled):
    """eps = u + w·(c - u): in the closed form a label l and scale w look like the label 10 + w·(l - 10)."""
    plan = Plan(schedule=SCHEDULE, timesteps=[200], clip=None)
    x_T = np.random.default_rng(0).standard_normal((3, 1, 4, 4)).astype(np.float32)
    scales, labels = np.array([0.0, 1.0, 2.5]), np.array([4, 4, 8])
    a = SCHEDULE.alpha_bar[200]
    eps = 0.1 * x_T + ((10 + scales * (labels - 10)) / 10 + 0.2).reshape(-1, 1, 1, 1)
    expected = (x_T - np.sqrt(1 - a) * eps) / np.sqrt(a)
    ours = labelled.sample(plan=plan, x_T=x_T, class_labels=labels.tolist(), guidance_scale=scales.tolist())
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_without_labels_the_null_label_is_drawn(engine):
    free = engine.sample(steps=3, seeds=[1, 2])
    pure = engine.sample(steps=3, seeds=[1, 2], class_labels=[0, 1], guidance_scale=0.0)
    np.testing.assert_allclose(free, pure, rtol=0, atol=BATCH_INVARIANCE)


@pytest.mark.parametrize("arguments", [{"steps": 3}, {"plan": NOISY}], ids=["eta 0", "eta 1"])
@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_a_sample_does_not_depend_on_its_batch(engine, arguments, guidance_scale):
    seeds, labels = [5, 0, 2**64 - 1, 9, 5, 1, 2], [0, 1, 2, 0, 0, 1, 2]
    together = engine.sample(**arguments, seeds=seeds, class_labels=labels, guidance_scale=guidance_scale)
    assert together.shape == (7, 1, 8, 8)
    for row, seed, label in zip(together, seeds, labels, strict=True):
        alone = engine.sample(**arguments, seeds=seed, class_labels=label, guidance_scale=guidance_scale)
        np.testing.assert_allclose(row, alone[0], rtol=0, atol=BATCH_INVARIANCE)
    # The same network batch, the same place in it: the same bits.
    again = engine.sample(**arguments, seeds=seeds, class_labels=labels, guidance_scale=guidance_scale)
    np.testing.assert_array_equal(again, together)


def test_seeds_are_the_noise_they_are_documented_to_be(engine):
    seeds = [3, 4, 5]
    x_T = standard_normal(np.array(seeds, np.uint64), 64, stage=0, stream=Stream.INITIAL).reshape(3, 1, 8, 8)
    from_seeds = engine.sample(steps=3, seeds=seeds, class_labels=1)
    from_noise = engine.sample(steps=3, x_T=x_T, class_labels=1)
    np.testing.assert_array_equal(from_seeds, from_noise)
    assert len({sample.tobytes() for sample in from_seeds}) == 3


def test_step_noise_is_keyed_by_the_seed(engine):
    x_T = np.zeros((2, 1, 8, 8), np.float32)
    one, other = (engine.sample(plan=NOISY, x_T=x_T, seeds=seeds, class_labels=0) for seeds in ([1, 2], [1, 3]))
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[1] - other[1]).max() > 0.01


def test_output_types(engine):
    arguments = {"steps": 3, "seeds": [1, 2], "class_labels": 1}
    array = engine.sample(**arguments)
    assert array.dtype == np.float32
    tensor = engine.sample(**arguments, output_type="pt")
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), array)
    pictures = engine.sample(**arguments, output_type="pil")
    assert [type(p) for p in pictures] == [Image.Image] * 2
    expected = np.rint((array[1, 0].clip(-1, 1) + 1) * 127.5)
    np.testing.assert_array_equal(np.asarray(pictures[1]), expected)


def test_results_do_not_alias_buffers(engine):
    arguments = {"steps": 3, "class_labels": 1}
    first = engine.sample(**arguments, seeds=[1])
    kept = first.copy()
    first_tensor = engine.sample(**arguments, seeds=[1], output_type="pt")
    engine.sample(**arguments, seeds=[2])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first_tensor.numpy(), kept)
    x_T = np.ones((1, 1, 8, 8), np.float32)
    engine.sample(**arguments, x_T=x_T)
    assert np.all(x_T == 1)


def test_threads_share_an_engine(engine):
    expected = {seed: engine.sample(steps=3, seeds=seed, class_labels=seed % 3) for seed in range(6)}

    def check(first: int) -> None:
        for seed in itertools.islice(itertools.cycle(range(6)), first, first + 12):
            np.testing.assert_array_equal(engine.sample(steps=3, seeds=seed, class_labels=seed % 3), expected[seed])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(4)))


def test_progress_counts_network_evaluations(engine):
    seen: list[tuple[int, int]] = []
    engine.sample(steps=3, seeds=range(6), class_labels=0, progress=lambda done, total: seen.append((done, total)))
    # 6 samples in batches of 4 and 2; three steps each.
    assert seen == [(done, 6) for done in range(1, 7)]


def test_plans_are_chosen_by_steps_or_by_value(engine):
    assert engine.select_plan(steps=3).steps == 3
    assert engine.select_plan(plan=Plan(schedule=SCHEDULE, steps=4, eta=1.0)) == NOISY
    for held in engine.plans.values():
        assert held.key in engine.describe()
    for word in (engine.backend, "loop        stepwise", "up to 4", "3 classes", "guidance"):
        assert word in engine.describe()


def test_a_miss_lists_what_there_is(engine):
    for arguments in ({"steps": 5}, {"plan": Plan(schedule=SCHEDULE, steps=5)}):
        with pytest.raises(PlanNotFoundError) as caught:
            engine.sample(**arguments, seeds=0, class_labels=0)
        assert all(plan.key in caught.value.expected for plan in engine.plans.values())
    for arguments in ({}, {"steps": 3, "plan": NOISY}):
        with pytest.raises(InputError):
            engine.sample(**arguments, seeds=0, class_labels=0)


def test_two_plans_of_one_length_are_told_apart():
    engine = build(Curve(), sample_shape=(1, 4, 4), plans=[4, NOISY])
    with pytest.raises(PlanNotFoundError, match="2 plans"):
        engine.sample(steps=4, seeds=0)
    engine.sample(plan=NOISY, seeds=0)


def test_compile_on_miss():
    engine = build(Curve(), sample_shape=(1, 4, 4))
    assert engine.sample(steps=7, seeds=0).shape == (1, 1, 4, 4)
    engine.sample(plan=NOISY, seeds=0)
    assert sorted(plan.steps for plan in engine.plans.values()) == [4, 7]


def test_builds_from_a_folder_with_what_its_scheduler_says(tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler

    scheduler = DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", beta_schedule="scaled_linear", clip_sample=False
    )
    DDIMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    engine = build(tmp_path, plans=[5])
    plan = engine.select_plan(steps=5)
    assert (plan.prediction_type, plan.spacing, plan.clip) == ("v_prediction", "trailing", None)
    np.testing.assert_allclose(plan.schedule.alpha_bar, scheduler.alphas_cumprod, rtol=2e-5)
    assert engine.sample(steps=5, seeds=1).shape == (1, 1, 8, 8)
    with pytest.raises(PlanError, match="v_prediction"):
        engine.add_plan(Plan(schedule=SCHEDULE, steps=5))


class Broken(torch.nn.Module):
    """NaN for the second sample of a batch, from timestep 500 down."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bad = (torch.arange(len(x)) == 1) & (t < 500)
        return torch.where(bad.view(-1, 1, 1, 1), torch.nan, 0.1 * x)


@pytest.mark.parametrize("convention", ["diffusers", "guided", "paper"])
def test_nan_from_the_network_is_an_error_and_not_a_grey_image(convention):
    plan = Plan(schedule=SCHEDULE, steps=5, convention=convention)
    engine = build(Broken(), sample_shape=(1, 4, 4), plans=[plan], batch_sizes=[4])
    with pytest.raises(NonFiniteError) as caught:
        engine.sample(plan=plan, seeds=range(4))
    assert "samples [1] of 4" in caught.value.got


class ThreeHeads(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x, x], dim=1)


class Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "options", "error", "names"),
    [
        (Curve(), {}, InputError, "Curve"),
        (42, {}, InputError, "int"),
        (Curve(), {"sample_shape": (1, 4, 4), "batch_sizes": []}, InputError, "batch_sizes=[]"),
        (Curve(), {"sample_shape": (1, 4, 4), "batch_sizes": [0]}, InputError, "batch_sizes=0"),
        (Curve(), {"sample_shape": (1, 4, 4), "plans": [], "compile_on_miss": False}, PlanError, "no plans"),
        (Curve(), {"sample_shape": (1, 4, 4), "plans": [0]}, PlanError, "steps=0"),
        (Curve(), {"sample_shape": (1, 4, 4), "schedule": None}, PlanError, "step count 3"),
        (Curve(), {"sample_shape": (1, 4, 4), "backend": "magic"}, InputError, "backend='magic'"),
        (Curve(), {"sample_shape": (1, 4, 4), "device": "quantum"}, InputError, "device='quantum'"),
        (Curve(), {"sample_shape": (1, 4, 4), "device": "cuda:99"}, DeviceUnavailableError, "cuda:99"),
        (Curve(), {"sample_shape": (1, 4, 4), "num_classes": 3}, InputError, "TypeError"),
        (ThreeHeads(), {"sample_shape": (1, 4, 4)}, InputError, "[1, 3, 4, 4]"),
        (torch.nn.Conv2d(1, 1, 1).double(), {"sample_shape": (1, 4, 4)}, InputError, "torch.float64"),
        (Branching(), {"sample_shape": (1, 4, 4), "backend": "onnxruntime"}, ExportError, "Branching"),
    ],
)
def test_refuses_to_build(model, options, error, names):
    with pytest.raises(error) as caught:
        build(model, **{"plans": [3], **options})
    assert names in str(caught.value)
    assert isinstance(caught.value, SkipstepError)


def test_a_missing_backend_names_its_extra(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(MissingDependencyError, match=r"skipstep\[cpu,export\]"):
        build(Curve(), sample_shape=(1, 4, 4), backend="onnxruntime")
    assert build(Curve(), sample_shape=(1, 4, 4), backend="auto").backend == "torch"


@pytest.mark.slow
def test_an_export_that_differs_from_its_module_is_refused(monkeypatch):
    """The graph of a network with other weights stands for an exporter that went wrong."""
    from skipstep.backends.torch import DenoisingModule
    from skipstep.export import onnx_model

    real = onnx_model.export_onnx
    other = tiny_unet()
    for parameter in other.parameters():
        parameter.data.mul_(1.01)
    monkeypatch.setattr(onnx_model, "export_onnx", lambda module, spec: real(DenoisingModule(other), spec))
    with pytest.raises(ExportError, match="off by"):
        build(tiny_unet(), backend="onnxruntime")


def test_an_unknown_output_type(labelled):
    with pytest.raises(InputError, match="output_type='jpg'"):
        labelled.sample(steps=3, seeds=0, output_type="jpg")

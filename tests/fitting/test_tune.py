"""Tuning: what is offered, what is measured beside, and that it goes on where it was."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import SCHEDULE, build
from fitting_cases import SHAPE, SMALL, WEIGHTS
from onnx import TensorProto, helper

from skipstep import Plan, load
from skipstep.commands.main import main
from skipstep.errors import BundleError, InputError, NonFiniteError, PlanError, SkipstepError
from skipstep.export.bundle_rewriter import add_plans
from skipstep.fitting import tune
from skipstep.fitting.reference import Denoiser
from skipstep.fitting.report import TEXTBOOK, frechet
from skipstep.fitting.resume import KeptParts
from skipstep.latency.calibration import Calibration, Latency, RunKind
from skipstep.plans.fit import Fit, Quality, with_quality


def test_tuned_plans_are_nearer_and_the_same_again(curve):
    report = curve.tune(steps=[3, 5], **SMALL)
    for each in report.found:
        assert each.offered
        assert each.rmse["fitted"] < 0.8 * min(each.rmse[name] for name in ("ddim", "dpm_solver_pp_2m", "unipc_2"))
        assert each.plan.fit.rmse == each.rmse["fitted"]
    again = curve.tune(steps=[5, 3, 3], **SMALL)
    assert [plan.key for plan in again.plans] == [plan.key for plan in report.plans]
    assert "fitted, RMSE" in str(report)
    assert "16 noises that the fit did not see" in str(report)
    moved = curve.tune(steps=[5], **{**SMALL, "rounds": 0}).found[0]
    assert report.found[1].rmse["fitted"] <= moved.rmse["fitted"] * 1.15


def test_the_engines_own_plans_are_measured_beside(gaussian):
    held = [gaussian.add_plan(each) for each in (3, 40)]
    noisy = gaussian.add_plan(Plan(schedule=SCHEDULE, steps=3, clip=None, eta=1.0))
    report = gaussian.tune(steps=[3], **SMALL)
    found = {plan.key: plan for plan in report.held}
    assert {plan.key for plan in held} <= found.keys()
    assert noisy.key not in found
    few, many = (found[plan.key].quality for plan in held)
    assert few.rmse > 4 * many.rmse > 0.0
    assert report.plans[0].quality.rmse == report.found[0].rmse["fitted"]
    assert held[0].quality is None


class Kept(dict):
    """A cache in memory, which counts what was put into it."""

    def __call__(self, description, parts):
        key = (description, *sorted(parts.items()))
        return SimpleNamespace(get=lambda: self.get(key), put=lambda data: self.__setitem__(key, data))


def test_an_interrupted_tuning_goes_on_where_it_was(curve, monkeypatch):
    monkeypatch.setattr(curve.plans, "network_digest", "0" * 64)
    kept, whole = Kept(), curve.tune(steps=[3, 5], **SMALL)
    integrations, done = [], []

    def stop(steps, _):
        done.append(steps)
        if len(done) > 2 * SMALL["nodes"] + 1:
            raise KeyboardInterrupt

    real = tune.integrate
    monkeypatch.setattr(tune, "integrate", lambda *a, **k: integrations.append(1) or real(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        curve.tune(steps=[3, 5], progress=stop, keep=kept, **SMALL)
    assert (len(integrations), len(kept)) == (3, 5)
    again = curve.tune(steps=[3, 5], keep=kept, **SMALL)
    assert len(integrations) == 3
    assert [plan.key for plan in again.plans] == [plan.key for plan in whole.plans]
    curve.tune(steps=[3], keep=kept, **{**SMALL, "noises": 17})
    assert len(integrations) == 6


def test_what_is_kept_is_of_one_calls_conditions(bundle):
    with load(bundle) as engine:
        calls = [[Denoiser.of(engine, np.arange(2, dtype=np.uint64), class_labels=label)] for label in (0, 1, 0)]
        kept = [KeptParts.of(None, each, network="", runs_on=("", ""), nodes=8, rounds=0).facts for each in calls]
    assert kept[0] == kept[2] != kept[1]


def test_one_plan_for_a_range_of_guidance_scales(bundle):
    with load(bundle) as engine:
        report = engine.tune(steps=[3], guidance_scale=[1.0, 3.0], noises=12, held_out=12, nodes=112, rounds=0)
        plan = report.found[0].fitted
        assert (plan.fit.guidance_scale, plan.fit.highest_guidance_scale) == (1.0, 3.0)
        assert "at guidance scale 1, 3" in str(report)
        engine.add_plan(plan)
        for scale in (0.5, 1.0, 6.0):
            engine.sample(plan=plan, seeds=1, class_labels=0, guidance_scale=scale)
        with pytest.raises(InputError, match=r"from 0\.5 to 6"):
            engine.sample(plan=plan, seeds=1, class_labels=0, guidance_scale=7.0)


def test_a_deadline_leaves_out_a_plan_for_another_guidance_scale(bundle):
    fit = Fit(None, 2.0, 8, 0, "a test", rmse=0.001)
    fitted = Plan(schedule=SCHEDULE, timesteps=[900, 300], solver="fitted", weights=WEIGHTS, fit=fit)
    with load(bundle) as engine:
        held = next(iter(engine.plans.values()))
        engine.add_plan(with_quality(held, Quality(0.1, 2.0)))
        engine.add_plan(fitted)
        latencies = {RunKind(key, 1, True): Latency(1.0, 1.0, 1.0, 100) for key in engine.plans}
        engine.calibration = Calibration(engine.identity(), latencies)
        drawn = {
            scale: engine.sample(deadline_ms=10.0, seeds=1, class_labels=0, guidance_scale=scale)
            for scale in (2.0, 6.0)
        }
        for scale, plan in ((2.0, fitted), (6.0, held)):
            wanted = engine.sample(plan=plan, seeds=1, class_labels=0, guidance_scale=scale)
            np.testing.assert_array_equal(drawn[scale], wanted)


def test_a_plan_that_is_worse_in_distribution_is_not_offered(curve):
    converged = curve.tune(steps=[4], **SMALL).found[0]
    fitted = curve.sample(plan=converged.fitted, seeds=range((1 << 32) + 16, (1 << 32) + 32))

    def features(images):
        """Far from everything else for what the fitted plan draws."""
        return np.stack(
            [images.mean(axis=(1, 2, 3)), 9.0 * np.isclose(images, fitted, atol=1e-6).all(axis=(1, 2, 3))], 1
        )

    found = curve.tune(steps=[4], features=features, **SMALL).found[0]
    assert found.distance["fitted"] > found.distance["ddim"]
    assert not found.offered
    assert found.plan.solver in ("ddim", "dpm_solver_pp_2m", "unipc_2")


def test_a_judge_that_names_classes_says_how_many_it_recognises(bundle):
    with load(bundle) as engine:

        def judge(images):
            """Sees class 0 everywhere."""
            return images.mean(axis=(2, 3)), np.zeros(len(images), np.int64)

        options = {**SMALL, "nodes": 112, "guidance_scale": 1.5, "features": judge}
        report = engine.tune(steps=[3], class_labels=[0, 1] * (SMALL["noises"] // 2), **options)
        assert report.found[0].recognised == dict.fromkeys(("fitted", *TEXTBOOK), 0.5)
        assert "50.0%" in str(report)
        assert "fitted, recognised" in str(report)
        for wrong in (lambda images: images.mean(axis=(2, 3))[1:], lambda images: (images.mean(axis=(2, 3)), [0])):
            with pytest.raises(InputError, match="for each image"):
                engine.tune(steps=[3], **{**options, "features": wrong})


def test_a_frechet_distance_of_normals():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((100_000, 2)), rng.standard_normal((100_000, 2)) * [2.0, 1.0] + [3.0, 0.0]
    assert frechet(a, b) == pytest.approx(9.0 + 1.0, rel=0.02)
    assert frechet(a, a) < 1e-9
    with pytest.raises(InputError, match="more samples"):
        frechet(a[:2], b[:2])


class Chaos(torch.nn.Module):
    def forward(self, x, t):
        return torch.sin(4000.0 * x) * 3.0


class Broken(torch.nn.Module):
    def forward(self, x, t):
        return x / (t.view(-1, 1, 1, 1) - t.view(-1, 1, 1, 1))


@pytest.mark.parametrize(
    ("network", "error", "said"), [(Chaos(), PlanError, "end .* apart"), (Broken(), NonFiniteError, "NaN")]
)
def test_networks_that_do_not_converge(network, error, said):
    with build(network, sample_shape=SHAPE, batch_sizes=[16]) as engine:
        engine.plans.defaults["clip"] = None
        with pytest.raises(error, match=said):
            engine.tune(steps=[3], **SMALL)


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": [2000]},
        {"steps": []},
        {"steps": 5},
        {"steps": [0]},
        {"noises": 3},
        {"held_out": 0},
        {"nodes": 4},
        {"seed": -1},
        {"rounds": -1},
        {"features": 3},
        {"progress": "x"},
        {"guidance_scale": np.nan},
        {"guidance_scale": 2.0},  # The network cannot be guided.
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_refused_at_once(curve, arguments):
    with pytest.raises(SkipstepError):
        curve.tune(**{**SMALL, "steps": [3], **arguments})


def feature_network(path):
    """Each channel's mean, as an ONNX file."""
    images, features = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("images", ["n", "c", "h", "w"]), ("features", ["n", "c"]))
    )
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
    ]
    graph = helper.make_graph(nodes, "means", [images], [features])
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    )
    return str(path)


def test_the_command_stores_what_is_better(bundle, tmp_path, capsys):
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    options = ["--noises", "8", "--held-out", "8", "--rounds", "0", "--guidance", "1.5", "--nodes", "112"]
    judge = ["--features", feature_network(tmp_path / "means.onnx")]
    assert main(["tune", str(copy), "--steps", "2", "4", *options, *judge, "--dry-run"]) == 0
    assert "fitted, distance" in capsys.readouterr().out
    assert main(["tune", str(copy), "--features", str(tmp_path)]) == 2
    assert "--features FILE.onnx" in capsys.readouterr().err
    assert main(["verify", str(copy)]) == 0
    assert len(load(copy).plans) == 1
    assert main(["tune", str(copy), "--steps", "2", "4", *options]) == 0
    out = capsys.readouterr().out
    assert "stored 2 plans" in out
    assert "the quality of 1 that it held" in out
    with load(copy) as engine:
        assert engine.select_plan(steps=3).quality.guidance_scale == 1.5
    with load(copy) as engine:
        plan = engine.select_plan(steps=4)
        assert (plan.solver, plan.fit.guidance_scale, plan.fit.network) == ("fitted", 1.5, engine.plans.network_digest)
        engine.sample(steps=4, seeds=1, class_labels=0, guidance_scale=1.5)
        with pytest.raises(InputError, match=r"fitted at 1\.5"):
            engine.sample(steps=4, seeds=1, class_labels=0, guidance_scale=4.0)
        engine.add_plan(plan, allow_mismatch=True)
        engine.sample(steps=4, seeds=1, class_labels=0, guidance_scale=4.0)
    assert main(["verify", str(copy)]) == 0
    with load(bundle) as engine, pytest.raises(BundleError, match="replaced meanwhile"):
        add_plans(bundle, [plan], digest="0" * 64)


def test_a_network_of_zero_terminal_snr_has_textbook_plans_to_compare_with():
    schedule = SCHEDULE.rescaled_to_zero_terminal_snr()
    for solver in TEXTBOOK:
        plan = Plan(schedule=schedule, steps=4, solver=solver, prediction_type="v_prediction")
        assert np.all(np.isfinite(plan.coefficients))

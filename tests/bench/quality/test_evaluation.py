"""`skipstep evaluate` on a small grid: what it writes, that it goes on where it was, and its two formulas."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from demo_data import write_fashion_mnist
from PIL import Image
from tiny_networks import tiny_unet

from skipstep import NoiseSchedule, Plan
from skipstep.bench.quality.evaluation import Evaluation, Grid, gaussian_spread, proxy_frechet_distance
from skipstep.bench.quality.evaluation_report import evaluate
from skipstep.commands.main import main
from skipstep.demo import SHIPPED_MODEL
from skipstep.errors import InputError, MissingDependencyError

SMALL = Grid(
    steps=(2, 50),
    etas=(0.0, "sigma-hat"),
    evaluations=(4,),
    spread_etas=(0.0, 1.0),
    spread_steps=3,
    inversion_steps=(3, 10),
    refinements=1,
    ancestral_steps=4,
    compared_steps=(2,),
    strip_steps=(1, 2),
    picture_steps=3,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_fashion_mnist(folder, train=200, test=100)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, data):
    return Evaluation(
        SHIPPED_MODEL, tmp_path_factory.mktemp("out"), num_samples=2, data=data, grid=SMALL, backend="torch"
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory, evaluation):
    folder = tmp_path_factory.mktemp("page")
    evaluate(evaluation, folder, command="skipstep evaluate --num 2")
    return folder


@pytest.mark.slow
def test_writes_tables_plots_and_a_page_that_shows_them(page):
    text = (page / "evaluation.md").read_text()
    shown = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert sorted(shown) == sorted(path.name for path in page.glob("*.png"))
    for name in shown:
        assert np.asarray(Image.open(page / name).convert("L")).std() > 5
    for words in ("skipstep evaluate --num 2", "2 samples a case", "not FID", "Song, Meng and Ermon", "σ̂"):
        assert words in text
    rows = list(csv.DictReader((page / "quality.csv").open()))
    assert [(row["steps"], row["eta"]) for row in rows] == [
        ("2", "0.0"),
        ("2", "sigma-hat"),
        ("50", "0.0"),
        ("50", "sigma-hat"),
    ]
    # Quadratic spacing has no fifty distinct timesteps.
    spacings = {(row["spacing"], row["steps"]) for row in csv.DictReader((page / "spacings.csv").open())}
    assert ("trailing", "50") in spacings
    assert ("quadratic", "50") not in spacings
    assert "–" in text


@pytest.mark.slow
def test_each_solver_stays_within_its_evaluations(page):
    for row in csv.DictReader((page / "solvers.csv").open()):
        assert int(row["evaluations"]) <= 4


@pytest.mark.slow
def test_deterministic_samplers_repeat_themselves(page):
    rows = {row["sampler"]: row for row in csv.DictReader((page / "ancestral.csv").open())}
    assert float(rows["DDIM, 2 steps"]["mse_between_two_runs"]) == 0.0
    assert float(rows["DDPM, 4 steps"]["mse_between_two_runs"]) > 1e-3
    spread = list(csv.DictReader((page / "spread.csv").open()))
    assert float(spread[0]["variance"]) == 0.0 < float(spread[1]["variance"])


@pytest.mark.slow
def test_a_second_run_measures_nothing_again(page, evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(type(evaluation.engine), "sample", lambda *_, **__: pytest.fail("measured again"))
    before = {name: getattr(evaluation, name)() for name in ("spread", "inversion", "ancestral")}
    assert evaluation.quality_by_solver()
    assert before["spread"][0]["eta"] == 0.0


def test_a_larger_run_builds_on_a_smaller_one(tmp_path, data, monkeypatch):
    first = Evaluation(SHIPPED_MODEL, tmp_path, num_samples=32, data=data, grid=SMALL, backend="torch")
    plan = first.plan(steps=2)
    judged = first._judge(plan)
    second = Evaluation(SHIPPED_MODEL, tmp_path, num_samples=34, data=data, grid=SMALL, backend="torch")
    drawn: list[int] = []
    sample = second.engine.sample

    def counted(**arguments):
        drawn.extend(arguments["seeds"])
        return sample(**arguments)

    monkeypatch.setattr(second.engine, "sample", counted)
    larger = second._judge(plan)
    assert drawn == [32, 33]
    np.testing.assert_array_equal(larger.features[:32], judged.features)


def test_distance_of_gaussians_by_its_formula():
    """|m1 - m2|² + Σ (s1 - s2)² for independent features."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20_000, 128)).astype(np.float32)
    b = (2.0 * rng.standard_normal((20_000, 128)) + 0.5).astype(np.float32)
    assert proxy_frechet_distance(a, b) == pytest.approx(128 * (0.25 + 1.0), rel=0.02)
    assert proxy_frechet_distance(a, a) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(("eta", "exact"), [(0, 0), (0.25, 0.193), (0.5, 0.396), (0.75, 0.425), (1, 0.405)])
def test_spread_of_gaussian_data(eta, exact):
    plan = Plan(schedule=NoiseSchedule.linear(1000), steps=50, spacing="leading", eta=eta)
    assert gaussian_spread(plan, float(eta)) == pytest.approx(exact, abs=6e-4)


def test_bad_input(tmp_path, data, capsys):
    with pytest.raises(InputError, match="--num 1"):
        Evaluation(SHIPPED_MODEL, tmp_path, num_samples=1, data=data)
    tiny_unet().save_pretrained(tmp_path / "model" / "unet")
    with pytest.raises(InputError, match="Fashion-MNIST"):
        Evaluation(tmp_path / "model", tmp_path, num_samples=2, data=data)
    with pytest.raises(MissingDependencyError, match="dataset-fashion-mnist"):
        Evaluation(SHIPPED_MODEL, tmp_path, num_samples=2, data=tmp_path)
    assert main(["evaluate", "--num", "1", "--out", str(tmp_path), "--data", str(data)]) == 2
    assert "--num 1" in capsys.readouterr().err

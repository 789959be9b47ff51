"""`skipstep evaluate` on a small grid: what it writes, that it goes on where it was, and its judges and statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from demo_data import write_fashion_mnist
from PIL import Image
from tiny_networks import tiny_unet

from skipstep import Engine, NoiseSchedule, Plan, load
from skipstep.bench.quality.data import load_fashion_mnist
from skipstep.bench.quality.evaluation import Evaluation, Grid, gaussian_spread
from skipstep.bench.quality.evaluation_report import evaluate
from skipstep.bench.quality.judge import ShippedJudge, read_images
from skipstep.bench.quality.statistics import Estimate, FrechetDistance, estimate, kernel_distance, share
from skipstep.commands.main import main
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import InputError
from skipstep.fitting.judge import OnnxJudge
from skipstep.fitting.report import frechet

SMALL = Grid(
    fitted_beside=(),
    steps=(2, 50),
    etas=(0.0, "sigma-hat"),
    spacings=("quadratic",),
    spacing_steps=(2, 50),
    solvers=("heun",),
    evaluations=(4,),
    spread_etas=(0.0, 1.0),
    spread_steps=3,
    spread_runs=3,
    inversion_steps=(3,),
    inversion_images=2,
    refinements=1,
    strip_steps=(1, 2),
    picture_steps=3,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_fashion_mnist(folder, train=200, test=100)
    return folder


@pytest.fixture(scope="module")
def engine():
    with load(SHIPPED_BUNDLE, compile_on_miss=True) as engine:
        yield engine


def an_evaluation(engine, data, folder, **options):
    reference = load_fashion_mnist("test", data)[0]
    return Evaluation(engine, ShippedJudge(), reference, folder, **{"num": 2, "num_long": 2, "grid": SMALL, **options})


@pytest.fixture(scope="module")
def evaluation(engine, data, tmp_path_factory):
    return an_evaluation(engine, data, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def page(evaluation):
    return evaluate(evaluation, command="skipstep evaluate --num 2").parent


@pytest.mark.slow
def test_writes_tables_plots_and_a_page_that_shows_them(page):
    text = (page / "evaluation.md").read_text()
    shown = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert sorted(shown) == sorted(path.name for path in page.glob("*.png"))
    for name in shown:
        assert np.asarray(Image.open(page / name).convert("L")).std() > 5
    for words in ("skipstep evaluate --num 2", "2 samples a case", "not FID", "Song, Meng and Ermon", "σ̂"):
        assert words in text
    for file, column in (("fitted-plans", "fitted"), ("steps", "0"), ("spacings", "trailing"), ("solvers", "heun")):
        table = json.loads((page / f"{file}.json").read_text())
        assert column in {row[0] for row in table["rows"]}
        assert all(len(row) == len(table["header"]) for row in table["rows"])
    # Quadratic spacing has no fifty distinct timesteps; of a plan that adds noise there is no converged image.
    assert ["quadratic", "50"] not in [row[:2] for row in json.loads((page / "spacings.json").read_text())["rows"]]
    steps = {tuple(row[:2]): row[5] for row in json.loads((page / "steps.json").read_text())["rows"]}
    assert steps["σ̂", "2"] == "–" != steps["0", "2"]


@pytest.mark.slow
def test_rows_say_what_they_are_of(page, evaluation):
    rows = json.loads((page / "rows.json").read_text())["rows"]
    fitted = [row for row in rows.values() if row.get("solver") == "fitted"]
    assert [row["evaluations"] for row in fitted] == [4, 6, 8]
    assert {row["guidance"] for row in fitted} == {2.0}
    heun = next(row for row in rows.values() if row.get("solver") == "heun")
    assert heun["evaluations"] == 3, "two steps would take 3, three 5: at most 4"
    assert heun["rmse"]["low"] <= heun["rmse"]["value"] <= heun["rmse"]["high"]
    assert rows["spread 0"]["variance"]["value"] < 1e-9 < rows["spread 1"]["variance"]["value"]
    # Nothing is measured again, by this evaluation or by another of the same.
    again = Evaluation(
        evaluation.engine, evaluation._judge, evaluation.reference, page, num=2, num_long=2, grid=evaluation.grid
    )
    again.engine = None
    assert [again.measure(case) for case in evaluation.cases()] == [evaluation.measure(c) for c in evaluation.cases()]


def test_half_a_case_is_not_drawn_again(engine, data, tmp_path, monkeypatch):
    first = an_evaluation(engine, data, tmp_path, num=3)
    case = first.cases()[0]
    features, right, squares = first._draw(case)
    assert len(features) == len(right) == len(squares) == 3
    monkeypatch.setattr(type(engine), "sample", lambda *_, **__: pytest.fail("drawn again"))
    again = an_evaluation(engine, data, tmp_path, num=3)._draw(case)
    np.testing.assert_array_equal(again[0], features)
    first._keep("a row", {"value": Estimate(1.0, 0.5, 2.0)})
    with pytest.raises(InputError, match="of another network, judge, reference or number"):
        an_evaluation(engine, data, tmp_path, num=2)


class Squares(torch.nn.Module):
    """Features and, where it is asked for, logits of images: their first pixels, squared."""

    def __init__(self, classes=True):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        features = images.flatten(1)[:, :4] ** 2
        return (features, features[:, :3]) if self.classes else features


def exported(path, network, shape):
    torch.onnx.export(
        network, (torch.zeros(2, *shape),), path, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False
    )
    return path


def test_any_network_is_judged_by_any_feature_network(tmp_path):
    shape = (3, 8, 8)
    judge = OnnxJudge(exported(tmp_path / "judge.onnx", Squares(), shape))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (20, *shape)).astype(np.float32)
    features, seen = judge(images)
    np.testing.assert_allclose(features, images.reshape(20, -1)[:, :4] ** 2, rtol=1e-6)
    np.testing.assert_array_equal(seen, features[:, :3].argmax(axis=1))
    without_classes = OnnxJudge(exported(tmp_path / "features.onnx", Squares(classes=False), shape))
    assert without_classes(images)[1] is None
    network = tiny_unet(sample_size=8, in_channels=3, out_channels=3)
    engine = Engine.build(
        network, plans=[], batch_sizes=[3], schedule=NoiseSchedule.linear(1000), compile_on_miss=True, backend="torch",
        sample_shape=shape,
    )  # fmt: skip
    small = Grid(tables=("steps",), steps=(2,), etas=(0.0,))
    evaluation = Evaluation(engine, without_classes, images, tmp_path / "out", num=6, num_long=2, grid=small)
    (case,) = evaluation.cases()
    row = evaluation.measure(case)
    assert row["recognised"] is None
    assert row["kernel"] is None
    assert row["frechet"]["value"] > 0.0 < row["rmse"]["value"]
    text = evaluate(evaluation, command="skipstep evaluate --tables steps").read_text()
    assert "## Steps and η" in text
    assert not any(title in text for title in ("## Spacings", "## Inversion", "## Pictures"))


def test_reference_images_are_pictures_or_an_array(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    np.save(tmp_path / "bytes.npy", pixels)
    expected = pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    np.save(tmp_path / "floats.npy", expected)
    for name in ("pictures", "bytes.npy", "floats.npy"):
        np.testing.assert_allclose(read_images(tmp_path / name, (3, 6, 5)), expected, atol=1e-6)
    for name, shape in (("pictures", (3, 5, 6)), ("bytes.npy", (1, 6, 5)), ("nothing.npy", (3, 6, 5))):
        with pytest.raises(InputError, match="--reference"):
            read_images(tmp_path / name, shape)


def test_distances_by_their_formulas():
    """|m1 - m2|² + Σ (s1 - s2)² for independent features; the kernel's mean is near 0 for one distribution."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20_000, 16)).astype(np.float32)
    b = (2.0 * rng.standard_normal((20_000, 16)) + 0.5).astype(np.float32)
    distance = FrechetDistance(b)
    assert distance.of(a) == pytest.approx(16 * (0.25 + 1.0), rel=0.02)
    assert distance.of(b) == pytest.approx(0.0, abs=1e-3)
    assert distance.of(a) == pytest.approx(frechet(a.astype(np.float64), b.astype(np.float64)), rel=1e-6)
    alike, other = kernel_distance(a[:4000], a[4000:8000]), kernel_distance(a[:4000], b[:4000])
    assert abs(alike.value) < 0.01 < 0.1 < other.low < other.value < other.high
    assert kernel_distance(a[:400], b[:400]) is None


def test_an_interval_holds_the_true_value_nineteen_times_of_twenty():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        values = rng.standard_normal(100)
        found = estimate(lambda at, values=values: float(values[at].mean()), 100)
        held += found.low <= 0.0 <= found.high
    assert 180 <= held <= 199
    few = share(np.arange(50) > 0)
    assert few.low < few.value == 0.98 < few.high <= 1.0


@pytest.mark.parametrize(("eta", "exact"), [(0, 0), (0.25, 0.193), (0.5, 0.396), (0.75, 0.425), (1, 0.405)])
def test_spread_of_gaussian_data(eta, exact):
    plan = Plan(schedule=NoiseSchedule.linear(1000), steps=50, spacing="leading", eta=eta)
    assert gaussian_spread(plan, float(eta)) == pytest.approx(exact, abs=6e-4)


def test_bad_input(tmp_path, data, capsys):
    def refused(*arguments):
        assert main(["evaluate", "--out", str(tmp_path / "out"), "--data", str(data), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "beside 100 reference images" in refused("--num", 101)
    assert "got 1 samples" in refused("--num", 1)
    assert "one of fitted-plans, steps, spacings" in refused("--tables", "stepps")
    assert "dataset-fashion-mnist" in refused("--data", tmp_path)
    (tmp_path / "judge.onnx").write_bytes(b"not onnx")
    assert "a feature network" in refused("--features", tmp_path / "judge.onnx")
    assert "--reference FOLDER" in refused("--reference", tmp_path / "none.npy")
    tiny_unet().save_pretrained(tmp_path / "model" / "unet")
    (tmp_path / "model" / "scheduler").mkdir()
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "without --features and --reference" in refused("--model", tmp_path / "model")

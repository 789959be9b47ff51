import numpy as np
import pytest
from tolerances import FLOAT32_SCHEDULE, FLOAT64

from skipstep import NoiseSchedule
from skipstep.errors import ScheduleError


@pytest.mark.parametrize(
    ("ours", "config"),
    [
        (NoiseSchedule.linear(1000), {"beta_schedule": "linear"}),
        (
            NoiseSchedule.linear(50, beta_start=1e-3, beta_end=0.1),
            {"num_train_timesteps": 50, "beta_start": 1e-3, "beta_end": 0.1},
        ),
        (
            NoiseSchedule.scaled_linear(1000),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (NoiseSchedule.cosine(1000), {"beta_schedule": "squaredcos_cap_v2"}),
        (NoiseSchedule.sigmoid(1000), {"beta_schedule": "sigmoid"}),
    ],
    ids=["linear", "linear-50", "scaled_linear", "cosine", "sigmoid"],
)
def test_equals_diffusers_to_the_rounding_of_its_float32(ours, config):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours.alpha_bar, theirs, rtol=FLOAT32_SCHEDULE)


def test_linear_from_its_definition():
    betas = [1e-4 + (0.02 - 1e-4) * i / 9 for i in range(10)]
    expected, level = [], 1.0
    for beta in betas:
        level *= 1.0 - beta
        expected.append(level)
    np.testing.assert_allclose(NoiseSchedule.linear(10).alpha_bar, expected, rtol=FLOAT64)
    assert NoiseSchedule.linear(10).alpha_bar.dtype == np.float64


def test_constructors_agree():
    schedule = NoiseSchedule.linear(100)
    betas = np.linspace(1e-4, 0.02, 100)
    assert NoiseSchedule.from_betas(betas) == schedule
    assert NoiseSchedule.from_alphas_cumprod(schedule.alpha_bar) == schedule
    assert hash(NoiseSchedule.from_betas(betas)) == hash(schedule)
    assert schedule != NoiseSchedule.linear(101)
    assert schedule.num_timesteps == 100


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_noise():
    schedule = NoiseSchedule.scaled_linear()
    rescaled = schedule.rescaled_to_zero_terminal_snr()
    assert rescaled.alpha_bar[-1] == 0.0
    np.testing.assert_allclose(rescaled.alpha_bar[0], schedule.alpha_bar[0], rtol=FLOAT64)
    assert np.all(np.diff(rescaled.alpha_bar) < 0.0)


def test_is_immutable_and_does_not_share_memory_with_its_source():
    source = np.linspace(0.9, 0.1, 5)
    schedule = NoiseSchedule(source)
    source[:] = 0.5
    assert schedule.alpha_bar[0] == 0.9
    with pytest.raises(ValueError, match="read-only"):
        schedule.alpha_bar[0] = 0.5


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: NoiseSchedule.linear(0), "num_timesteps=0"),
        (lambda: NoiseSchedule.linear(True), "num_timesteps=True"),
        (lambda: NoiseSchedule.cosine(10.5), "num_timesteps=10.5"),
        (lambda: NoiseSchedule.linear(10, beta_start=-0.1), "beta_start=-0.1"),
        (lambda: NoiseSchedule.scaled_linear(10, beta_start=-0.1), "beta_start=-0.1"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.0]), "betas between"),
        (lambda: NoiseSchedule.from_betas([]), "shape"),
        (lambda: NoiseSchedule.from_betas([[0.1]]), "shape"),
        (lambda: NoiseSchedule.from_betas(["a"]), "no numbers"),
        (lambda: NoiseSchedule.from_betas([0.1, float("nan")]), "NaN"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.9]), "alpha_bar[0]"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.9]), "alpha_bar[0]"),
        (lambda: NoiseSchedule.from_alphas_cumprod([1.0, 0.9]), "alpha_bar between"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.9, -0.1]), "alpha_bar between"),
    ],
)
def test_refuses_what_is_no_schedule(build, names):
    with pytest.raises(ScheduleError) as caught:
        build()
    assert names in caught.value.got
    assert caught.value.remedy in str(caught.value)

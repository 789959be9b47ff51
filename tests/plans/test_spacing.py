import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstep import NoiseSchedule, Plan
from skipstep.errors import PlanError
from skipstep.plans.spacing import SPACINGS, space_timesteps

LINEAR = NoiseSchedule.linear(1000)


def test_known_grids():
    assert space_timesteps("leading", LINEAR, steps=4) == (750, 500, 250, 0)
    assert space_timesteps("leading", LINEAR, steps=4, offset=1) == (751, 501, 251, 1)
    assert space_timesteps("trailing", LINEAR, steps=4) == (999, 749, 499, 249)
    assert space_timesteps("linspace", LINEAR, steps=4) == (999, 666, 333, 0)
    assert space_timesteps("quadratic", LINEAR, steps=4) == (999, 444, 111, 0)
    assert space_timesteps("paper_quadratic", LINEAR, steps=5) == (800, 450, 200, 50, 0)
    assert space_timesteps("log", LINEAR, steps=4) == (999, 99, 9, 0)
    for spacing in SPACINGS:
        assert space_timesteps(spacing, LINEAR, steps=1) == ({"leading": 0, "paper_quadratic": 800}.get(spacing, 999),)


@pytest.mark.parametrize(
    ("spacing", "ruler"),
    [
        ("logsnr", lambda a: np.log(a / (1 - a))),
        ("karras", lambda a: ((1 - a) / a) ** (1 / 14)),
    ],
)
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_spacings_by_noise_take_the_nearest_levels(spacing, ruler, steps):
    places = ruler(LINEAR.alpha_bar)
    timesteps = space_timesteps(spacing, LINEAR, steps=steps)
    assert (timesteps[0], timesteps[-1]) == (999, 0)
    for wanted, t in zip(np.linspace(places[999], places[0], steps), timesteps, strict=True):
        assert np.abs(places - wanted).min() == pytest.approx(abs(places[t] - wanted), abs=1e-12)


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_spacings_by_noise_need_some_signal(spacing):
    schedule = LINEAR.rescaled_to_zero_terminal_snr()
    with pytest.raises(PlanError, match="zero terminal SNR"):
        space_timesteps(spacing, schedule, steps=10)
    assert space_timesteps("trailing", schedule, steps=2) == (999, 499)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers_for_every_step_count(spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for steps in range(1, 1001):
        if spacing == "linspace" and steps == 1:
            continue  # There diffusers visits timestep 0 alone, where there is no noise to remove.
        scheduler.set_timesteps(steps)
        theirs = tuple(scheduler.timesteps.tolist())
        if len(theirs) != steps:
            continue  # Its floating-point range has one index too many.
        ours = space_timesteps(spacing, LINEAR, steps=steps)
        for i, (t, their_t) in enumerate(zip(ours, theirs, strict=True)):
            if t != their_t:  # An exact half, that their floating-point range misses by an ulp.
                exact = 1000 * (steps - i) / steps if spacing == "trailing" else 999 * (steps - 1 - i) / (steps - 1)
                assert (abs(t - their_t), exact % 1) == (1, pytest.approx(0.5)), (steps, t, their_t)


@given(
    spacing=st.sampled_from(SPACINGS),
    num_timesteps=st.integers(1, 2000),
    fraction=st.floats(0.0, 1.0),
)
def test_exactly_the_asked_number_of_distinct_indices_or_the_largest_that_works(spacing, num_timesteps, fraction):
    steps = max(1, round(fraction * num_timesteps))
    try:
        timesteps = space_timesteps(spacing, NoiseSchedule.linear(num_timesteps), steps=steps)
    except PlanError as error:
        largest = int(error.expected.split()[2])
        assert largest < num_timesteps
        assert len(space_timesteps(spacing, NoiseSchedule.linear(num_timesteps), steps=largest)) == largest
        with pytest.raises(PlanError):
            space_timesteps(spacing, NoiseSchedule.linear(num_timesteps), steps=largest + 1)
    else:
        assert len(timesteps) == steps
        assert np.all(np.diff(timesteps) < 0)
        assert timesteps[-1] >= 0
        assert timesteps[0] < num_timesteps


def test_an_offset_that_leaves_the_schedule_is_refused():
    with pytest.raises(PlanError, match="steps_offset=1") as caught:
        space_timesteps("leading", LINEAR, steps=1000, offset=1)
    assert "at most" in caught.value.expected


@pytest.mark.parametrize("steps", [0, -1, 1001, 10.0, True, None, "10"])
def test_refuses_impossible_step_counts(steps):
    with pytest.raises(PlanError, match="1000"):
        space_timesteps("trailing", LINEAR, steps=steps)


def test_refuses_an_unknown_spacing_and_lists_the_known():
    with pytest.raises(PlanError, match="trailing") as caught:
        space_timesteps("cubic", LINEAR, steps=10)
    assert all(name in caught.value.expected for name in SPACINGS)


@pytest.mark.parametrize("steps", [2, 7, 20, 1000])
def test_interpolated_levels_are_those_of_diffusers(steps):
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    plan = Plan(schedule=LINEAR, steps=steps, spacing="interpolated", time_input="sigma", clip=None)
    np.testing.assert_allclose(plan.evaluation_timesteps, scheduler.sigmas[:-1], rtol=1e-4)
    assert Plan(schedule=plan.schedule, **plan.options()).key == plan.key


def test_interpolated_levels_need_a_network_that_is_told_of_them():
    with pytest.raises(PlanError, match="'timestep'"):
        Plan(schedule=LINEAR, steps=7, spacing="interpolated")
    with pytest.raises(PlanError, match="steps"):
        Plan(schedule=LINEAR, steps=1001, spacing="interpolated", time_input="sigma")

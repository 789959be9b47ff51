"""Arguments that an attack found to escape the types of skipstep.errors, or to change results unseen."""

import os
import threading

import numpy as np
import pytest
import torch
from engines import build, labelled_engine
from tiny_networks import Labelled

import skipstep
from skipstep import NoiseSchedule, Plan
from skipstep.errors import InputError, PlanError, check_path
from skipstep.storage.signature import verify

SCHEDULE = NoiseSchedule.linear(1000)
NO_PATHS = (True, False, 0, 1, -1, 2.0, None, b"bytes", [], "", "a\0b", np.int64(1), {})


@pytest.fixture(scope="module")
def engine():
    with labelled_engine() as made:
        yield made


@pytest.mark.parametrize("value", NO_PATHS, ids=repr)
def test_a_path_is_text(value):
    with pytest.raises(InputError, match="expected a path"):
        check_path("path", value)


@pytest.mark.parametrize("value", [each for each in NO_PATHS if each is not None], ids=repr)
def test_no_number_is_opened_as_a_file(value, tmp_path):
    for attempt in (
        lambda: skipstep.load(tmp_path, require_signature=value),
        lambda: skipstep.load(value),
        lambda: verify(b"data", b"0" * 64, value),
    ):
        with pytest.raises(InputError):
            attempt()
    os.fstat(1)  # Standard output is still open.


def test_a_pipe_is_no_key(tmp_path):
    pytest.importorskip("cryptography")
    os.mkfifo(tmp_path / "key.pem")
    with pytest.raises(InputError, match="no regular file"):
        verify(b"data", b"0" * 64, tmp_path / "key.pem")


@pytest.mark.parametrize("shift", [-3, -1, 0, 1, 3])
def test_initial_noise_that_overlaps_the_output_is_read_before_it_is_written(engine, shift):
    noise = np.random.default_rng(0).standard_normal((5, 1, 4, 4), np.float32)
    expected = engine.sample(steps=3, x_T=noise, class_labels=1)
    memory = np.zeros((11, 1, 4, 4), np.float32)
    memory[3:8] = noise
    out = memory[3 + shift : 8 + shift]
    engine.sample(steps=3, x_T=memory[3:8], class_labels=1, out=out)
    np.testing.assert_array_equal(out, expected)


def test_guidance_that_lies_in_the_output_is_read_before_it_is_written(engine):
    scales = np.linspace(1, 4, 5, dtype=np.float32)
    expected = engine.sample(steps=3, seeds=range(5), class_labels=1, guidance_scale=scales)
    out = np.zeros((5, 1, 4, 4), np.float32)
    out.reshape(-1)[:5] = scales
    engine.sample(steps=3, seeds=range(5), class_labels=1, guidance_scale=out.reshape(-1)[:5], out=out)
    np.testing.assert_array_equal(out, expected)


def test_plans_may_be_added_while_others_are_listed(engine):
    stop, errors = threading.Event(), []

    def look():
        while not stop.is_set():
            try:
                engine.describe()
                list(engine.plans.values())
                engine.select_plan(steps=3)
            except RuntimeError as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for steps in range(4, 104):
        engine.add_plan(Plan(schedule=SCHEDULE, steps=steps))
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(engine.plans) == 101


@pytest.mark.parametrize(
    "scale",
    [
        10**400,
        "2",
        np.datetime64("2020-01-01"),
        np.True_,
        True,
        [True, 2.0],
        bytearray(b"\2"),
        b"2",
        2j,
        [[1.0]],
        np.nan,
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_a_guidance_scale_is_a_number(engine, scale):
    with pytest.raises(InputError, match="guidance_scale"):
        engine.sample(steps=3, seeds=1, class_labels=1, guidance_scale=scale)


def test_a_guidance_scale_may_be_a_tensor_that_needs_a_gradient(engine):
    expected = engine.sample(steps=3, seeds=1, class_labels=1, guidance_scale=2.5)
    for scale in (torch.tensor(2.5, requires_grad=True), torch.tensor([2.5], dtype=torch.bfloat16), np.float64(2.5)):
        np.testing.assert_array_equal(engine.sample(steps=3, seeds=1, class_labels=1, guidance_scale=scale), expected)


@pytest.mark.parametrize("flag", ["compile_on_miss", "compile_network", "require_captured", "fractional_timesteps"])
def test_text_is_no_flag(flag):
    with pytest.raises(InputError, match=f"{flag}='False'; expected True or False"):
        build(Labelled(), plans=[3], sample_shape=(1, 4, 4), num_classes=4, **{flag: "False"})


@pytest.mark.parametrize("threads", ["2", 2.5, 2**40, -1, 0, True, np.inf], ids=repr)
def test_a_number_of_threads_is_refused_before_anything_is_loaded(threads):
    bundle = skipstep.__path__[0] + "/demo/fashion-mnist.bundle"
    with pytest.raises(InputError, match="num_threads"):
        skipstep.load(bundle, num_threads=threads, allow_hard_links=True)


def test_edit_and_interpolate_take_what_they_say_and_nothing_else(engine):
    image = np.zeros((1, 1, 4, 4), np.float32)
    for bad in ("PIL", "", None, 1, [], np.array(["np"])):
        with pytest.raises(InputError, match="output_type"):
            engine.edit(image, steps=3, strength=0.6, seeds=1, class_labels=1, output_type=bad)
    with pytest.raises(InputError, match="images"):
        engine.edit(None, steps=3, strength=0.6, seeds=1, class_labels=1)
    both = engine.edit(image, steps=3, strength=0.6, seeds=[1, 2], class_labels=1)
    for seed, edited in zip((1, 2), both, strict=True):
        alone = engine.edit(image, steps=3, strength=0.6, seeds=[seed], class_labels=1)
        np.testing.assert_allclose(edited, alone[0], rtol=1e-6, atol=1e-6)

    for ends in ((True, False), (None, 1), ("a", 1), (1.5, 2)):
        with pytest.raises(InputError):
            engine.interpolate(*ends, 3, steps=3, class_labels=1)
    for rows in (None, 2.5, True, 1, 10**400):
        with pytest.raises(InputError, match="rows"):
            engine.interpolate_grid([1, 2, 3, 4], rows=rows, columns=2, steps=3, class_labels=1)
    for n in (None, 2.5, True, 1, 10**400):
        with pytest.raises(InputError, match="n="):
            engine.interpolate(1, 2, n, steps=3, class_labels=1)
    ends = [torch.full((1, 4, 4), value, dtype=torch.bfloat16) + torch.eye(4, dtype=torch.bfloat16) for value in (1, 2)]
    assert engine.interpolate(*ends, 3, steps=3, class_labels=1).shape == (3, 1, 4, 4)


def test_a_plans_key_and_options_do_not_depend_on_the_types_of_numbers():
    def plan(number, integer):
        return Plan(
            schedule=SCHEDULE,
            steps=integer(4),
            spacing="leading",
            steps_offset=integer(1),
            clip="dynamic",
            dynamic_quantile=number(1),
            dynamic_maximum=number(2),
            final_alpha_bar=number(1),
            solver="ddim",
            eta=number(0),
        )

    first = plan(int, int)
    for number, integer in ((float, np.int64), (np.float64, np.int32), (np.float32, np.uint8)):
        other = plan(number, integer)
        assert other.key == first.key
        assert other == first
        for name in ("steps", "steps_offset", "dynamic_quantile", "dynamic_maximum", "eta", "final_alpha_bar"):
            assert type(getattr(other, name)) is type(getattr(first, name)), name


@pytest.mark.parametrize(
    "options",
    [
        *({"steps": 4, "steps_offset": offset} for offset in (1.5, "1", True, None, [], 10**400, -1)),
        *({"timesteps": given} for given in ([True, False], [10.0, 5.0], ["9", "1"], [10**400, 1], [5, -1])),
        {"timesteps": [9, 5, 1], "spacing": "bogus"},
        {"timesteps": [9, 5, 1], "spacing": 3},
        *({"steps": 4, "clip": clip} for clip in (1e300, 10**400, True, "1", np.nan, -1.0)),
        {"steps": 4, "clip": "dynamic", "dynamic_quantile": 0.9, "dynamic_maximum": 1e300},
    ],
    ids=lambda options: f"{options!r:.60}",
)
def test_a_plan_refuses_what_it_would_not_use(options):
    with pytest.raises(PlanError):
        Plan(schedule=SCHEDULE, **options)

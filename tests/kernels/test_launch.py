"""Launches: what the rule chooses, what it refuses, and that results know nothing of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_cases import everything

from skipstep.errors import InputError
from skipstep.kernels.autotune import LaunchCase, candidates
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch, choose_launch
from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS, Column
from skipstep.kernels.step import ddim_step, initial_noise

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
H200 = {"num_multiprocessors": 132, "compute_capability": 90}

EVERY_LAUNCH = candidates(LaunchCase(1000, 2, "float32"), **H200)


def launches_on(device: str) -> tuple[StepLaunch, ...]:
    """Triton's interpreter has no warps: there only the block size makes a difference."""
    return EVERY_LAUNCH if device == "cuda" else tuple({each.block_size: each for each in EVERY_LAUNCH}.values())


def run_step(n: int, launch: StepLaunch, device: str, *, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A step with every operand and noise: all that it writes."""
    batch_size, rng = 2, np.random.default_rng(n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device)

    flags = everything(written=2, without=("clip", "learned_variance"))
    table = normal(2, batch_size, NUM_COLUMNS)
    written = {name: normal(batch_size, 1, n, 1) for name in ("state", "x0")}
    written["history"] = normal(NUM_SLOTS, batch_size, 1, n, 1)
    network_input = torch.full((2 * batch_size, 1, n, 1), float("nan"), dtype=dtype, device=device)
    broken = torch.full((batch_size,), 99, dtype=torch.int32, device=device)
    table[1, 1, Column.C_X] = float("inf")  # The second sample breaks, in every program.
    ddim_step(
        **written,
        model_output=normal(2 * batch_size, 2, n, 1).to(dtype),
        network_input=network_input,
        table=table,
        stage=1,
        flags=flags,
        seeds=torch.tensor([0, -1], device=device),
        guidance=normal(batch_size),
        rescale=normal(batch_size),
        bound=normal(batch_size).abs() + 1,
        broken=broken,
        launch=launch,
    )
    return (*written.values(), network_input, broken)


@pytest.mark.filterwarnings("ignore:invalid value")  # Of the interpreter's NumPy, at the sample that is to break.
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (1, torch.float16),
        (63, torch.float32),
        (601, torch.float16),
        pytest.param(2051, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_results_do_not_depend_on_the_launch(n, dtype, kernel_device):
    expected = run_step(n, DEFAULT_LAUNCH, kernel_device, dtype=dtype)
    assert expected[-1].tolist() == [99, 1]
    for launch in launches_on(kernel_device):
        for ours, theirs in zip(run_step(n, launch, kernel_device, dtype=dtype), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [63, 601, pytest.param(2051, marks=pytest.mark.slow)])
def test_nor_does_the_initial_noise(n, kernel_device):
    seeds = torch.tensor([0, -1], device=kernel_device)  # The second is 2^64 - 1.

    def draw(launch: StepLaunch) -> torch.Tensor:
        state = torch.full((2, 1, n, 1), float("nan"), device=kernel_device)
        initial_noise(state=state, network_input=torch.empty_like(state), seeds=seeds, launch=launch)
        return state

    expected = draw(DEFAULT_LAUNCH)
    assert expected.isfinite().all()
    assert all(torch.equal(draw(launch), expected) for launch in launches_on(kernel_device))


@given(
    num_elements=st.integers(1, 2**40),
    batch_size=st.integers(1, 4096),
    num_multiprocessors=st.integers(1, 1000),
    compute_capability=st.integers(75, 200),
    network_item_size=st.sampled_from([2, 4]),
)
def test_any_choice_is_a_launch_with_wide_accesses(network_item_size, **case):
    launch = choose_launch(**case, network_item_size=network_item_size)
    # A thread's share of an operand is a multiple of 16 bytes; more than eight elements cost too many registers.
    assert launch.elements_per_thread * network_item_size % 16 == 0
    assert launch.elements_per_thread <= 8
    programs, samples = launch.grid(case["num_elements"], case["batch_size"])
    assert samples == case["batch_size"]
    assert (programs - 1) * launch.block_size < case["num_elements"] <= programs * launch.block_size


@given(
    num_elements=st.integers(1, 2**22),
    batch_size=st.integers(1, 64),
    compute_capability=st.sampled_from(ARCHITECTURES),
    network_item_size=st.sampled_from([2, 4]),
)
def test_more_samples_never_get_smaller_programs(batch_size, **case):
    few = choose_launch(batch_size=batch_size, num_multiprocessors=132, **case)
    many = choose_launch(batch_size=2 * batch_size, num_multiprocessors=132, **case)
    assert many.block_size >= few.block_size


def test_small_samples_are_spread_and_large_ones_are_not():
    small = choose_launch(num_elements=3 * 32 * 32, batch_size=1, **H200, network_item_size=2)
    assert small == StepLaunch(block_size=256, num_warps=1)
    assert small.grid(3 * 32 * 32, 1) == (12, 1)
    assert choose_launch(num_elements=3 * 32 * 32, batch_size=1, **H200, network_item_size=4).block_size == 128
    medium = choose_launch(num_elements=3 * 256 * 256, batch_size=1, **H200, network_item_size=2)
    assert medium == StepLaunch(block_size=512, num_warps=2)
    for item_size in (2, 4):
        large = choose_launch(num_elements=4 * 512 * 512, batch_size=64, **H200, network_item_size=item_size)
        assert large == StepLaunch(block_size=1024, num_warps=4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_full_device_can_hold_half_of_its_warps_or_more(architecture):
    """With 16 programs a multiprocessor, as on sm_86, programs of one warp would leave two thirds of it empty."""
    warps, programs = {75: (32, 16), 86: (48, 16), 87: (48, 16), 89: (48, 24), 110: (48, 24)}.get(
        architecture, (48, 24) if architecture >= 120 else (64, 32)
    )
    for num_elements in (2**18, 2**20, 2**26):
        launch = choose_launch(
            num_elements=num_elements,
            batch_size=1,
            num_multiprocessors=40,
            compute_capability=architecture,
            network_item_size=2,
        )
        assert launch.num_warps * programs >= warps


def test_an_architecture_that_is_not_known_is_taken_for_an_older_one():
    case = {"num_elements": 2**18, "batch_size": 1, "num_multiprocessors": 40, "network_item_size": 2}
    assert choose_launch(**case, compute_capability=88) == choose_launch(**case, compute_capability=87)
    assert choose_launch(**case, compute_capability=87) != choose_launch(**case, compute_capability=89)


@pytest.mark.parametrize(
    ("block_size", "num_warps", "message"),
    [
        (1000, 4, "block_size=1000"),
        (0, 1, "block_size=0"),
        (2**17, 32, "block_size=131072"),
        (1024.0, 4, "block_size=1024.0"),
        (1024, 3, "num_warps=3"),
        (2**16, 64, "num_warps=64"),
        (1024, True, "num_warps=True"),
        (256, 4, "256 elements by 4 warps"),
    ],
)
def test_launches_that_cannot_be_are_refused(block_size, num_warps, message):
    with pytest.raises(InputError, match=message):
        StepLaunch(block_size=block_size, num_warps=num_warps)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_elements": 0},
        {"batch_size": 0},
        {"num_multiprocessors": 0},
        {"compute_capability": 70},
        {"network_item_size": 8},
    ],
)
def test_the_rule_refuses_what_cannot_be(wrong):
    case = {"num_elements": 784, "batch_size": 1, **H200, "network_item_size": 2}
    with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        choose_launch(**{**case, **wrong})

"""What the step kernel is given: refused tensors, a stage on the device, a state of the caller's, and what it notes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import SCHEDULE
from step_cases import SEEDS, random_case, seeds_tensor

from skipstep import Plan
from skipstep.calls.noise import standard_normal
from skipstep.errors import DeviceUnavailableError, InputError
from skipstep.kernels.layout import StepFlags, Stream
from skipstep.kernels.step import ddim_step, initial_noise


def test_the_stage_may_stand_on_the_device(kernel_device):
    """Coefficients and noise are those of the counted stage, whatever the launch says."""
    plan = Plan(schedule=SCHEDULE, steps=4, eta=1.0)
    state, output = random_case(63, 2, guided=False)
    results = []
    for stage, counter in ((2, None), (0, torch.tensor([2], dtype=torch.int32, device=kernel_device))):
        ours = state.to(kernel_device)
        ddim_step(
            state=ours,
            model_output=output.to(kernel_device),
            network_input=torch.empty_like(output, device=kernel_device),
            table=torch.tensor(plan.coefficients[:, None], device=kernel_device),
            stage=stage,
            flags=plan.stage_flags[2],
            seeds=seeds_tensor(2, kernel_device),
            counter=counter,
        )
        results.append(ours.cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_the_first_stage_that_breaks_a_sample_is_noted(poison, kernel_device):
    plan = Plan(schedule=SCHEDULE, steps=4, convention="paper", clip=None)
    state, output = random_case(1030, 3, guided=False)
    broken = torch.full((3,), 99, dtype=torch.int32, device=kernel_device)
    ours, buffer = state.to(kernel_device), torch.empty_like(output, device=kernel_device)
    for stage in range(4):
        prediction = output.clone()
        if stage == 2:
            prediction[1, 1027] = poison
        ddim_step(
            state=ours,
            model_output=prediction.to(kernel_device),
            network_input=buffer,
            table=torch.tensor(plan.coefficients[:, None], device=kernel_device),
            stage=stage,
            flags=plan.stage_flags[stage],
            broken=broken,
        )
    assert broken.tolist() == [99, 2, 99]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_given_state_is_only_copied(copies, kernel_device):
    state = torch.randn(3, 63, 1, 1, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    kept = state.clone()
    for given, expected in ((1, kept.cpu().numpy()), (0, standard_normal(SEEDS, 63, stage=0, stream=Stream.INITIAL))):
        network_input = torch.full((3 * copies, 63, 1, 1), float("nan"), device=kernel_device)
        flag = torch.tensor([given], dtype=torch.int32, device=kernel_device)
        initial_noise(state=state, network_input=network_input, seeds=seeds_tensor(3, kernel_device), given=flag)
        for array in (state, *network_input.chunk(copies)):
            np.testing.assert_array_equal(array.cpu().numpy().reshape(3, 63), expected.reshape(3, 63))


def valid_arguments():
    plan = Plan(schedule=SCHEDULE, steps=3, eta=1.0)
    return {
        "state": torch.zeros(2, 1, 4, 4),
        "model_output": torch.zeros(4, 1, 4, 4),
        "network_input": torch.zeros(4, 1, 4, 4),
        "table": torch.tensor(plan.coefficients[:, None]),
        "stage": 0,
        "seeds": torch.zeros(2, dtype=torch.int64),
        "guidance": torch.ones(2),
        "flags": StepFlags(clip=True, add_noise=True, guided=True),
    }


HISTORY = torch.zeros(3, 2, 1, 4, 4)
NARROW = {"model_output": torch.zeros(2, 1, 4, 4), "network_input": torch.zeros(2, 1, 4, 4)}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"state": torch.zeros(2, 1, 4, 4, dtype=torch.float16)}, "state [2, 1, 4, 4] torch.float16"),
        ({"model_output": torch.zeros(2, 1, 4, 4)}, "model_output [2, 1, 4, 4]"),
        ({"model_output": torch.zeros(4, 1, 4, 4, dtype=torch.float64)}, "torch.float64"),
        (
            {"model_output": torch.zeros(4, 4, 4, 1).permute(0, 3, 1, 2)[:, :, ::1, ::1].transpose(2, 3)},
            "not contiguous",
        ),
        (
            {
                "state": torch.zeros(2, 3, 4, 4),
                "model_output": torch.zeros(4, 3, 4, 4).to(memory_format=torch.channels_last),
                "network_input": torch.zeros(4, 3, 4, 4),
            },
            "state [2, 3, 4, 4] torch.float32 on cpu, not contiguous",
        ),
        ({"network_input": torch.zeros(4, 1, 4, 5)}, "network_input [4, 1, 4, 5]"),
        ({"network_input": torch.zeros(4, 1, 4, 4, device="meta")}, "on meta"),
        ({"table": torch.zeros(3, 1, 5)}, "table [3, 1, 5]"),
        ({"stage": 3}, "stage=3"),
        ({"stage": -1}, "stage=-1"),
        ({"seeds": None}, "no seeds"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds [3]"),
        ({"guidance": None}, "no guidance"),
        ({"guidance": torch.ones(2, dtype=torch.float64)}, "guidance [2]"),
        ({"x0": torch.zeros(1, 1, 4, 4)}, "x0 [1, 1, 4, 4]"),
        ({"counter": torch.zeros(2, dtype=torch.int32)}, "counter [2]"),
        ({"broken": torch.zeros(2)}, "broken [2] torch.float32"),
        ({"flags": StepFlags(read_h0=True), **NARROW}, "no history"),
        ({"flags": StepFlags(write_h2=True), **NARROW}, "no history"),
        ({"flags": StepFlags(write_h0=True, write_h2=True), **NARROW, "history": HISTORY}, "history slots h0, h2"),
        ({"flags": StepFlags(read_h2=True), **NARROW, "history": HISTORY[:2]}, "history [2, 2, 1, 4, 4]"),
        ({"flags": StepFlags(threshold=True), **NARROW}, "no bound"),
        ({"flags": StepFlags(guided=True, rescale=True)}, "no rescale"),
        ({"flags": StepFlags(wide_output=True, learned_variance=True), **NARROW}, "model_output [2, 1, 4, 4]"),
        ({"flags": StepFlags(read_h0=True), **NARROW, "history": torch.zeros(1, 2, 16)}, "history [1, 2, 16]"),
    ],
)
def test_refuses_wrong_tensors(change, names):
    with pytest.raises(InputError) as caught:
        ddim_step(**{**valid_arguments(), **change})
    assert names in caught.value.got


def test_host_tensors_need_the_interpreter(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(DeviceUnavailableError, match="NumpyStep"):
        ddim_step(**valid_arguments())

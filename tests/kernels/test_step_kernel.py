"""The Triton step against the textbook in float64 and, bit for bit, against its NumPy twin."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import SCHEDULE
from step_cases import SEEDS, everything, random_case, seeds_tensor
from step_reference import ddim_step_reference, general_update_reference
from tolerances import BFLOAT16_ULP, GENERAL_UPDATE, STEP_RELATIVE

from skipstep import Plan
from skipstep.calls.noise import StageNoise, standard_normal
from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS, Column, StepFlags, Stream
from skipstep.kernels.statistics import Thresholding, sample_statistics
from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.kernels.step_numpy import NumpyStep

GUIDANCE = np.array([1.5, 3.0, 0.0], np.float32)
# One element, a whole block, and several blocks of which the last has one; with odd sizes between them where everything
# is tested.
NUM_ELEMENTS = [1, 1024, 2049, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 63, 784, 1000, 4097))]
CASES = list(itertools.product(["epsilon", "v_prediction", "sample"], ["paper", "diffusers", "guided"], [0.0, 0.7]))


def run_kernel(
    plan: Plan, stage: int, state, output, *, guided=False, input_dtype=torch.float32, device="cpu", x0=False
):
    """Run one step in buffers that stand inside larger ones full of NaN, and check that nothing outside was touched."""
    batch_size = len(state)

    def guarded(shape, dtype=torch.float32):
        memory = torch.full((64 + int(np.prod(shape)) + 64,), float("nan"), dtype=dtype, device=device)
        return memory, memory[64:-64].view(shape)

    state_memory, inside = guarded(state.shape)
    inside.copy_(state)
    input_memory, network_input = guarded(output.shape, input_dtype)
    x0_memory, predicted = guarded(state.shape)
    flags = replace(plan.stage_flags[stage], guided=guided)
    ddim_step(
        state=inside,
        model_output=output.to(device),
        network_input=network_input,
        table=torch.tensor(plan.coefficients[:, None], device=device),
        stage=stage,
        seeds=seeds_tensor(batch_size, device),
        guidance=torch.from_numpy(GUIDANCE[:batch_size]).to(device),
        flags=flags,
        x0=predicted if x0 else None,
    )
    for memory in (state_memory, input_memory, x0_memory):
        assert memory[:64].isnan().all()
        assert memory[-64:].isnan().all()
    return inside.cpu(), network_input.cpu(), predicted.cpu()


@pytest.mark.parametrize("n", NUM_ELEMENTS)
@pytest.mark.parametrize(("prediction_type", "convention", "eta"), CASES)
def test_equals_the_textbook(prediction_type, convention, eta, n, kernel_device):
    plan = Plan(
        schedule=SCHEDULE, timesteps=[700, 300], prediction_type=prediction_type, convention=convention, eta=eta
    )
    guided = convention == "guided"
    state, output = random_case(n, 3, guided=guided)
    ours, network_input, x0 = run_kernel(plan, 0, state, output, guided=guided, device=kernel_device, x0=True)
    z = standard_normal(SEEDS, n, stage=0, stream=Stream.STEP)
    theirs, theirs_x0 = ddim_step_reference(
        state,
        output,
        alpha_bar_t=plan.alpha_bars[0],
        alpha_bar_s=plan.alpha_bars[1],
        eta=eta,
        prediction_type=prediction_type,
        clip=plan.clip,
        convention=convention,
        guidance=torch.from_numpy(GUIDANCE) if guided else None,
        z=torch.from_numpy(z).view(state.shape) if eta else None,
    )
    largest_prediction = output.abs().max() * (1 + 2 * GUIDANCE.max() if guided else 1)
    largest_term = (state.abs().max() + largest_prediction) / np.sqrt(plan.alpha_bars[0])
    assert (ours - theirs).abs().max() <= STEP_RELATIVE * largest_term
    assert (x0 - theirs_x0).abs().max() <= STEP_RELATIVE * largest_term
    for half in network_input.chunk(2 if guided else 1):
        torch.testing.assert_close(half, ours, rtol=0, atol=0)


@pytest.mark.parametrize("n", NUM_ELEMENTS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_has_the_bits_of_the_numpy_step(n, batch_size, guided, per_sample, kernel_device):
    plans = [Plan(schedule=SCHEDULE, steps=4, eta=eta, convention="guided") for eta in (0.9, 0.3, 0.6)][:batch_size]
    table = np.stack([plan.coefficients for plan in plans], axis=1) if per_sample else plans[0].coefficients[:, None]
    flags = StepFlags(clip=True, rederive_eps=True, add_noise=True, guided=guided)
    state, output = random_case(n, batch_size, guided=guided)
    guidance = GUIDANCE[:batch_size]
    expected = state.numpy().copy()
    step = NumpyStep(
        state=expected,
        model_output=output.numpy(),
        network_input=np.empty_like(output.numpy()),
        table=table,
        flags=[flags] * 4,
        guidance=guidance if guided else None,
        noise=StageNoise(SEEDS[:batch_size], n, 4),
    )
    ours = state.to(kernel_device)
    for stage in (0, 2, 3):
        step(stage)
        ddim_step(
            state=ours,
            model_output=output.to(kernel_device),
            network_input=torch.empty_like(output, device=kernel_device),
            table=torch.tensor(table, device=kernel_device),
            stage=stage,
            seeds=seeds_tensor(batch_size, kernel_device),
            guidance=torch.from_numpy(guidance).to(kernel_device),
            flags=flags,
        )
        np.testing.assert_array_equal(ours.cpu().numpy(), expected)


# Each part of the general update by itself, all together, and the combinations that solvers make.
GENERAL = {
    "state": StepFlags(add_state=True),
    **{f"slot {j} read": StepFlags(**{f"read_h{j}": True}) for j in range(NUM_SLOTS)},
    **{f"slot {j} written": StepFlags(**{f"write_h{j}": True}) for j in range(NUM_SLOTS)},
    **{f"slot {j} added to": StepFlags(**{f"read_h{j}": True, f"write_h{j}": True}) for j in range(NUM_SLOTS)},
    "runge kutta": StepFlags(read_h0=True, read_h1=True, write_h1=True),
    "threshold": StepFlags(threshold=True, rederive_eps=True),
    "rescaled": StepFlags(guided=True, rescale=True),
    "guided by a step's weight": StepFlags(guided=True, scale_guidance=True),
    "a weight, rescaled, threshold": StepFlags(guided=True, scale_guidance=True, rescale=True, threshold=True),
    "not guided in a guided call": StepFlags(doubled=True, scale_guidance=True),
    "wide": StepFlags(wide_output=True, guided=True),
    "learned variance": StepFlags(wide_output=True, learned_variance=True, add_noise=True, add_state=True, clip=True),
    **{f"everything, slot {j} written": everything(written=j) for j in range(NUM_SLOTS)},
}


@pytest.mark.parametrize("name", ["wide", "learned variance", "everything, slot 1 written"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_order_of_the_network_changes_no_bit(name, channels, kernel_device):
    """Nor of the state, nor of its noise."""
    flags, shape, rng = GENERAL[name], (3, channels, 31, 11), np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(kernel_device)

    output = normal(3 * (1 + flags.guided), channels * (1 + flags.wide_output), *shape[2:])
    given, history, table = normal(*shape), normal(NUM_SLOTS, *shape), normal(2, 1, NUM_COLUMNS)
    common = {"table": table, "flags": flags, "stage": 1, "seeds": seeds_tensor(3, kernel_device)}
    for each in ("guidance", "rescale", "bound"):
        common[each] = normal(3).abs() + 1
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        network_input = normal(3 * flags.input_copies, *shape[1:]).to(memory_format=order)
        state, x0 = (torch.empty_like(given).to(memory_format=order) for _ in range(2))
        state.copy_(given)
        last = order == torch.channels_last
        kept = history.movedim(2, -1).contiguous().view(history.shape) if last else history.clone()
        ddim_step(
            state=state,
            model_output=output.to(memory_format=order),
            network_input=network_input,
            history=kept,
            x0=x0,
            **common,
        )
        first = torch.empty_like(network_input)
        noise = torch.empty_like(state)
        initial_noise(state=noise, network_input=first, seeds=common["seeds"])
        kept = kept.view(-1, 3, *shape[2:], channels).movedim(-1, 2) if last else kept
        found.append((state, network_input, kept, x0, noise, first))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_the_twin_guides_half_precision_predictions_in_float32():
    rng = np.random.default_rng(0)
    output = rng.standard_normal((6, 1, 64, 1)).astype(np.float16)

    def step(model_output):
        state, network_input = np.ones((3, 1, 64, 1), np.float32), np.empty((6, 1, 64, 1), np.float32)
        table = np.random.default_rng(1).standard_normal((1, 1, NUM_COLUMNS), dtype=np.float32)
        NumpyStep(
            state=state,
            model_output=model_output,
            network_input=network_input,
            table=table,
            flags=[StepFlags(guided=True)],
            guidance=GUIDANCE,
        )(0)
        return state

    np.testing.assert_array_equal(step(output), step(output.astype(np.float32)))


FURTHER = [(1, True), (1025, False), *itertools.product((63, 1000, 4097), (False, True))]


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize(
    ("n", "per_sample"), [(1, False), (1025, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)]
)
def test_the_general_update(name, n, per_sample, kernel_device):
    """Random coefficients in every column: the kernel, its NumPy twin and the layout's equations in float64."""
    flags, batch_size = GENERAL[name], 3
    rng = np.random.default_rng(n)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    table = normal(2, batch_size if per_sample else 1, NUM_COLUMNS)
    table[..., Column.CLIP] = 0.8
    copies, channels = 1 + flags.guided, 1 + flags.wide_output
    state, history = normal(3, 1, n, 1), normal(NUM_SLOTS, 3, 1, n, 1)
    output = normal(copies * batch_size, channels, n, 1)
    strength = np.array([0.0, 0.4, 1.0], np.float32)
    thresholding = Thresholding(0.9, 1.5)

    twin_input = normal(flags.input_copies * batch_size, 1, n, 1)
    twin_state, twin_x0 = state.copy(), normal(3, 1, n, 1)
    twin = NumpyStep(
        state=twin_state,
        model_output=output,
        network_input=twin_input,
        table=table,
        flags=[StepFlags(write_h2=True), flags],
        guidance=GUIDANCE if flags.guided else None,
        rescale=strength,
        thresholding=thresholding,
        noise=StageNoise(SEEDS, n, 2),
        x0=twin_x0,
    )
    twin.history[:] = history.copy()
    twin(1)

    def upload(array):
        return torch.tensor(array, device=kernel_device)

    ours, network_input, x0 = upload(state), upload(twin_input * np.nan), upload(twin_x0 * np.nan)
    ours_history = upload(history)
    factor, bound = sample_statistics(
        ours,
        upload(output),
        upload(table[1]),
        flags,
        guidance=upload(GUIDANCE),
        rescale=upload(strength),
        thresholding=thresholding,
    )
    ddim_step(
        state=ours,
        model_output=upload(output),
        network_input=network_input,
        table=upload(table),
        stage=1,
        flags=flags,
        seeds=seeds_tensor(batch_size, kernel_device),
        guidance=upload(GUIDANCE),
        rescale=factor,
        bound=bound,
        history=ours_history,
        x0=x0,
    )
    # The exponential is each library's own, and so is the order in which a standard deviation is summed.
    atol = GENERAL_UPDATE if flags.learned_variance or flags.rescale else 0.0
    exact = general_update_reference(
        torch.from_numpy(state),
        torch.from_numpy(output),
        torch.from_numpy(np.broadcast_to(table[1], (batch_size, NUM_COLUMNS)).copy()),
        flags,
        history=torch.from_numpy(history),
        guidance=torch.from_numpy(GUIDANCE),
        rescale=torch.from_numpy(strength),
        thresholding=thresholding,
        z=torch.from_numpy(standard_normal(SEEDS, n, stage=1, stream=Stream.STEP)).view(state.shape),
    )
    for kernel, numpy, truth in (
        (ours, twin_state, exact.x_s),
        (x0, twin_x0, exact.x0),
        (ours_history, np.stack(twin.history), exact.history),
    ):
        np.testing.assert_allclose(kernel.cpu().numpy(), numpy, rtol=0, atol=atol)
        largest = 30 * truth.abs().max().item() + 30
        assert (kernel.cpu() - truth).abs().max() <= GENERAL_UPDATE * largest
    for half in network_input.chunk(flags.input_copies):
        assert torch.equal(half, ours)


@pytest.mark.parametrize("input_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [63, 1000])
def test_reads_and_writes_the_dtypes_of_the_network(n, output_dtype, input_dtype, kernel_device):
    plan = Plan(schedule=SCHEDULE, timesteps=[700, 300])
    state, output = random_case(n, 3, guided=False, dtype=output_dtype)
    ours, network_input, _ = run_kernel(plan, 0, state, output, input_dtype=input_dtype, device=kernel_device)
    exact, _, _ = run_kernel(plan, 0, state, output.float(), device=kernel_device)
    torch.testing.assert_close(ours, exact, rtol=0, atol=0)
    # Triton's interpreter truncates where bfloat16 should be rounded.
    tolerance = BFLOAT16_ULP if input_dtype == torch.bfloat16 and kernel_device == "cpu" else 0
    torch.testing.assert_close(network_input.float(), ours.to(input_dtype).float(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("convention", ["paper", "diffusers", "guided"])
def test_nan_from_the_network_is_not_clipped_away(convention, kernel_device):
    plan = Plan(schedule=SCHEDULE, timesteps=[700, 300], convention=convention)
    state, output = random_case(100, 1, guided=False)
    output[0, 17] = float("nan")
    for stage in (0, 1):
        ours, network_input, _ = run_kernel(plan, stage, state, output, device=kernel_device)
        assert ours.isnan().flatten().nonzero().tolist() == [[17]]
        assert network_input.isnan().flatten().nonzero().tolist() == [[17]]


@pytest.mark.parametrize("n", NUM_ELEMENTS)
@pytest.mark.parametrize("copies", [1, 2])
def test_initial_noise_has_the_bits_of_numpy(n, copies, kernel_device):
    state = torch.full((3, n, 1, 1), float("nan"), device=kernel_device)
    network_input = torch.full((3 * copies, n, 1, 1), float("nan"), device=kernel_device)
    initial_noise(state=state, network_input=network_input, seeds=seeds_tensor(3, kernel_device))
    expected = standard_normal(SEEDS, n, stage=0, stream=Stream.INITIAL)
    np.testing.assert_array_equal(state.cpu().numpy().reshape(3, n), expected)
    np.testing.assert_array_equal(network_input.cpu().numpy().reshape(copies, 3, n), np.stack([expected] * copies))

"""The step for some of the samples that are kept, each at a stage of its own: the bits of its step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from step_cases import SEEDS, everything, seeds_tensor

from skipstep.errors import InputError
from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS, Column, StepFlags
from skipstep.kernels.step import ddim_step

FLAGS = {
    "plain": StepFlags(),
    "everything": everything(written=1),
    "noise": StepFlags(clip=True, rederive_eps=True, add_noise=True),
    "ring": StepFlags(add_state=True, read_h0=True, read_h1=True, read_h2=True, write_h2=True),
    "learned": StepFlags(add_noise=True, learned_variance=True, wide_output=True),
}
# Of five that are kept two are left out; a row of the batch has no sample.
PLACES, KEPT, NUM_STAGES = (4, 0, None, 2), 5, 6
STAGES = (3, 0, 0, 5)


@pytest.mark.parametrize(
    ("dtype", "n"),
    [(torch.float16, 35), (torch.float32, 2049), pytest.param(torch.float32, 35, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", FLAGS)
def test_has_the_bits_of_single_steps(name, dtype, n, kernel_device):
    flags, rows = FLAGS[name], len(PLACES)
    generator = torch.Generator().manual_seed(n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(kernel_device)

    state, x0, history = normal(KEPT, 1, n), normal(KEPT, 1, n), normal(KEPT, NUM_SLOTS, 1, n)
    table = normal(KEPT * NUM_STAGES, 1, NUM_COLUMNS)
    table[..., Column.CLIP] = 0.8
    output = normal((2 if flags.guided else 1) * rows, 2 if flags.wide_output else 1, n).to(dtype)
    seeds, guidance = seeds_tensor(3, kernel_device).repeat(2)[:KEPT].contiguous(), normal(KEPT)
    rescale, bound = normal(rows), normal(rows).abs() + 1.0
    places = [(-1, 0, 0) if p is None else (p, p * NUM_STAGES + s, s) for p, s in zip(PLACES, STAGES, strict=True)]
    broken = torch.full((KEPT,), 99, dtype=torch.int32, device=kernel_device)
    state[2, 0, 7] = torch.nan
    expected = [each.clone() for each in (state, x0, history)]
    ddim_step(
        state=state,
        model_output=output,
        network_input=None,
        table=table,
        stage=0,
        flags=flags,
        seeds=seeds,
        guidance=guidance,
        rescale=rescale,
        bound=bound,
        history=history,
        x0=x0,
        broken=broken,
        places=torch.tensor(places, dtype=torch.int32, device=kernel_device),
    )
    for row, (place, in_table, stage) in enumerate(places):
        if place < 0:
            continue
        one = slice(place, place + 1)
        # Its table has its row at its stage, as a plan's has.
        own = torch.zeros(NUM_STAGES, 1, NUM_COLUMNS, device=kernel_device)
        own[stage] = table[in_table]
        ddim_step(
            state=expected[0][one],
            model_output=output[row::rows].contiguous(),
            network_input=torch.empty(flags.input_copies, 1, n, device=kernel_device),
            table=own,
            stage=stage,
            flags=flags,
            seeds=seeds[one],
            guidance=guidance[one],
            rescale=rescale[row : row + 1],
            bound=bound[row : row + 1],
            history=expected[2][one].view(NUM_SLOTS, 1, 1, n),
            x0=expected[1][one],
        )
    for ours, theirs in zip((state, x0, history), expected, strict=True):
        np.testing.assert_array_equal(ours.cpu().numpy(), theirs.cpu().numpy())
    assert broken.tolist() == [99, 99, 5, 99, 99]


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"places": torch.zeros(2, 2, dtype=torch.int32)}, r"places \[2, 2\]"),
        ({"places": torch.zeros(2, 3)}, "places .* torch.float32"),
        ({"places": [(0, 0, 0)]}, "places of type list"),
        ({"table": torch.zeros(4, KEPT, NUM_COLUMNS)}, "table"),
        ({"history": torch.zeros(1, KEPT, 1, 8)}, "history"),
        ({"model_output": torch.zeros(KEPT, 1, 8)}, "model_output"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, "seeds"),
    ],
)
def test_places_that_do_not_fit_are_refused(change, got):
    arguments = {
        "state": torch.zeros(KEPT, 1, 8),
        "model_output": torch.zeros(2, 1, 8),
        "network_input": None,
        "table": torch.zeros(4, 1, NUM_COLUMNS),
        "stage": 0,
        "flags": StepFlags(add_noise=True, read_h0=True, write_h0=True),
        "seeds": torch.from_numpy(SEEDS.view(np.int64)).repeat(2)[:KEPT].contiguous(),
        "history": torch.zeros(KEPT, NUM_SLOTS, 1, 8),
        "places": torch.zeros(2, 3, dtype=torch.int32),
    }
    with pytest.raises(InputError, match=got):
        ddim_step(**{**arguments, **change})

"""Random operands of one step, and its seeds."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch

from skipstep.kernels.layout import NUM_SLOTS, StepFlags

SEEDS = np.array([0, 2**64 - 1, 12345], np.uint64)


def random_case(n: int, batch_size: int, *, guided: bool, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(n)
    state = torch.randn(batch_size, n, 1, 1, generator=generator)
    output = torch.randn((2 if guided else 1) * batch_size, n, 1, 1, generator=generator).to(dtype)
    return state, output


def seeds_tensor(batch_size: int, device: str) -> torch.Tensor:
    return torch.from_numpy(SEEDS[:batch_size].view(np.int64)).to(device)


def everything(*, written: int, without: tuple[str, ...] = ("clip",)) -> StepFlags:
    """All that a step can do, but for one of the two ways to clip: a plan has one. It writes one history slot."""
    others = tuple(f"write_h{slot}" for slot in range(NUM_SLOTS) if slot != written)
    return StepFlags(**{each.name: each.name not in (*without, *others) for each in fields(StepFlags)})

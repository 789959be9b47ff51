"""Random operands of one step, and its seeds."""

from __future__ import annotations

import numpy as np
import torch

SEEDS = np.array([0, 2**64 - 1, 12345], np.uint64)


def random_case(n: int, batch_size: int, *, guided: bool, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(n)
    state = torch.randn(batch_size, n, 1, 1, generator=generator)
    output = torch.randn((2 if guided else 1) * batch_size, n, 1, 1, generator=generator).to(dtype)
    return state, output


def seeds_tensor(batch_size: int, device: str) -> torch.Tensor:
    return torch.from_numpy(SEEDS[:batch_size].view(np.int64)).to(device)

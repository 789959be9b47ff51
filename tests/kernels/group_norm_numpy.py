"""GroupNorm and what stands around it in float64, as its definition has it: the kernel is tested against this."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def group_norm_numpy(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    vector: Array | None = None,
    image: Array | None = None,
) -> tuple[Array, Array]:
    """The result and s = x + vector + image, float64 `[N, C, …]`; `vector` is `[N, C]`, `image` as x."""
    total = x.astype(np.float64)
    per_channel = (-1, x.shape[1], *[1] * (x.ndim - 2))
    if vector is not None:
        total = total + vector.astype(np.float64).reshape(per_channel)
    if image is not None:
        total = total + image
    groups = total.reshape(len(x), num_groups, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        centred = groups - groups.mean(axis=2, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + eps)
        y = normal.reshape(x.shape)
        if weight is not None:
            y = y * weight.astype(np.float64).reshape(per_channel)
        if bias is not None:
            y = y + bias.astype(np.float64).reshape(per_channel)
        return (y / (1 + np.exp(-y)) if silu else y), total

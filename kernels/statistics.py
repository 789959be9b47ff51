"""Two numbers per sample that a step needs from the whole sample before it can begin.

Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): the predicted image is clamped to ±s and
divided by s, where s is a quantile of its absolute values, at least 1 (then nothing changes) and at most `maximum`.

Guidance rescale (Lin et al. 2024, arXiv 2305.08891, eq. 14-16): guidance increases the standard
deviation of the prediction; the factor phi·std(conditional)/std(guided) + 1 - phi undoes that, completely at phi = 1.
(For a constant prediction the ratio counts as 1.)

Both are reductions, so they run before the step and cost a pass over the data; a plan without them pays nothing. The
NumPy functions are for the loop in host memory, the torch functions for the loop on a GPU, without synchronizing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import check_number
from skipstep.kernels.layout import Column, StepFlags

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Thresholding:
    """`quantile` in (0, 1] of a sample's absolute values; `maximum` ≥ 1 limits the result (infinity: no limit)."""

    quantile: float
    maximum: float = math.inf

    def __post_init__(self) -> None:
        check_number("quantile", self.quantile, low=0.0, high=1.0, above=True)
        if not (isinstance(self.maximum, float) and self.maximum == math.inf):
            check_number("maximum", self.maximum, low=1.0)


def threshold_bound_numpy(x0: NDArray[np.float32], parameters: Thresholding) -> NDArray[np.float32]:
    """The bound of each sample, float32 `[B]`, for predicted images `[B, …]`. NaN gives NaN."""
    low, weight = rank(x0[0].size, parameters.quantile)
    flat = np.abs(x0).reshape(len(x0), -1)
    broken = np.isnan(flat).any(axis=1)
    flat.partition((low, min(low + 1, flat.shape[1] - 1)), axis=1)
    bound = flat[:, low] + np.float32(weight) * (flat[:, min(low + 1, flat.shape[1] - 1)] - flat[:, low])
    bound = bound.clip(np.float32(1.0), np.float32(parameters.maximum))
    kept: NDArray[np.float32] = np.where(broken, np.float32(np.nan), bound)
    return kept


def threshold_bound(x0: Tensor, parameters: Thresholding) -> Tensor:
    """The same in torch, on the tensor's device."""
    low, weight = rank(x0[0].numel(), parameters.quantile)
    ordered = x0.abs().flatten(1).sort(dim=1).values
    bound = ordered[:, low] + weight * (ordered[:, min(low + 1, ordered.shape[1] - 1)] - ordered[:, low])
    # NaN sorts last, and must not be used as a bound.
    return bound.clamp(1.0, parameters.maximum).where(~ordered[:, -1].isnan(), math.nan)


def rescale_factor_numpy(
    guided: NDArray[np.float32], conditional: NDArray[Any], strength: NDArray[np.float32]
) -> NDArray[np.float32]:
    """phi·std(conditional)/std(guided) + 1 - phi, float32 `[B]`, for `[B, …]` and the strengths phi `[B]`."""
    spreads = [array.reshape(len(array), -1).std(axis=1, dtype=np.float64) for array in (conditional, guided)]
    ratio = np.divide(spreads[0], spreads[1], out=np.ones_like(spreads[0]), where=spreads[1] != 0.0)
    factor: NDArray[np.float32] = (strength * ratio + (1.0 - strength)).astype(np.float32)
    return factor


def rescale_factor(guided: Tensor, conditional: Tensor, strength: Tensor) -> Tensor:
    """The same in torch, on the tensors' device."""
    spreads = [tensor.flatten(1).double().std(dim=1, correction=0) for tensor in (conditional, guided)]
    ratio = (spreads[0] / spreads[1]).where(spreads[1] != 0.0, 1.0)
    return (strength * ratio + (1.0 - strength)).float()


def sample_statistics(
    state: Tensor,
    model_output: Tensor,
    rows: Tensor,
    flags: StepFlags,
    *,
    guidance: Tensor | None,
    rescale: Tensor | None,
    thresholding: Thresholding | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The rescale factor and the threshold bound that the step kernel reads, float32 `[B]` each, or None.

    `rows` float32 `[1 or B, NUM_COLUMNS]` is the stage's part of the table; the rest is as for `ddim_step`.
    """
    if not (flags.rescale or flags.threshold):
        return None, None
    batch_size, channels = state.shape[:2]
    ones = [1] * (state.ndim - 1)
    out = conditional = model_output[:batch_size, :channels].float()
    if flags.guided and guidance is not None:
        unconditional = model_output[batch_size:, :channels].float()
        scale = guidance if not flags.scale_guidance else rows[:, Column.GUIDANCE] * (guidance - 1.0) + 1.0
        out = unconditional + scale.view(-1, *ones) * (conditional - unconditional)
    factor = bound = None
    if flags.rescale and rescale is not None:
        factor = rescale_factor(out, conditional, rescale)
        out = out * factor.view(-1, *ones)
    if flags.threshold and thresholding is not None:
        x0_x, x0_out = (rows[:, column].view(-1, *ones) for column in (Column.X0_X, Column.X0_OUT))
        bound = threshold_bound(x0_x * state + x0_out * out, thresholding)
    return factor, bound


def rank(count: int, quantile: float) -> tuple[int, float]:
    """Position of a quantile among `count` ordered values: the index below it, and the weight of the next value."""
    position = quantile * (count - 1)
    return int(position), position - int(position)

"""The step as the papers state it, in float64: every implementation is tested against it.

`ddim_step_reference` follows the papers' formulas and does not use the coefficient table (arXiv
2010.02502, eq. 12, 16; arXiv 2202.00512, section 4; arXiv 2207.12598, eq. 6). `general_update_reference` is the
equations of skipstep.kernels.layout: the meaning of a table, for any solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipstep.kernels.layout import SLOT_COLUMNS, Column, StepFlags
from skipstep.kernels.statistics import Thresholding


def ddim_step_reference(
    x_t: Tensor,
    model_output: Tensor,
    *,
    alpha_bar_t: float,
    alpha_bar_s: float,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    convention: str = "paper",
    guidance: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x_s, x0), float64 `[B, …]`.

    `model_output` is `[B, …]`, or `[2B, …]` beside `guidance` `[B]`: predictions with the condition, then without.
    `z` `[B, …]` is the noise that eta > 0 adds; without it the mean is returned.
    """
    x = x_t.double()
    a = torch.tensor(alpha_bar_t, dtype=torch.float64)
    p = torch.tensor(alpha_bar_s, dtype=torch.float64)
    out = model_output.double()
    if guidance is not None:
        conditional, unconditional = out.chunk(2)
        scale = guidance.double().view(-1, *[1] * (x.ndim - 1))
        out = (1 - scale) * unconditional + scale * conditional

    if prediction_type == "epsilon":
        x0, eps = (x - (1 - a).sqrt() * out) / a.sqrt(), out
    elif prediction_type == "v_prediction":
        x0, eps = a.sqrt() * x - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * x
    elif prediction_type == "sample":
        x0, eps = out, (x - a.sqrt() * out) / (1 - a).sqrt()
    else:
        raise ValueError(f"unknown prediction type {prediction_type!r}")
    if clip is not None and convention != "paper":
        x0 = x0.clamp(-clip, clip)
        if convention == "guided":
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()

    variance = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
    x_s = p.sqrt() * x0 + (1 - p - variance).clamp_min(0).sqrt() * eps
    if z is not None:
        x_s = x_s + variance.sqrt() * z.double()
    return x_s, x0


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """float64 `[B, C, H, W]`: the next state and the predicted image; `[slots, B, C, H, W]`: the solver's history."""

    x_s: Tensor
    x0: Tensor
    history: Tensor


def general_update_reference(
    x_t: Tensor,
    model_output: Tensor,
    rows: Tensor,
    flags: StepFlags,
    *,
    history: Tensor,
    guidance: Tensor,
    rescale: Tensor,
    thresholding: Thresholding,
    z: Tensor,
) -> UpdateResult:
    """One evaluation's step for `rows` `[B, NUM_COLUMNS]`; the other shapes are those of `ddim_step`."""
    batch_size, channels = x_t.shape[:2]
    ones = (1,) * (x_t.ndim - 1)
    x, out, history, z = (tensor.double() for tensor in (x_t, model_output, history, z))
    c = {column: rows[:, column].double().view(-1, *ones) for column in Column}
    variance = out[:batch_size, channels:]
    conditional, unconditional = out[:batch_size, :channels], out[batch_size:, :channels]
    out = conditional
    if flags.guided:
        scale = guidance.double().view(-1, *ones)
        if flags.scale_guidance:
            scale = 1.0 + c[Column.GUIDANCE] * (scale - 1.0)
        out = unconditional + scale * (conditional - unconditional)
    if flags.rescale:
        phi = rescale.double().view(-1, *ones)
        spreads = [
            tensor.std(dim=tuple(range(1, x_t.ndim)), correction=0, keepdim=True) for tensor in (conditional, out)
        ]
        out = out * (phi * (spreads[0] / spreads[1]).where(spreads[1] != 0, 1.0) + 1 - phi)
    x0 = c[Column.X0_X] * x + c[Column.X0_OUT] * out
    eps = c[Column.EPS_X] * x + c[Column.EPS_OUT] * out
    if flags.clip:
        x0 = x0.clamp(-c[Column.CLIP], c[Column.CLIP])
    if flags.threshold:
        s = x0.abs().flatten(1).quantile(thresholding.quantile, dim=1).clamp(1.0, thresholding.maximum)
        x0 = x0.clamp(-s.view(-1, *ones), s.view(-1, *ones)) / s.view(-1, *ones)
    if flags.rederive_eps:
        eps = c[Column.RE_X] * x + c[Column.RE_X0] * x0
    x_s = c[Column.C_X0] * x0 + c[Column.C_EPS] * eps
    kept = c[Column.M_X] * x + c[Column.M_X0] * x0 + c[Column.M_EPS] * eps
    if flags.add_state:
        x_s = x_s + c[Column.C_X] * x
    for slot in flags.read_slots:
        x_s = x_s + c[SLOT_COLUMNS[slot]] * history[slot]
    if flags.add_noise:
        sigma = c[Column.SIGMA]
        if flags.learned_variance:
            sigma = sigma * (c[Column.LOG_SIGMA] + c[Column.LOG_SIGMA_OUT] * variance).exp()
        x_s = x_s + sigma * z
    after = history.clone()
    for slot in flags.written_slots:
        after[slot] = kept + c[Column.M_H] * history[slot] if slot in flags.read_slots else kept
    return UpdateResult(x_s, x0, after)

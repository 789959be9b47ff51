"""The step by the textbook, in float64: the truth that every implementation is tested against.

It is written from the papers' formulas and shares nothing with the coefficient table (arXiv 2010.02502, eq. 12, 16;
arXiv 2202.00512, section 4; arXiv 2207.12598, eq. 6).
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    `model_output` is `[B, …]`, or `[2B, …]` beside `guidance` `[B]`: predictions with the label, then without.
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

"""Solvers as tables: what one step does with the predicted image and noise, from noise level a to noise level p.

DDIM (Song, Meng, Ermon 2021, arXiv 2010.02502, eq. 12 and 16; their alpha is our alpha_bar):

    sigma²  = eta²·(1-p)/(1-a)·(1-a/p)                                     a = alpha_bar_t (now), p = alpha_bar_s (next)
    x_s     = sqrt(p)·x0 + sqrt(1-p-sigma²)·eps + sigma·z                  z ~ N(0, I)

A solver is a function from the noise levels of a plan to weights, in float64, one row per network evaluation; the
loop and the kernel never learn its name. To add one, write such a function and enter it in `SOLVERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class UpdateWeights:
    """next = c_x0·x0 + c_eps·eps + sigma·z; each float64 `[S]`."""

    c_x0: NDArray[np.float64]
    c_eps: NDArray[np.float64]
    sigma: NDArray[np.float64]


Solver = Callable[[NDArray[np.float64], float], UpdateWeights]


def ddim(alpha_bars: NDArray[np.float64], eta: float) -> UpdateWeights:
    """DDIM over `alpha_bars` float64 `[S+1]`; eta = 0 is deterministic, eta = 1 has DDPM's posterior variance."""
    a, p = alpha_bars[:-1], alpha_bars[1:]
    # sigma² and 1-p-sigma² share the factor 1-p; taking it out keeps the second from cancelling, and makes both
    # exactly zero at p = 1, so the last step adds no noise and leaves none.
    share = eta**2 * (p - a) / (p * (1.0 - a))
    return UpdateWeights(
        c_x0=np.sqrt(p),
        c_eps=np.sqrt((1.0 - p) * np.maximum(1.0 - share, 0.0)),
        sigma=np.sqrt((1.0 - p) * share),
    )


SOLVERS: Mapping[str, Solver] = {"ddim": ddim}

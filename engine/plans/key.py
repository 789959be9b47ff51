"""The key of a plan: a hash of everything that changes its results, and of nothing else.

Keys are stored in bundles, so a plan keeps its key from one version to the next. Flags are hashed as text, in the form
that StepFlags had when keys began; a flag that was added since is in the text only where it is set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from skipstep.kernels.layout import StepFlags
from skipstep.kernels.statistics import Thresholding

# The flags that keys began with, in their order. The history had two slots then, under names of their own.
_FIRST_FLAGS: Final = {
    **{name: name for name in ("clip", "threshold", "rederive_eps", "add_state")},
    "read_h1": "read_base",
    "write_h1": "write_base",
    "read_h0": "read_memory",
    "write_h0": "write_memory",
    **{name: name for name in ("add_noise", "learned_variance", "wide_output", "guided", "rescale")},
}
_NAMES: Final = tuple(each.name for each in fields(StepFlags))


def plan_key(
    stage_flags: Sequence[StepFlags],
    thresholding: Thresholding | None,
    *,
    evaluation_timesteps: NDArray[np.float64],
    coefficients: NDArray[np.float32],
) -> str:
    """Sixteen hexadecimal digits."""
    flags = "".join(f"{_text(each)}, " for each in stage_flags)
    # As Python shows tuples: a comma follows a single element and no last one of several.
    flags = flags[:-1] if len(stage_flags) == 1 else flags[:-2]
    digest = hashlib.sha256(b"skipstep plan 2")
    digest.update(f"(({flags}), {thresholding!r})".encode())
    digest.update(evaluation_timesteps.astype("<f8").tobytes())
    digest.update(coefficients.astype("<f4").tobytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=256)  # Most stages of most plans have the same flags.
def _text(flags: StepFlags) -> str:
    values = {name: getattr(flags, name) for name in _NAMES}
    shown = {first: values.pop(name) for name, first in _FIRST_FLAGS.items()} | {
        n: on for n, on in values.items() if on
    }
    return f"StepFlags({', '.join(f'{name}={on}' for name, on in shown.items())})"

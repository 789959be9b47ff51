"""A plan's weights by least squares, step by step along the plan's own trajectories.

At each step the state is where the steps before have led, not where the reference is, so that a step also mends what
they left. With x the state and x0 the image now, x' and x0' those of the step before, and m' what it found in the
history, a step solves

    min ‖w·(x, x0, x', x0', m') - x_ref‖² + ridge·‖(w - w_DDIM)·scale‖²

over all trajectories, scale being each feature's root mean square. The weights of the last three are what the step
before writes into the history, which this step then takes as it is: exactly the step's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from skipstep.fitting.reference import Denoiser, Reference
from skipstep.loops.contract import Array
from skipstep.plans.solvers import FITTED_COLUMNS

_RIDGE: Final = 1e-5
# What a search keeps: each is three times the trajectories' states.
_MOST_PREFIXES: Final = 256


@dataclass(frozen=True, slots=True)
class _Prefix:
    """After some steps: the rows so far, the state, and what the last step offers the next as history."""

    rows: NDArray[np.float64]
    state: Array
    history: tuple[Array, ...]


class WeightFit:
    """Fits plans over the nodes of a reference. Steps that two plans begin with in common are fitted once."""

    def __init__(self, denoiser: Denoiser, reference: Reference) -> None:
        self._denoiser, self._reference = denoiser, reference
        self._levels = [denoiser.level(t) for t in reference.nodes]
        self._prefixes: dict[tuple[int, ...], _Prefix] = {}

    def fit(self, nodes: Sequence[int]) -> tuple[NDArray[np.float32], float]:
        """The weights `[S, 5]` for these places of the grid, and the root mean square distance to the ends."""
        done = _Prefix(np.zeros((0, len(FITTED_COLUMNS))), self._denoiser.noise, ())
        for step in range(len(nodes)):
            key = (step, *nodes[: step + 2])
            if key not in self._prefixes:
                if len(self._prefixes) >= _MOST_PREFIXES:
                    self._prefixes.clear()
                self._prefixes[key] = self._step(done, nodes, step)
            done = self._prefixes[key]
        return done.rows.astype(np.float32), rmse(done.state, self._reference.ends)

    def _step(self, before: _Prefix, nodes: Sequence[int], step: int) -> _Prefix:
        here, is_last = nodes[step], step + 1 == len(nodes)
        level = self._levels[here]
        target_level = 1.0 if is_last else self._levels[nodes[step + 1]]
        target = self._reference.ends if is_last else self._reference.states[nodes[step + 1]]
        image = self._denoiser(before.state, self._reference.nodes[here])
        features = (before.state, image, *before.history)
        shrink = np.sqrt((1.0 - target_level) / (1.0 - level))
        textbook = np.zeros(len(features))
        textbook[:2] = shrink, np.sqrt(target_level) - np.sqrt(level) * shrink
        found = least_squares(features, target, textbook)
        rows = np.vstack([before.rows, np.zeros(len(FITTED_COLUMNS))])
        rows[step, :2] = found[:2]
        rows[step - 1, 2 : 2 + len(before.history)] = found[2:]
        state = sum(w * feature for w, feature in zip(found, features, strict=True))
        memory = sum(w * feature for w, feature in zip(found[2:], before.history, strict=True))
        history = (before.state, image) if step == 0 else (before.state, image, np.asarray(memory, np.float32))
        return _Prefix(rows, np.asarray(state, np.float32), history)


def least_squares(features: Sequence[Array], target: Array, textbook: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights of the features whose sum is nearest to the target, drawn a little towards the textbook's."""
    matrix = np.stack([each.ravel() for each in features])
    gram = (matrix @ matrix.T).astype(np.float64) / matrix.shape[1]
    mixed = (matrix @ target.ravel()).astype(np.float64) / matrix.shape[1]
    ridge = np.diag(_RIDGE * np.diag(gram))
    found: NDArray[np.float64] = np.linalg.solve(gram + ridge, mixed + ridge @ textbook)
    return found


def rmse(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))

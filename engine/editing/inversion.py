"""From an image to the noise that draws it: DDIM run upward (arXiv 2010.02502, section 5.4).

With the target's timestep as the network's timestep input (`evaluate_at="target"`), a step up from level a to level p
solves approximately

    x_p = √(p/a)·x_a + √p·(s_p - s_a)·eps(x_p, t_p)                       s = √((1-alpha_bar)/alpha_bar)

whose right side is the sampling step p → a turned round. Plain inversion puts x_a for x_p inside eps; `refinements`
repeats with the last answer put in (a fixed-point iteration), until what changes between two answers, the residual,
stops falling. It may also grow, where the iteration diverges: of each sample the answer is kept from which it would
have grown, and the least residual seen is returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from skipstep.calls.request import SampleRequest
from skipstep.kernels.layout import Column
from skipstep.loops.contract import Array, Loop, Run
from skipstep.plans.stages import Stages


@dataclass(frozen=True, slots=True)
class Inversion:
    """`latents` float32 `[B, *sample_shape]`: the noise.

    `residuals` float32 `[S, B]`: the least change between two answers of each step, as a root mean square over the
    elements, which bounds how far it is from a fixed point; NaN where refinement was not requested.
    """

    latents: Array
    residuals: Array


def invert(
    loop: Loop,
    stages: Stages,
    request: SampleRequest,
    *,
    refinements: int = 0,
    tolerance: float = 0.0,
    after_step: Callable[[], None] = lambda: None,
) -> Inversion:
    """Invert the request's images with up to `refinements` + 1 network evaluations a step, fewer once all stalled.

    A sample has stalled when its residual is at most `tolerance`, or no longer falls.
    """
    residuals = np.full((len(stages), request.num_samples), np.nan, np.float32)
    with loop.start(stages, request) as run:
        for stage in range(len(stages)):
            base = run.state()
            run.advance(stage)
            if refinements:
                # The step goes up from the guess; it has to go up from the base, with the noise seen at the guess.
                c_x = stages.table[stage, :, Column.C_X].reshape(-1, *[1] * (base.ndim - 1))
                residuals[stage] = _refine(run, stage, base, c_x, refinements=refinements, tolerance=tolerance)
            after_step()
        return Inversion(run.state(), residuals)


def _refine(run: Run, stage: int, base: Array, c_x: Array, *, refinements: int, tolerance: float) -> Array:
    """Put the best answer in the run's state; returns its residuals `[B]`."""
    guess = best = run.state()
    per_sample = -1, *[1] * (guess.ndim - 1)
    least = np.full(len(base), np.inf, np.float32)
    falling = np.ones(len(base), bool)
    for _ in range(refinements):
        run.advance(stage)
        answer = run.state() + c_x * (base - guess)
        residual = np.sqrt(np.mean((answer - guess) ** 2, axis=tuple(range(1, answer.ndim))))
        # The residual is the guess's. The answer's own is known one evaluation later, if there is one: while residuals
        # fall it is the better of the two. A sample that has stalled is left as it is, so that it does not depend on
        # how long the rest of the batch goes on.
        better = falling & (residual < least)
        falling = better & (residual > tolerance)
        best = np.where(better.reshape(per_sample), guess, best)
        best = np.where(falling.reshape(per_sample), answer, best)
        least = np.where(better, residual, least)
        if not falling.any():
            break
        guess = answer
        run.set_state(guess)
    run.set_state(best)
    return least

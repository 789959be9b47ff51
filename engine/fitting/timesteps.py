"""Which timesteps of the grid a plan visits: those whose best linear steps add up to the least error.

The error of a step from node j to node m is that of the best linear combination of what it may use, over all
trajectories: of the state and the image at j for a first step, and of the image at the node before as well for later
ones. Both follow from the Gram matrix of all states and images, without another evaluation. An error at node m reaches
the end changed by a factor; for normal data of variance v it is v/(a·v + 1 - a), squared. (GITS, arXiv 2405.11326,
chooses timesteps by dynamic programming with another cost.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skipstep.fitting.reference import Reference

Numbers = NDArray[np.float64]
# How much of the factor by which an error grows on its way to the end counts: each gives another plan to try.
EXPONENTS = (0.0, 0.5, 1.0)


def step_errors(reference: Reference) -> tuple[Numbers, Numbers]:
    """Mean squared errors of the best steps: `[J, J+1]` from node j to m, and `[J, J, J+1]` from j after i to m.

    Node J is the end. What does not lead downward in noise is infinite.
    """
    count = len(reference.nodes)
    vectors = np.concatenate([reference.states, reference.images, reference.ends[None]]).reshape(2 * count + 1, -1)
    gram = (vectors @ vectors.T).astype(np.float64) / vectors.shape[1]
    targets = np.append(np.arange(count), 2 * count)
    first = np.full((count, count + 1), np.inf)
    later = np.full((count, count, count + 1), np.inf)
    for j in range(count):
        ahead = slice(j + 1, count + 1)
        first[j, ahead] = _residuals(gram, [j, count + j], targets[ahead])
        for i in range(j):
            later[i, j, ahead] = _residuals(gram, [j, count + j, count + i], targets[ahead])
    return first, later


def _residuals(gram: Numbers, features: list[int], targets: NDArray[np.int64]) -> Numbers:
    own = gram[features][:, features]
    mixed = gram[features][:, targets]
    ridge = 1e-9 * np.trace(own) * np.eye(len(features))
    explained = np.einsum("ft,ft->t", mixed, np.linalg.solve(own + ridge, mixed))
    residuals: Numbers = np.maximum(np.diag(gram)[targets] - explained, 0.0)
    return residuals


def growth(reference: Reference, levels: Numbers) -> Numbers:
    """How an error at each node grows until the end, squared `[J+1]`; 1 at the end."""
    variance = float(np.var(reference.ends))
    return np.append(variance / (levels * variance + 1.0 - levels), 1.0)


def choose_nodes(first: Numbers, later: Numbers, steps: int) -> tuple[int, ...]:
    """The `steps` nodes, from node 0 on, whose steps to the end have the least sum of errors."""
    count = len(first)
    # cost[i, j]: of the best way to node j, coming from node i.
    cost = np.full((count, count), np.inf)
    cost[0, :] = first[0, :count]
    came_from: list[NDArray[np.int64]] = []
    if steps == 1:
        return (0,)
    for _ in range(steps - 2):
        through = cost[:, :, None] + later[:, :, :count]
        came_from.append(through.argmin(axis=0))
        cost = through.min(axis=0)
    i, j = np.unravel_index(int((cost + later[:, :, count]).argmin()), cost.shape)
    nodes = [int(j), int(i)]
    for table in reversed(came_from):
        nodes.append(int(table[nodes[-1], nodes[-2]]))
    return tuple(reversed(nodes))

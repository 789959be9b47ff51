"""What the whole-loop graph can do, and the table that it reads: as few columns as that takes.

The graph does the same operations in the same order as the step of the other loops (kernels.layout has the equations),
so its float32 bits are theirs. What some stage of some plan needs is in the graph for all of them; where a stage does
not need it, its coefficients are zero, and adding zero changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.kernels.layout import NUM_COLUMNS, Column
from skipstep.kernels.statistics import Thresholding

if TYPE_CHECKING:
    from skipstep.networks.spec import NetworkSpec
    from skipstep.plans.stages import Stages

# A column of this table alone: 1 where a stage keeps its state as the base, 0 where it leaves the base as it was.
WRITE_BASE: Final = NUM_COLUMNS


@dataclass(frozen=True, slots=True)
class LoopFeatures:
    """What a whole-loop graph can do beside x0 = X0_X·x + X0_OUT·out, next = C_X0·x0 + C_EPS·out.

    guided, rescale   classifier-free guidance, and taking back the spread that it adds.
    clip              a bound on the predicted image, thresholding one that is each sample's own, with its parameters.
    converts          the network predicts something other than the noise.
    rederive          the noise is derived again from the bounded image.
    state             next depends on x beyond its prediction.
    memory, base      what the multistep and Runge-Kutta solvers keep.
    noise             fresh noise; learned_variance scales it by the network's output.
    """

    guided: bool = False
    rescale: bool = False
    clip: bool = False
    converts: bool = False
    rederive: bool = False
    state: bool = False
    memory: bool = False
    base: bool = False
    noise: bool = False
    learned_variance: bool = False
    thresholding: Thresholding | None = None

    @classmethod
    def of(cls, network: NetworkSpec, stages: Stages, *, rescale: bool = False) -> LoopFeatures:
        """What these stages need. A network that can be guided always may be: calls with and without share a graph."""
        flags = stages.flags
        eps = stages.table[..., [Column.EPS_X, Column.EPS_OUT]]
        return cls(
            guided=network.can_guide,
            rescale=rescale,
            clip=any(f.clip for f in flags),
            converts=bool(np.any(eps != (0.0, 1.0))),
            rederive=any(f.rederive_eps for f in flags),
            state=any(f.add_state for f in flags),
            memory=any(f.write_memory for f in flags),
            base=any(f.write_base for f in flags),
            noise=stages.adds_noise,
            learned_variance=any(f.learned_variance for f in flags),
            thresholding=stages.thresholding,
        )

    def covers(self, other: LoopFeatures) -> bool:
        """Whether a graph with these features runs what needs `other`."""
        return self.thresholding == other.thresholding and self.union(other) == self

    def union(self, other: LoopFeatures) -> LoopFeatures:
        """Both. Where the two threshold differently no graph does, and this one's parameters are kept."""
        names = [each.name for each in fields(self) if each.name != "thresholding"]
        return LoopFeatures(
            **{name: getattr(self, name) or getattr(other, name) for name in names}, thresholding=self.thresholding
        )

    @property
    def size(self) -> int:
        """How much of it there is, to choose the leanest graph that covers a need."""
        return sum(bool(getattr(self, each.name)) for each in fields(self))

    @property
    def carried(self) -> tuple[str, ...]:
        """What goes from one evaluation to the next, the state first."""
        return ("x", *(name for name in ("memory", "base") if getattr(self, name)))

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of its table."""
        columns: list[int] = [Column.X0_X, Column.X0_OUT, Column.C_X0, Column.C_EPS]
        if self.clip:
            columns.append(Column.CLIP)
        if self.converts or self.rederive:
            columns += [Column.EPS_X, Column.EPS_OUT]
        if self.rederive:
            columns += [Column.RE_X, Column.RE_X0]
        if self.state:
            columns.append(Column.C_X)
        if self.base:
            columns += [Column.C_BASE, WRITE_BASE]
        if self.memory:
            columns += [Column.C_MEMORY, Column.M_X, Column.M_X0, Column.M_EPS, Column.M_MEMORY]
        if self.noise:
            columns.append(Column.SIGMA)
        if self.learned_variance:
            columns += [Column.LOG_SIGMA, Column.LOG_SIGMA_OUT]
        return tuple(columns)


# What walking back up needs: a product and a sum a stage.
INVERSION = LoopFeatures(state=True)


def shared_features(network: NetworkSpec, stages: Iterable[Stages], *, any_plan: bool = False) -> list[LoopFeatures]:
    """As few sets of features as cover all these stages, and inversion: one for all that threshold alike.

    `any_plan`: one more, for whatever a plan without thresholding may need.
    """
    shared: dict[Thresholding | None, LoopFeatures] = {}
    for each in stages:
        features = LoopFeatures.of(network, each)
        shared[features.thresholding] = features.union(shared.get(features.thresholding, INVERSION))
    everything = LoopFeatures(
        guided=network.can_guide,
        rescale=network.can_guide,
        clip=True,
        converts=True,
        rederive=True,
        state=True,
        memory=True,
        base=True,
        noise=True,
        learned_variance=network.learns_variance,
    )
    return [*shared.values(), *([everything] if any_plan and everything not in shared.values() else [])]


def loop_table(stages: Stages, features: LoopFeatures) -> NDArray[np.float32]:
    """The stages' coefficients float32 `[E, 1 or B, len(features.columns)]`, zero where a stage's flags are off."""
    table = np.concatenate([stages.table, np.zeros_like(stages.table[..., :1])], axis=2)
    for rows, flags in zip(table, stages.flags, strict=True):
        off: list[int] = []
        if not flags.clip:
            rows[:, Column.CLIP] = np.inf
        off += [Column.EPS_X, Column.EPS_OUT] if flags.rederive_eps else [Column.RE_X, Column.RE_X0]
        if not flags.add_state:
            off.append(Column.C_X)
        if not flags.read_base:
            off.append(Column.C_BASE)
        if not flags.read_memory:
            off += [Column.C_MEMORY, Column.M_MEMORY]
        if not flags.add_noise:
            off.append(Column.SIGMA)
        if not flags.learned_variance:
            off += [Column.LOG_SIGMA, Column.LOG_SIGMA_OUT]
        rows[:, off] = 0.0
        if not flags.write_memory:
            rows[:, [Column.M_X, Column.M_X0, Column.M_EPS]], rows[:, Column.M_MEMORY] = 0.0, 1.0
        rows[:, WRITE_BASE] = flags.write_base
    return np.ascontiguousarray(table[..., list(features.columns)])

"""What a recorded loop is made for, on any GPU path."""

from __future__ import annotations

from dataclasses import dataclass, field

from skipstep.calls.request import SampleRequest
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.statistics import Thresholding
from skipstep.loops.contract import call_flags
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages


@dataclass(frozen=True, slots=True)
class Structure:
    """What a graph is made for: the flags of every stage, how it thresholds, B samples, and rows of a stage's table
    (1, or B where samples follow plans of their own). All else is data."""

    flags: tuple[StepFlags, ...]
    thresholding: Thresholding | None
    num_samples: int
    rows: int
    # Of the fields above; a thousand stages take longer to hash than a call takes otherwise.
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.flags, self.thresholding, self.num_samples, self.rows)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, network: NetworkSpec, stages: Stages, request: SampleRequest) -> Structure:
        kind = request.num_samples, request.guidance is not None, request.rescale is not None, network.learns_variance
        held = stages.structures.get(kind)
        if held is None:
            flags = call_flags(network, stages, request)
            held = cls(flags, stages.thresholding, request.num_samples, stages.table.shape[1])
            stages.structures[kind] = held
        return held

    @property
    def guided(self) -> bool:
        """Whether the call is: single stages may be made without guidance."""
        return self.flags[0].guided or self.flags[0].doubled

    @property
    def needs_half(self) -> bool:
        """Whether some stage of a guided call is made without guidance."""
        return any(flags.doubled for flags in self.flags)

    def __len__(self) -> int:
        return len(self.flags)

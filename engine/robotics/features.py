"""What a policy reads and writes: named features, their shapes, and how their values are normalised.

min_max     2·(x - low) / (high - low) - 1, in [-1, 1]
mean_std    (x - mean) / (std + 1e-8)

These are LeRobot's formulas, also where low and high are equal; its quantile modes are min_max of the quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import float32, from_dlpack, host_floats
from skipstep.errors import InputError, check_choice, check_integer, shown
from skipstep.networks.condition import MAX_RANK, Side, check_shape
from skipstep.storage.untrusted import Length, Within

EPSILON: Final = 1e-8
MAX_STEPS: Final = 1 << 12
_MAX_NUMBER: Final = 3e38
Kind = Literal["state", "image", "environment", "action"]
Steps = Annotated[int, Within(1, MAX_STEPS)]
Number = Annotated[float, Within(-_MAX_NUMBER, _MAX_NUMBER)]
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Normalisation:
    """`mode` with its statistics: `first` and `second` are low and high, or mean and std, one number per channel."""

    mode: Literal["min_max", "mean_std"]
    first: Annotated[tuple[Number, ...], Length(1)]
    second: Annotated[tuple[Number, ...], Length(1)]

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("min_max", "mean_std"))
        if len(self.first) != len(self.second):
            raise InputError(
                got=f"statistics of {len(self.first)} and {len(self.second)} channels",
                expected="the same number of channels",
                remedy="pass the statistics of the data set that the policy was trained on",
            )

    def terms(self, rank: int) -> tuple[Array, Array]:
        """(shift, scale) as arrays that broadcast over a feature of that rank, channels first."""
        first, second = (
            np.array(each, np.float32).reshape(-1, *(1,) * (rank - 1)) for each in (self.first, self.second)
        )
        if self.mode == "mean_std":
            return first, second
        width = second - first
        return first, np.where(width == 0, np.float32(EPSILON), width)

    def undone(self, values: Array) -> Array:
        """Values as the data set has them, from normalised `[…, channels]`."""
        shift, scale = self.terms(1)
        return float32(values * scale + shift if self.mode == "mean_std" else (values + 1) / 2 * scale + shift)


@dataclass(frozen=True, slots=True)
class Feature:
    """One named input or output of a policy; `shape` is that of one moment. `normalisation`: None for none."""

    name: str
    kind: Kind
    shape: Annotated[tuple[Side, ...], Length(1, MAX_RANK)]
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape("shape", self.shape, low=1, remedy="pass e.g. (7,)"))
        channels = 0 if self.normalisation is None else len(self.normalisation.first)
        if channels not in (0, 1, self.shape[0]):
            raise InputError(
                got=f"statistics of {channels} channels for {self.name!r} of shape {self.shape}",
                expected=f"{self.shape[0]} channels",
                remedy="pass the statistics of the data set that the policy was trained on",
            )


# No slots: a cached property needs a dictionary.
@dataclass(frozen=True)
class PolicySpec:
    """The times of a policy, and its features: `observations` in the order in which the encoder reads them.

    A chunk has `horizon` moments, the first of which is that of the oldest of `n_obs_steps` observations; a robot
    carries out `n_action_steps` of them, from the moment of the newest observation on.
    """

    horizon: Steps
    n_obs_steps: Steps
    n_action_steps: Steps
    observations: Annotated[tuple[Feature, ...], Length(1)]
    action: Feature

    def __post_init__(self) -> None:
        for name in ("horizon", "n_obs_steps", "n_action_steps"):
            check_integer(name, getattr(self, name), low=1, high=MAX_STEPS)
        self.check_action_steps(self.n_action_steps)
        names = [each.name for each in self.observations]
        if len(set(names)) != len(names) or len(self.action.shape) != 1:
            raise InputError(
                got=f"observations {names!r:.200} and an action of shape {self.action.shape}",
                expected="distinct names, and an action that is a vector",
                remedy="pass each feature once",
            )

    @cached_property
    def first_action(self) -> int:
        """The index in a chunk of the action for the newest observation."""
        return self.n_obs_steps - 1

    def check_action_steps(self, count: object) -> int:
        """`count`, if a chunk has that many actions from the newest observation on. Raises InputError."""
        high = self.horizon - self.n_obs_steps + 1
        return check_integer("n_action_steps", count, low=1, high=max(high, 0))

    def checked(self, given: object, *, lead: tuple[str, ...]) -> dict[str, Array]:
        """The observations as contiguous float32 `[*lead, *shape]`, in order; what else `given` holds is left out.

        `lead` names the leading dimensions: ("batch", "n_obs_steps"), or none for one moment. Raises InputError.
        """
        if not isinstance(given, Mapping):
            raise InputError(
                got=f"observations={shown(given)}",
                expected="a mapping of " + ", ".join(each.name for each in self.observations),
                remedy="pass a dict of arrays by these names",
            )
        found = {each.name: self._array(each, given, lead) for each in self.observations}
        if lead and len({len(array) for array in found.values()}) != 1:
            raise InputError(
                got="observations for " + ", ".join(f"{len(array)} ({name})" for name, array in found.items()),
                expected="one batch size",
                remedy="pass arrays [batch, n_obs_steps, …] of the same batch",
            )
        return found

    def _array(self, feature: Feature, given: Mapping[Any, Any], lead: tuple[str, ...]) -> Array:
        if feature.name not in given:
            raise InputError(
                got=f"no {feature.name!r} among the observations {sorted(map(str, given))!r:.200}",
                expected=f"an array [{', '.join((*lead, *map(str, feature.shape)))}]",
                remedy="pass every feature that the policy was trained with",
            )
        array = float32(host_floats(feature.name, from_dlpack(feature.name, given[feature.name])))
        times = array.shape[1 : len(lead)]
        fits = array.ndim == len(lead) + len(feature.shape) and array.shape[len(lead) :] == feature.shape
        if not fits or times not in ((), (self.n_obs_steps,)) or not array.size:
            raise InputError(
                got=f"{feature.name} of shape {array.shape}",
                expected=f"[{', '.join((*lead, *map(str, feature.shape)))}]"
                + (f" with n_obs_steps = {self.n_obs_steps}" if lead else ""),
                remedy="stack the newest observations, the oldest first"
                if lead
                else "pass one moment, without a batch",
            )
        if not math.isfinite(float(np.sum(array, dtype=np.float64))):
            raise InputError(
                got=f"{feature.name} with numbers that are not finite",
                expected="finite numbers",
                remedy="leave such observations out, or pass the one before",
            )
        return array

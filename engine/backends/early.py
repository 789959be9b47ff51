"""What of a network is computed before the loop: its step inputs, once for each distinct timestep, each distinct
conditioning and each distinct pair of them. How the parts are run is a backend's own."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.conditioning import Conditioning, distinct
from skipstep.errors import ExportError
from skipstep.networks.graphs import StepInputs, Values
from skipstep.networks.spec import LABELS, NetworkSpec

_MAX_TABLES: Final = 32
# Of one plan's values for every label, that are stored: to read more takes longer than to compute a call's.
_MAX_LABEL_BYTES: Final = 1 << 24
BY_LABEL: Final = "by label/"


@dataclass(slots=True)
class EarlyParts(ABC):
    """A network's parts that run before the loop: they compute StepInputs.

    `graphs` by binding time ("plan", "prompt", "call"), as the backend has them. What follows from timesteps alone is
    kept, and may be given as `tables` beforehand: the bytes of sorted distinct timesteps float64 to values, as a bundle
    holds them. Where they have a part's values for every label (`of_labels`), that part is not run.
    """

    graphs: Mapping[str, Any]
    spec: NetworkSpec
    tables: dict[bytes, Values] = field(default_factory=dict, kw_only=True)
    _lock: threading.Lock = field(default_factory=threading.Lock, kw_only=True)

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        """For `timesteps` `[E, N]` and the conditioning of N samples."""
        each_timestep, index = distinct(timesteps)
        stored = self.tables_at(each_timestep)
        names = [name for name in stored if not name.startswith(BY_LABEL)]
        plan = stored if len(names) == len(stored) else {name: stored[name] for name in names}
        rows = dict(conditioning.rows)
        labels = rows[LABELS] if set(rows) == {LABELS} else None
        found = None if labels is None else _of_these(stored, "prompt", labels)
        prompt: Values = {**rows, **(self._outputs("prompt", rows) if found is None else found)}
        call: Values = {}
        pair_index = index
        if "call" in self.graphs:
            # Pairs of timestep and conditioning as numbers, so that each is computed once.
            numbers = index * conditioning.num_rows + conditioning.index
            pairs, pair_index = distinct(numbers)
            of_time, of_prompt = np.divmod(pairs, conditioning.num_rows)
            found = None if labels is None else _of_these(stored, "call", of_time, labels[of_prompt])
            if found is None:
                given = {name: values[of_time] for name, values in plan.items()}
                given |= {name: values[of_prompt] for name, values in rows.items()}
                found = self._outputs("call", given)
            call = found
        return StepInputs(plan, call, prompt, index, pair_index, conditioning.index)

    def tables_at(self, timesteps: NDArray[np.float64]) -> Values:
        """Values `[len(timesteps), …]` that follow from distinct sorted timesteps, these among them."""
        key = timesteps.tobytes()
        with self._lock:
            if key not in self.tables:
                while len(self.tables) >= _MAX_TABLES:
                    self.tables.pop(next(iter(self.tables)))
                given: Values = {"timestep": timesteps.astype(self.spec.timestep_dtype)}
                self.tables[key] = {**given, **self._outputs("plan", given)}
            return self.tables[key]

    def of_labels(self, timesteps: NDArray[np.float64]) -> Values:
        """Beside what follows from distinct sorted timesteps, of a network that labels alone condition, what follows
        from each label: `by label/prompt/NAME` `[labels, …]` and `by label/call/NAME` `[timesteps, labels, …]`, unless
        that is much."""
        plan = self.tables_at(timesteps)
        if set(self.spec.all_conditions) != {LABELS} or self.spec.num_classes is None:
            return plan
        labels = np.arange(max(self.spec.num_classes, 1 + (self.spec.null_label or 0)))
        of_prompt = self._outputs("prompt", {LABELS: labels})
        found = {f"{BY_LABEL}prompt/{name}": values for name, values in of_prompt.items()}
        rows: list[Values] = []
        for label in labels:  # One after the other, as a call with this label computes them.
            rows.append(self._outputs("call", {**plan, LABELS: np.full(len(timesteps), label)}))
            num_bytes = len(labels) * sum(values.nbytes for values in rows[0].values())
            if num_bytes + sum(values.nbytes for values in of_prompt.values()) > _MAX_LABEL_BYTES:
                return plan
        found |= {f"{BY_LABEL}call/{name}": np.stack([each[name] for each in rows], axis=1) for name in rows[0]}
        return plan | found

    def _outputs(self, name: str, given: Mapping[str, NDArray[np.generic]]) -> Values:
        """The outputs of the part of that name, a row for each of the `given` rows; nothing where there is no such
        part. Raises ExportError for outputs that are none."""
        if name not in self.graphs:
            return {}
        values, num_rows = self._run(name, given), len(next(iter(given.values())))
        for output, value in values.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "iufb" or value.shape[:1] != (num_rows,):
                raise graph_failed(f"{name} output {output!r} is not an array of {num_rows} rows")
        return values

    @abstractmethod
    def _run(self, name: str, given: Mapping[str, NDArray[np.generic]]) -> Values:
        """The outputs of the part of that name, which is there."""


def _of_these(stored: Values, part: str, *places: NDArray[np.int64]) -> Values | None:
    """A part's values at these places, labels last; None where they are not stored."""
    prefix = f"{BY_LABEL}{part}/"
    values = {name.removeprefix(prefix): each for name, each in stored.items() if name.startswith(prefix)}
    try:
        return {name: each[places] for name, each in values.items()} or None
    except IndexError as error:
        raise graph_failed(f"stored values of another shape: {error}") from error


def graph_failed(why: Exception | str) -> ExportError:
    """The error for a graph that a runtime takes and that does not do what the export promises."""
    what = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    return ExportError(
        got=f"a graph that failed: {what:.500}",
        expected="one that this version of skipstep exported",
        remedy="export the network again; report it if that does not help",
    )

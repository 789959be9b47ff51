"""What an interrupted tuning has computed already, under everything that it depends on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from skipstep.backends.denoiser import Keep
from skipstep.fitting.reference import Denoiser, Reference
from skipstep.version import __version__


@dataclass(frozen=True, slots=True)
class KeptParts:
    """Parts of one tuning; without `keep` nothing is kept and everything is computed."""

    keep: Keep | None
    facts: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        keep: Keep | None,
        denoisers: Sequence[Denoiser],
        *,
        network: str | None,
        runs_on: tuple[str, str],
        nodes: int,
        rounds: int,
    ) -> Self:
        """Of the noises and conditions of `denoisers`; of a network without a digest nothing is kept."""
        digest = hashlib.sha256()
        for denoiser in denoisers:
            options = {name: value for name, value in sorted(denoiser.options.items()) if name != "schedule"}
            digest.update(repr(options).encode())
            for array in (denoiser.schedule.alpha_bar, denoiser.noise):
                digest.update(array.tobytes())
            for each in fields(denoiser.request):
                value = getattr(denoiser.request, each.name)
                for name, array in value.items() if isinstance(value, Mapping) else [("", value)]:
                    data = array.tobytes() if isinstance(array, np.ndarray) else b""
                    digest.update(f"{each.name}/{name}".encode() + data)
        facts = {"network": network, "runs on": runs_on, "version": __version__, "calls": digest.hexdigest()}
        return cls(None if network is None else keep, {**facts, "nodes": nodes, "rounds": rounds})

    def reference(self, name: str, grid: Sequence[int], integrate: Callable[[], Reference]) -> Reference:
        """Trajectories over the grid."""

        def computed() -> dict[str, Any]:
            found = integrate()
            return {"states": found.states, "images": found.images, "ends": found.ends}

        facts = {each: value for each, value in self.facts.items() if each != "rounds"}
        return Reference(tuple(grid), **self._kept(f"{name} trajectories", facts, computed))

    def nodes(self, steps: int, search: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The nodes of a plan of so many steps."""
        found = self._kept(f"nodes of {steps} steps", self.facts, lambda: {"nodes": np.array(search())})
        return tuple(found["nodes"].tolist())

    def _kept(self, name: str, facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.keep is None:
            return compute()
        slot = self.keep(f"tuning: {name}", {**facts, "part": name})
        data = slot.get()
        if data is None:
            found = compute()
            buffer = io.BytesIO()
            np.savez(buffer, **found)
            slot.put(buffer.getvalue())
            return found
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)

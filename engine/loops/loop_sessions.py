"""ONNX Runtime sessions of the whole-loop graph, by what they can do. Light to import: loading a bundle begins here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence

from onnxruntime import InferenceSession

from skipstep.errors import PlanError, SkipstepError
from skipstep.loops.loop_table import LoopFeatures


class LoopSessions:
    """Sessions of the loop by what they can do, made when first needed and shared by all batch sizes.

    `available` are the only features that `make` can give a session for; None: it makes any.
    """

    def __init__(
        self,
        make: Callable[[LoopFeatures], InferenceSession],
        available: Sequence[LoopFeatures] | None = None,
    ) -> None:
        self._make = make
        self._available = available
        self._held: dict[LoopFeatures, InferenceSession] = {}
        self._lock = threading.Lock()

    def prefetch(self, features: LoopFeatures) -> None:
        """Begin to make a session in the background; a call that needs it waits until it is there.

        The runtime holds no lock of Python's meanwhile. What goes wrong is raised by the call that asks again.
        """

        def make() -> None:
            with contextlib.suppress(SkipstepError):
                self.get(features)

        # Not a daemon: a process that ends waits for the runtime to come to rest.
        threading.Thread(target=make, name="skipstep-prefetch").start()

    def close(self) -> None:
        with self._lock:
            self._held.clear()

    def get(self, needed: LoopFeatures) -> tuple[LoopFeatures, InferenceSession]:
        """The leanest held session that covers `needed`, or a new one. Raises PlanError where there can be none."""
        with self._lock:
            features = _leanest(self._held, needed)
            if features is None:
                features = needed if self._available is None else _leanest(self._available, needed)
                if features is None:
                    raise PlanError(
                        got=f"a call that needs {needed}",
                        expected="what the loops of this bundle can do",
                        remedy="export the bundle with such a plan, or with any_plan=True (--any-plan)",
                    )
                self._held[features] = self._make(features)
            return features, self._held[features]


def _leanest(there: Iterable[LoopFeatures], needed: LoopFeatures) -> LoopFeatures | None:
    return min((each for each in there if each.covers(needed)), key=lambda each: each.size, default=None)

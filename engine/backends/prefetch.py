"""Values that are made once: when first needed or in the background before, or for each key while in use."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Lazy(Generic[T]):
    """What `make` returns, made when it is first needed, once; `prefetch` begins in the background.

    A runtime holds no Python lock while it loads, so the rest of loading, imports included, goes on meanwhile.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] | None = make
        self._made: list[T] = []
        self._lock = threading.Lock()

    def get(self) -> T:
        """Raises what `make` raises, at every call until it succeeds."""
        with self._lock:
            if self._make is not None:
                self._made.append(self._make())
                self._make = None  # What it holds, such as a graph's bytes, is needed no more.
            return self._made[0]

    def prefetch(self) -> None:
        # Not a daemon: a process that ends waits until the runtime has finished.
        threading.Thread(target=self._quietly, name="skipstep-prefetch").start()

    def _quietly(self) -> None:
        with contextlib.suppress(Exception):  # The call that needs the value raises it again.
            self.get()


class Shared(Generic[T]):
    """What `make` returns for a key, made once as long as somebody holds it."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._live: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, key: int) -> T:
        with self._lock:
            found = self._live.get(key)
            if found is None:
                found = self._live[key] = self._make(key)
            return found

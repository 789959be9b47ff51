"""The artefact cache as backends use it (skipstep.backends.denoiser.Keep): bytes under what they depend on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from skipstep.bundles.cache import ArtefactCache
from skipstep.bundles.cache_key import cache_key
from skipstep.errors import CacheError, StorageError


class CacheSlot:
    """One entry of the cache. What cannot be read or written is not kept."""

    def __init__(self, description: str, parts: Mapping[str, Any]) -> None:
        self._description, self._key = description, cache_key(**parts)

    def get(self) -> bytes | None:
        with suppress(CacheError, StorageError):
            return ArtefactCache().get(self._key)
        return None

    def put(self, data: bytes) -> None:
        with suppress(CacheError, StorageError):
            ArtefactCache().put(self._key, data, self._description)

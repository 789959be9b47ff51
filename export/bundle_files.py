"""The files of a bundle that is being written, and the versions of the packages that make them."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from skipstep.bundles.manifest import FileEntry
from skipstep.errors import ExportError


class BundleFiles:
    """The files of a bundle that is being written: each is written once, and its size and hash are recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, FileEntry] = {}

    def add(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.entries[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        return name

    def add_graph(self, name: str, graph: bytes) -> str:
        if b"location" in graph:
            raise ExportError(
                got=f"a graph with 'location' in a name, {name}",
                expected="no such name: loaders refuse the word, which could refer to another file",
                remedy="rename the module or parameter that is called so",
            )
        return self.add(name, graph)


def package_version(package: str) -> str:
    """The installed version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

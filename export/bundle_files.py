"""The files of a bundle that is being written, and the versions of the packages that make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from skipstep.bundles.bundle import weight_file
from skipstep.bundles.manifest import FileEntry
from skipstep.errors import ExportError
from skipstep.networks.large_graph import LOCATION, LargeGraph, Weights, without_stored_weights

PART_BYTES: Final = 1 << 29


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
        """A graph; its weights outside of it become safetensors files, in which other tools find them by offset."""
        if isinstance(graph, LargeGraph):
            graph = self._add_weights(name, graph)
        if LOCATION in without_stored_weights(graph):
            raise ExportError(
                got=f"a graph with 'location' in a name, {name}",
                expected="no such name: loaders refuse the word, which could refer to another file",
                remedy="rename the module or parameter that is called so",
            )
        return self.add(name, graph)

    def _add_weights(self, name: str, graph: LargeGraph) -> bytes:
        from skipstep.export.graph_writer import load_graph  # onnx: a device that only calibrates has none.

        model = load_graph(graph)
        tensors = {each.name: each for each in model.graph.initializer}
        for number, part in enumerate(_in_parts(graph.weights)):
            file = self.add(weight_file(name, number), data := save_arrays(part))
            begin = 8 + int.from_bytes(data[:8], "little")
            for key, about in json.loads(data[8:begin]).items():
                first, last = about["data_offsets"]
                where = {"location": file.rpartition("/")[2], "offset": begin + first, "length": last - first}
                del tensors[key].external_data[:]
                for word, value in where.items():
                    tensors[key].external_data.add(key=word, value=str(value))
        return bytes(model.SerializeToString())


def _in_parts(weights: Weights) -> Iterator[dict[str, NDArray[Any]]]:
    """The weights in parts of about PART_BYTES: one is in memory twice while it is written or read."""
    part: dict[str, NDArray[Any]] = {}
    for name, array in weights.items():
        if part and sum(each.nbytes for each in part.values()) + array.nbytes > PART_BYTES:
            yield part
            part = {}
        part[name] = array
    yield part


def package_version(package: str) -> str:
    """The installed version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

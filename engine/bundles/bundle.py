"""A bundle: a compiled sampler in a folder, which runs without the tools that compiled it.

    manifest.json         what is in it (skipstep.bundles.manifest); manifest.sig is its signature, where it is signed
    tables.safetensors    schedules, and each plan's coefficients, timesteps and step inputs (skipstep.bundles.tables)
    golden.safetensors    samples that the builder drew; skipstep verify draws them again
    network/*.onnx        the network by binding time: plan, prompt, call, and step, which a loop runs at every stage
    engines/, kernels/    TensorRT engines and step kernels, by target
    onnx-*/, server/      whole loops as ONNX graphs for other hosts, where requested
    trtexec/              the step network, plans and examples for TensorRT's own tools, where requested
    calibration.json      measured latencies of its plans, by device (skipstep.latency.calibration)

Nothing is parsed before its hash matches the manifest, and the very bytes that were hashed are the bytes that are
parsed. Loading needs NumPy and ONNX Runtime; neither torch nor diffusers is imported.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skipstep.bundles.manifest import FILE_NAME, MAX_BYTES, SIGNATURE_NAME, EngineEntry, Manifest
from skipstep.bundles.reader import parse_manifest
from skipstep.cuda.probe import DeviceFacts
from skipstep.errors import (
    BundleError,
    DeviceUnavailableError,
    IntegrityError,
    SignatureError,
    check_choice,
    check_flag,
    check_path,
)
from skipstep.networks.large_graph import LOCATION, with_weights, without_stored_weights
from skipstep.storage.verified import read_regular, read_verified

if TYPE_CHECKING:
    from numpy.typing import NDArray


# The field op_type of an ONNX node, 4, with these names of operators; its tag and length may be written with padding.
_LOOP = re.compile(rb"(?:\x22|\xa2\x80*\x00)(?:\x04|\x84\x80*\x00)(?:Loop|Scan)").search
# Of reading a bundle that others replace.
_ATTEMPTS = 5

T = TypeVar("T")


def weight_file(graph: str, number: int) -> str:
    """The name of a file with weights of the graph of that name; they count from 0."""
    return f"{graph}.{number}.safetensors"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose manifest has been read. `read` gives a file's bytes, verified.

    `signed_bytes` are the manifest's; `signed` is whether a signature exists, not whether it was checked.
    """

    path: Path
    manifest: Manifest
    signed_bytes: bytes
    signed: bool
    allow_hard_links: bool = False

    def read(self, name: str) -> bytes:
        """The bytes that the manifest promises. Raises IntegrityError, and InputError for a name that it lacks."""
        files = self.manifest.files
        entry = files[check_choice("name", name, tuple(files), remedy="pass a name of manifest.files")]
        return read_verified(
            self.path, name, size=entry.size, sha256=entry.sha256, allow_hard_links=self.allow_hard_links
        )

    def refuse_other_files(self) -> None:
        """Raise IntegrityError where the folder holds files that the manifest does not name."""
        known = {*self.manifest.files, FILE_NAME, SIGNATURE_NAME}
        found = (Path(folder, name) for folder, _, names in os.walk(self.path) for name in names)
        others = sorted(name for each in found if (name := each.relative_to(self.path).as_posix()) not in known)
        if others:
            raise IntegrityError(
                got=f"{len(others)} files in {self.path} that its manifest does not name: {', '.join(others[:5])}",
                expected="what the manifest names, its signature, and nothing else",
                remedy="remove them if they are yours; otherwise take the bundle from its source again",
            )

    def read_graph(self, name: str) -> bytes:
        """An ONNX graph without loops, whole: with the weights that the bundle has beside it. Raises IntegrityError and
        BundleError."""
        graph = self.read(name)
        weights = self._weights_beside(name)
        problem = None
        if weights:
            try:
                graph = without_stored_weights(graph)
            except ValueError as error:
                problem = f"has {error}"
        problem = "refers to other files" if LOCATION in graph else problem
        # The expression takes several times as long as a look for the words in it.
        if (b"Loop" in graph or b"Scan" in graph) and _LOOP(graph):
            problem = problem or "may run for ever"
        if problem is not None:
            raise BundleError(
                got=f"{self.path / name}, a graph that {problem}",
                expected="a graph that is complete in itself or with the bundle's weights, without loops",
                remedy="do not use this bundle: skipstep export writes no such graph",
            )
        try:
            return with_weights(graph, weights) if weights else graph
        except ValueError as error:
            raise BundleError(
                got=f"weights of {self.path / name} of which {error}",
                expected="tensors of a dtype of ONNX",
                remedy="export the bundle again",
            ) from error

    def _weights_beside(self, name: str) -> dict[str, NDArray[Any]]:
        weights: dict[str, NDArray[Any]] = {}
        files = takewhile(self.manifest.files.__contains__, (weight_file(name, number) for number in count()))
        for file in files:
            weights |= self.read_arrays(file)
        return weights

    def read_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """A safetensors file. Raises IntegrityError and BundleError."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        data = self.read(name)
        try:
            return load(data)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise BundleError(
                got=f"{self.path / name}, which is no safetensors file ({error})",
                expected="tables as skipstep export writes them",
                remedy="export the bundle again",
            ) from error


def read_engine(
    bundle: Bundle, *, library: str, version: str, device: DeviceFacts, batch_size: int
) -> tuple[bytes, EngineEntry]:
    """The TensorRT engine of a bundle that this device and library can run, verified, for a network batch size.

    An engine runs on the platform, on the architecture and with the library version that it was built for; any other
    combination may crash, so it is refused here. One of full TensorRT ("tensorrt") was tuned for one device: devices
    of one name are told apart by their multiprocessors. Raises DeviceUnavailableError, which lists the engines of the
    bundle, and IntegrityError.
    """
    requested = {
        "library": library,
        "library_version": version,
        "platform": sysconfig.get_platform(),
        "compute_capability": device.compute_capability,
        "batch_size": batch_size,
        "device": device.name if library == "tensorrt" else None,
        "num_multiprocessors": device.num_multiprocessors if library == "tensorrt" else None,
    }
    engines = [
        (entry, {name: entry.facts.get(name) for name in requested} | {"batch_size": size})
        for entry in bundle.manifest.engines
        for size in _engine_sizes(entry)
    ]
    for entry, facts in engines:
        if facts == requested:
            return bundle.read(entry.file), entry

    def described(facts: Mapping[str, Any]) -> str:
        built_for = "" if facts["device"] is None else " ({device}, {num_multiprocessors} multiprocessors)"
        text = "{library} {library_version} for sm_{compute_capability}" + built_for + " at batch {batch_size}"
        return (text + " on {platform}").format(**facts)

    raise DeviceUnavailableError(
        got=f"a device and library that need {described(requested)}",
        expected="; or ".join(described(facts) for _, facts in engines) or "engines: this bundle has none",
        remedy="build engines on this device with skipstep build",
    )


def _engine_sizes(entry: EngineEntry) -> list[Any]:
    """The batch sizes of an engine: those of its profiles, else that of its first input."""
    profiles, inputs = entry.facts.get("profiles"), entry.facts.get("inputs")
    if isinstance(profiles, list) and profiles:
        return profiles
    shapes = [each.get("shape") for each in inputs if isinstance(each, dict)] if isinstance(inputs, list) else []
    return [shapes[0][0] if shapes and isinstance(shapes[0], list) and shapes[0] else None]


def while_unchanged(path: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """What `read` returns. Where it fails and the bundle was replaced meanwhile, it reads the new one."""
    folder = Path(check_path("path", path))
    for _ in range(_ATTEMPTS - 1):
        before = _identity(folder)
        try:
            return read()
        except (IntegrityError, SignatureError):
            if _identity(folder) == before:
                raise
    return read()


def open_bundle(
    path: str | os.PathLike[str],
    *,
    require_signature: str | os.PathLike[str] | None = None,
    allow_hard_links: bool = False,
) -> Bundle:
    """Read and check the manifest of the bundle at `path`; no other file is touched.

    `require_signature` is the public key that must have signed it. `allow_hard_links` is for folders that a package
    manager fills by linking. Raises BundleError, SignatureError, IntegrityError.
    """
    folder = Path(check_path("path", path))
    key = None if require_signature is None else check_path("require_signature", require_signature)
    check_flag("allow_hard_links", allow_hard_links)
    data = _read_small(folder, FILE_NAME, MAX_BYTES)
    if data is None:
        raise BundleError(
            got=f"no {FILE_NAME} in {folder}",
            expected="a folder that skipstep export wrote",
            remedy="check the path, or copy the whole folder",
        )
    signature = _read_small(folder, SIGNATURE_NAME, 1 << 12)
    if key is not None:
        if signature is None:
            raise SignatureError(
                got=f"an unsigned bundle, {folder}",
                expected=f"one signed with the key of {key}",
                remedy="take the bundle from its publisher, or sign it with skipstep sign",
            )
        from skipstep.storage.signature import verify

        verify(data, signature, key)
    return Bundle(folder, parse_manifest(data), data, signature is not None, allow_hard_links)


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Other numbers for another folder of the same name; None where there is none."""
    try:
        found = os.stat(folder)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def is_bundle(path: str | os.PathLike[str]) -> bool:
    return (Path(path) / FILE_NAME).is_file()


def _read_small(folder: Path, name: str, limit: int) -> bytes | None:
    """The bytes of a file of at most `limit` bytes; None if it does not exist. Raises BundleError for other kinds."""
    try:
        # One byte more than is allowed shows that there are more.
        data = read_regular(folder / name, limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(folder / name, str(error)) from error
    if len(data) > limit:
        raise _unreadable(folder / name, f"more than {limit} bytes")
    return data


def _unreadable(path: Path, why: str) -> BundleError:
    return BundleError(
        got=f"{path}, which cannot be read: {why}",
        expected="a regular file of a bundle",
        remedy="copy the bundle again from where it came",
    )

"""A policy on disk: a folder that `load_policy` runs without torch.

policy.json           times, features, statistics; size and sha256 of the other two
observations.onnx     the observation encoder
engine/               a bundle (skipstep.load), whose manifest has the hashes of its files
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from skipstep.bundles.manifest import FILE_NAME as MANIFEST
from skipstep.bundles.manifest import FileEntry
from skipstep.errors import BundleError, check_flag, check_path
from skipstep.robotics.features import PolicySpec
from skipstep.storage.atomic import atomic_folder, atomic_write
from skipstep.storage.untrusted import parse_json, read_dataclass, read_schema
from skipstep.storage.verified import read_below

FILE_NAME: Final = "policy.json"
SCHEMA: Final = 1
ENGINE, GRAPH = "engine", "observations.onnx"
_MAX_BYTES: Final = 16 << 20


class SavablePolicy(Protocol):
    """What is saved of a skipstep.robotics.PolicyEngine."""

    engine: Any
    spec: PolicySpec
    graph: bytes


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """The whole of policy.json. `engine` is the entry of the engine's manifest."""

    spec: PolicySpec
    observations: FileEntry
    engine: FileEntry
    schema: int = SCHEMA

    def to_json(self) -> bytes:
        """The same contents always give the same bytes."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def save(
    policy: SavablePolicy, path: str | os.PathLike[str], *, license: str, name: str = "policy", overwrite: bool = False
) -> None:
    """Write a policy that was made of a model as a folder that `load_policy` reads.

    license    of the weights, as an SPDX expression or in words: it travels with them.
    overwrite  replace a folder that is there; only by a whole one.

    The engine's bundle draws its golden samples again before it counts. Raises what skipstep.Engine.save raises.
    """
    folder = Path(check_path("path", path))
    check_flag("overwrite", overwrite)
    with atomic_folder(folder, replace=overwrite) as new:
        policy.engine.save(new / ENGINE, license=license, name=name)
        atomic_write(new / GRAPH, policy.graph)
        manifest = (new / ENGINE / MANIFEST).read_bytes()
        contents = PolicyFile(policy.spec, _entry(policy.graph), _entry(manifest))
        atomic_write(new / FILE_NAME, contents.to_json())


def read_policy_file(folder: Path) -> PolicyFile:
    """Raises BundleError, whatever the bytes."""
    if not (folder / FILE_NAME).exists():
        raise BundleError(
            got=f"no {FILE_NAME} in {folder}",
            expected="a folder that policy.save() wrote",
            remedy="check the path, or copy the whole folder",
        )
    value = parse_json(read_below(folder, FILE_NAME, limit=_MAX_BYTES), FILE_NAME)
    read_schema(value, FILE_NAME, known=SCHEMA, remedy="save the policy again with this version")
    return read_dataclass(PolicyFile, value, FILE_NAME)


def _entry(data: bytes) -> FileEntry:
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())

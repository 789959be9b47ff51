"""From a policy on disk to a policy engine, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from skipstep.bundles.manifest import FILE_NAME as MANIFEST
from skipstep.bundles.manifest import FileEntry
from skipstep.errors import check_flag, check_path
from skipstep.loading import LoadOptions, load
from skipstep.robotics.bundle import ENGINE, FILE_NAME, GRAPH, read_policy_file
from skipstep.robotics.policy import PolicyEngine
from skipstep.storage.untrusted import own_rules
from skipstep.storage.verified import read_verified


def load_policy(path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> PolicyEngine:
    """The policy in a folder that `PolicyEngine.save` wrote; every byte is verified before it is used.

    options: device, backend, num_threads and so on: skipstep.loading.LoadOptions; a signature that is required is that
    of the engine's bundle. Raises BundleError and its kinds, and what skipstep.load raises.
    """
    folder = Path(check_path("path", path))
    hard_links = options.get("allow_hard_links", False)
    check_flag("allow_hard_links", hard_links)
    contents = read_policy_file(folder)
    graph = _verified(folder, GRAPH, contents.observations, hard_links)
    _verified(folder, f"{ENGINE}/{MANIFEST}", contents.engine, hard_links)
    engine = load(folder / ENGINE, **options)
    try:
        with own_rules(FILE_NAME):
            return PolicyEngine(engine, contents.spec, graph)
    except BaseException:
        engine.close()
        raise


def _verified(folder: Path, name: str, entry: FileEntry, hard_links: bool) -> bytes:
    return read_verified(folder, name, size=entry.size, sha256=entry.sha256, allow_hard_links=hard_links)

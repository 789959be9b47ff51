"""Where results come from: the machine, the versions, and the commit also where the sources travelled without git.

The commit is git's; else $GATE_COMMIT; else what `make gpu-wheels` wrote into .gpu-wheels/COMMIT before the journey.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from skipstep.bench.record import environment

COMMIT_FILE: Final = Path(".gpu-wheels/COMMIT")
_STATE: Final = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "memory.used", "utilization.gpu")


def gate_environment(*, dry_run: bool) -> dict[str, str | int]:
    """As skipstep.bench.record.environment(); a dry run is a machine class of its own, never compared with a GPU."""
    facts = environment()
    if facts["commit"] == "unknown":
        facts["commit"] = os.environ.get("GATE_COMMIT") or _travelled_commit() or "unknown"
    if dry_run:
        facts["machine_class"] = f"dry run on {facts['machine_class']}"
    return facts


def gpu_state() -> dict[str, str]:
    """Clocks, temperature and load as nvidia-smi has them now; empty where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = answer.splitlines()
    return dict(zip(_STATE, lines[0].split(", "), strict=False)) if lines else {}


def write_whole(path: Path, contents: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. NaN and infinity are refused: they are no JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(contents, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _travelled_commit() -> str:
    try:
        return COMMIT_FILE.read_text(encoding="utf-8").strip()
    except OSError:
        return ""

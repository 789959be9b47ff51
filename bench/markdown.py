"""Markdown of committed results: tables, and the line that says where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipstep.errors import InputError


def describe_environment(facts: Mapping[str, Any]) -> str:
    """One line: where it ran, with which versions, at which commit."""
    versions = ", ".join(f"{p} {facts[p]}" for p in ("torch", "diffusers", "onnxruntime", "triton") if p in facts)
    return f"{facts.get('gpu') or facts['cpu']}, {facts['cores']} cores, {versions}, commit {facts['commit']}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its numbers to the right."""
    lines = [header, ["---:" if _is_number(cell) else "---" for cell in rows[0]], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_number(cell: str) -> bool:
    return cell.lstrip("*-")[:1].isdigit()


def read_result(path: Path) -> dict[str, Any]:
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            got=f"{path} ({error})", expected="a result", remedy="run make bench, which writes it"
        ) from error
    return contents

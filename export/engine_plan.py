"""What a TensorRT-RTX engine launches for one evaluation, read from the engine itself: no GPU is needed.

The library writes its plan as text into an engine: a header, the tensors, and the steps of `main` in order, each of
which launches a kernel, with the nodes of the graph that it computes. The format is the library's own and undocumented;
a release that changes it is an ExportError.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from skipstep.errors import ExportError

# What a step of the plan is, by the library's names; all else in `main` names memory or runs on the host.
PRODUCTS = frozenset({"corrltn", "fully_connected"})
_LAUNCHES = frozenset({"function", *PRODUCTS, "runtime_function", "runtime_fusion"})
_SECTION = re.compile(rb"\nmain \{\n(.*?)\n\}", re.DOTALL)
_ENTRY = re.compile(r"^ *([a-z_]+)=\{ *name=\"?([^\s\"]+)(.*)", re.MULTILINE)
_LAYERS = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel of the plan: its kind and name by the library, and the `nodes` of the graph that it computes."""

    kind: str
    name: str
    nodes: tuple[str, ...]


def kernels(engine: bytes) -> list[Counter[str]]:
    """How many kernels of each kind an evaluation launches, for each profile of the engine, or for its one fixed shape.

    Raises ExportError for an engine without a plan in text.
    """
    return [Counter(each.kind for each in plan) for plan in launches(engine)]


def launches(engine: bytes) -> list[list[Launch]]:
    """The kernels of an evaluation in order, for each profile as `kernels`. Raises ExportError as that does."""
    plans = []
    for section in _SECTION.findall(engine):
        entries = _ENTRY.findall(section.decode(errors="replace"))
        # A product carries the names of its nodes itself where the plan lists none.
        named = [
            Launch(kind, name, tuple(_LAYERS.findall(rest)) or (*name.split("+"),)) for kind, name, rest in entries
        ]
        plans.append([each for each in named if each.kind in _LAUNCHES])
    # A kernel that is a program of its own has a section with one entry, itself.
    launched = [plan for plan in plans if len(plan) > 1] or [plan for plan in plans[:1] if plan]
    if not launched:
        raise ExportError(
            got="an engine without the text of its plan",
            expected="one that TensorRT-RTX 1.7 wrote",
            remedy="build it with pip install 'skipstep[rtx]', or count in a profiler on the device",
        )
    return launched

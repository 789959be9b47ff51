"""What a TensorRT-RTX engine launches for one evaluation, read from the engine itself: no GPU is needed.

The library writes its plan as text into an engine: a header, the tensors, and the steps of `main` in order, each of
which launches a kernel. The format is the library's own and undocumented; a release that changes it is an ExportError.
"""

from __future__ import annotations

import re
from collections import Counter

from skipstep.errors import ExportError

# What a step of the plan is, by the library's names; all else in `main` names memory or runs on the host.
_LAUNCHES = frozenset({"function", "corrltn", "fully_connected", "runtime_function", "runtime_fusion"})
_SECTION = re.compile(rb"\nmain \{\n(.*?)\n\}", re.DOTALL)
_ENTRY = re.compile(rb"^ *([a-z_]+)=\{", re.MULTILINE)


def kernels(engine: bytes) -> list[Counter[str]]:
    """How many kernels of each kind an evaluation launches, for each profile of the engine, or for its one fixed shape.

    Raises ExportError for an engine without a plan in text.
    """
    plans = [Counter(kind.decode() for kind in _ENTRY.findall(section)) for section in _SECTION.findall(engine)]
    counted = [Counter({kind: n for kind, n in plan.items() if kind in _LAUNCHES}) for plan in plans]
    # A kernel that is a program of its own has a section with one entry, itself.
    launched = [plan for plan in counted if plan.total() > 1] or [plan for plan in counted[:1] if plan]
    if not launched:
        raise ExportError(
            got="an engine without the text of its plan",
            expected="one that TensorRT-RTX 1.7 wrote",
            remedy="build it with pip install 'skipstep[rtx]', or count in a profiler on the device",
        )
    return launched

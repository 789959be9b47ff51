"""Contenders, each under a name that stays: the textbook loop, what people run today, and our own loops."""

from __future__ import annotations

from collections.abc import Sequence

from skipstep.bench.contenders.engines import ENGINES, ONNX
from skipstep.bench.contenders.pipeline import DIFFUSERS, DIFFUSERS_COMPILE
from skipstep.bench.contenders.runtimes import ONNXRUNTIME, OPENVINO
from skipstep.bench.contenders.textbook import TEXTBOOK
from skipstep.bench.contenders.workload import ContenderKind
from skipstep.errors import InputError

# In order of importance: where time is short, the last ones are skipped first.
_ORDER = (TEXTBOOK, ONNX, DIFFUSERS, ONNXRUNTIME, *ENGINES[1:], OPENVINO, DIFFUSERS_COMPILE)
CONTENDERS: dict[str, ContenderKind] = {kind.name: kind for kind in _ORDER}


def contenders_named(names: Sequence[str]) -> tuple[ContenderKind, ...]:
    """Those contenders, the textbook loop first: all ratios refer to it. Raises InputError, which lists them all."""
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise InputError(
            got=f"contenders {', '.join(unknown)}",
            expected=f"names among {', '.join(CONTENDERS)}",
            remedy="correct them, or leave them out to run all",
        )
    return tuple(CONTENDERS[name] for name in dict.fromkeys((TEXTBOOK.name, *names)))

"""skipstep compiles a diffusion sampler: each step count becomes a precompiled plan. See README.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from skipstep.version import __version__

if TYPE_CHECKING:
    from skipstep.accelerating import accelerate
    from skipstep.backends.tensorrt_options import TensorRTOptions
    from skipstep.engine import Engine
    from skipstep.loading import load
    from skipstep.networks.condition import Condition
    from skipstep.plans.plan import Plan
    from skipstep.plans.schedule import NoiseSchedule

__all__ = ["Condition", "Engine", "NoiseSchedule", "Plan", "TensorRTOptions", "__version__", "accelerate", "load"]

# Loaded on first use: importing skipstep costs milliseconds and pulls in no array library.
_HOME = {
    "Condition": "skipstep.networks.condition",
    "Engine": "skipstep.engine",
    "NoiseSchedule": "skipstep.plans.schedule",
    "Plan": "skipstep.plans.plan",
    "accelerate": "skipstep.accelerating",
    "TensorRTOptions": "skipstep.backends.tensorrt_options",
    "load": "skipstep.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'skipstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

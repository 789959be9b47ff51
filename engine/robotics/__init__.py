"""Robot policies: observations in, chunks of actions out, inside a control loop.

features.py   what a policy reads and writes, and how it is normalised
lerobot.py    `from_policy`: from LeRobot's DiffusionPolicy to a policy engine; the only part that needs torch
policy.py     `PolicyEngine`: the observation encoder, the engine and the normalisation behind one call
bundle.py     `PolicyEngine.save`: the folder of a policy
loading.py    `load_policy`
runner.py     `PolicyRunner`: the queues of a control loop, its deadline and its rate
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipstep.robotics.lerobot import from_policy
    from skipstep.robotics.loading import load_policy
    from skipstep.robotics.policy import PolicyEngine
    from skipstep.robotics.runner import LoopReport, PolicyRunner

__all__ = ["LoopReport", "PolicyEngine", "PolicyRunner", "from_policy", "load_policy"]

# On first use, as in skipstep itself: loading a policy imports nothing that only building needs.
_HOME = {
    "LoopReport": "runner",
    "PolicyEngine": "policy",
    "PolicyRunner": "runner",
    "from_policy": "lerobot",
    "load_policy": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

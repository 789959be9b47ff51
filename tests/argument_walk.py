"""Calls a function once for each of its parameters and each hostile value, all other arguments as they should be.

The outcome is a result or an error of skipstep.errors; no argument is changed, and no result shares memory with one.
"""

import inspect
import threading
import time
import warnings
from collections.abc import Callable, Collection
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from attack_count import tried
from hostile_values import hostile_values

from skipstep import Engine
from skipstep.building import BuildOptions
from skipstep.calls.inputs import Inputs, Prompted
from skipstep.calls.request import Conditions
from skipstep.errors import SkipstepError
from skipstep.loading import LoadOptions
from skipstep.loops.runner import SampleArguments

# Longer than any of these calls takes on a busy machine: a hang, or work that should have been refused.
SECONDS = 20.0
# A keyword dictionary's names, by its type's name.
KEYWORDS = {each.__name__: each for each in (Conditions, Prompted, Inputs, SampleArguments, BuildOptions, LoadOptions)}
# The caller's own functions: what they raise is the caller's.
CALLBACKS = ("callback", "progress", "noise")


def walk(
    name: str,
    function: Callable[..., Any],
    arguments: Callable[[], dict[str, Any]],
    shape: tuple[int, ...],
    *,
    written: Collection[str] = ("out",),
) -> None:
    """Fails with a list of what escaped. `written` are the parameters that the function writes to or hands back."""
    failures, num_cases = [], 0
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []
        patch.setattr(threading, "excepthook", lambda given: seen.append(f"a thread raised {given.exc_value!r}"))
        for parameter in parameters(function):
            for described, make in hostile_values(shape).items():
                if parameter in CALLBACKS and callable(make()):
                    continue
                given = {**arguments(), parameter: make()}
                found = _outcome(function, given, parameter, parameter in written)
                failures += [f"{name}({parameter}={described}): {each}" for each in found]
                num_cases += 1
                tried("arguments of public functions, each parameter with each hostile value")
    assert not failures + seen, f"{len(failures)} of {num_cases}:\n" + "\n".join(failures + seen)


def parameters(function: Any) -> list[str]:
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            kind = str(parameter.annotation).removeprefix("Unpack[").removesuffix("]")
            names += get_type_hints(KEYWORDS[kind]).keys()
        else:
            names.append(name)
    return [name for name in names if name != "cls"]


def _outcome(function: Callable[..., Any], arguments: dict[str, Any], parameter: str, written: bool) -> list[str]:
    failures = []
    value = arguments[parameter]
    before, started = _contents(value), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            result = function(**arguments)
            result = result.result() if hasattr(result, "add_done_callback") else result
        if isinstance(result, Engine):
            result.close()
        if not written and _shares_memory(result, value):
            failures.append("the result shares the argument's memory")
    except SkipstepError as error:
        if not (error.got and error.expected and error.remedy):
            failures.append(repr(error))
    except BaseException as error:  # Whatever it is, it is not one of ours.
        failures.append(f"{type(error).__name__}: {error!s:.120}")
    if not written and _contents(value) != before:
        failures.append("the argument was changed")
    if time.perf_counter() - started > SECONDS:
        failures.append(f"took {time.perf_counter() - started:.0f} s")
    return failures


def _contents(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes(), value.shape, value.dtype
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested:
        held = value.detach().resolve_conj().resolve_neg()
        return (
            "meta" if held.is_meta else held.clone().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ), held.shape
    return repr(value)[:200] if isinstance(value, list | dict | set | bytearray) else None


def _shares_memory(result: Any, value: Any) -> bool:
    results = result if isinstance(result, tuple) else (result,)
    held = value.detach() if isinstance(value, torch.Tensor) else value
    if isinstance(held, torch.Tensor):
        plain = held.layout is torch.strided and not (held.is_nested or held.is_meta or held.is_quantized)
        if not plain or not held.numel() or not held.is_contiguous():
            return False
        held = np.empty(0) if held.is_conj() or held.is_neg() else held.view(-1)[:1].view(torch.uint8).numpy()
    return isinstance(held, np.ndarray) and any(
        isinstance(r, np.ndarray) and np.shares_memory(r, held) for r in results
    )

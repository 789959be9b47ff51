"""The errors of skipstep, each with what was got, what was expected and the remedy; and checks of numbers.

Each class also derives from the built-in that a caller would reach for (`ValueError`, `LookupError`, `ImportError`,
...), so code that does not know skipstep catches the right thing.
"""

from __future__ import annotations

import importlib
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any


class SkipstepError(Exception):
    """Base of the family. `got`, `expected` and `remedy` stay readable as attributes beside the message."""

    def __init__(self, *, got: str, expected: str, remedy: str) -> None:
        super().__init__(f"got {got}; expected {expected}. Remedy: {remedy}.")
        self.got = got
        self.expected = expected
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """An error of a worker process arrives as what it was."""
        return partial(type(self), got=self.got, expected=self.expected, remedy=self.remedy), ()


class ScheduleError(SkipstepError, ValueError):
    """An invalid noise schedule: values out of range, not decreasing, or a configuration key that is not supported."""


class PlanError(SkipstepError, ValueError):
    """An invalid plan: step counts, spacings, eta or conventions outside what the mathematics allows."""


class InputError(SkipstepError, ValueError):
    """An argument of a call with a wrong value, shape, dtype or device."""


class PlanNotFoundError(SkipstepError, LookupError):
    """The engine holds no such plan; the message lists the plans that it holds."""


class ModelFormatError(SkipstepError, ValueError):
    """A checkpoint folder or data file that is incomplete, damaged or of an unknown form."""


class UnsafeCheckpointError(ModelFormatError):
    """Weights stored as a pickle: loading them would run code, so they are not read."""


class MissingDependencyError(SkipstepError, ImportError):
    """An optional package or data set is not installed; the remedy holds the command that installs it."""


class DeviceUnavailableError(SkipstepError, RuntimeError):
    """The machine lacks the device that the call needs."""


class ExportError(SkipstepError, RuntimeError):
    """A network that cannot be turned into the requested artefact, or whose artefact disagrees with it."""


class NonFiniteError(SkipstepError, ArithmeticError):
    """The network returned NaN or infinity; no image is returned in its place."""


class BundleError(SkipstepError, ValueError):
    """A bundle that is incomplete, damaged, foreign or newer than this version; nothing of it was used."""


class IntegrityError(BundleError):
    """A file whose bytes are not those that the manifest promises, or a path that leads out of its folder."""


class SignatureError(BundleError):
    """A bundle without the required signature, or with an invalid one; nothing of it was used."""


class CacheError(SkipstepError, OSError):
    """The cache folder cannot be used as it is."""


class StorageError(SkipstepError, OSError):
    """A file could not be written whole; what was there before is untouched."""


class EngineStateError(SkipstepError, RuntimeError):
    """An engine that cannot be used any more: it was closed, its process was forked, or its CUDA context is lost."""


class CaptureError(SkipstepError, RuntimeError):
    """A loop that could not become a CUDA graph although the caller required one."""


class DeviceMemoryError(SkipstepError, MemoryError):
    """The device has too little free memory; the remedy says what would fit."""


class DeadlineError(SkipstepError, TimeoutError):
    """No plan of the engine is fast enough, or a batcher has too much to do; the message says how long it takes."""


class QueueFullError(SkipstepError, RuntimeError):
    """A batcher holds as many samples as it may; the request was not taken."""


def shown(value: object) -> str:
    """A value in a message: its repr, cut short; its type where there is none."""
    try:
        return f"{value!r:.200}"
    except Exception:  # An integer of too many digits, or a class with a repr that fails.
        return f"a {type(value).__name__} that cannot be shown"


def optional_package(name: str, *, use: str, remedy: str) -> Any:
    """A module of a package that an extra installs; `use` is what it does here. Raises MissingDependencyError."""
    package = name.partition(".")[0]
    with needs_packages(f"{package}, which {use}", remedy=remedy, got=package):
        return importlib.import_module(name)


@contextmanager
def needs_packages(expected: str, *, remedy: str, got: str | None = None) -> Iterator[None]:
    """Around imports of packages that an extra installs. Raises MissingDependencyError, with the package's name unless
    `got` is given."""
    try:
        yield
    except MissingDependencyError:
        raise
    except ImportError as error:
        raise MissingDependencyError(got=f"no package {got or error.name}", expected=expected, remedy=remedy) from error


def check_integer(
    name: str,
    value: object,
    *,
    low: int,
    high: int | None = None,
    remedy: str | None = None,
    error: type[SkipstepError] = InputError,
) -> int:
    """`value` as an int, if it is an integer (Python's or NumPy's, no bool) from `low` to `high`. Raises `error`."""
    number: int | None = None
    if not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except Exception:  # TypeError, and what tensors raise.
            number = None
    if number is None or number < low or (high is not None and number > high):
        raise error(
            got=f"{name}={shown(value)}",
            expected=f"an integer ≥ {low}" if high is None else f"an integer from {low} to {high}",
            remedy=remedy or f"pass {name} within this range",
        )
    return number


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    remedy: str | None = None,
    error: type[SkipstepError] = InputError,
) -> float:
    """`value` as a float, if it is a finite number (no bool) from `low` to `high`. Raises `error`.

    With `above`, `low` itself is refused, too.
    """
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
    if not (math.isfinite(number) and low <= number <= high) or (above and number == low):
        start = "" if low == -math.inf else f" {'above' if above else 'from'} {low:g}"
        raise error(
            got=f"{name}={shown(value)}",
            expected=f"a finite number{start}" + ("" if high == math.inf else f" to {high:g}"),
            remedy=remedy or f"pass {name} within this range",
        )
    return number


def check_path(name: str, value: object) -> str:
    """`value` as the text of a path, if it is text or a path-like object. Raises InputError.

    A number is refused, a bool included: `open` would take it for an open file, and close that.
    """
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
        os.fsencode(path)
    except (TypeError, ValueError):
        path = None
    if not isinstance(path, str) or not path or "\0" in path:
        raise InputError(
            got=f"{name}={shown(value)}",
            expected="a path, as text or pathlib.Path",
            remedy=f"pass {name} as the path of a file or folder",
        )
    return path


def check_choice(
    name: str,
    value: object,
    choices: tuple[str, ...],
    *,
    remedy: str | None = None,
    error: type[SkipstepError] = InputError,
) -> str:
    """`value`, if it is one of `choices`; raises `error` if not."""
    if not isinstance(value, str) or value not in choices:
        raise error(
            got=f"{name}={shown(value)}",
            expected=f"one of {', '.join(choices)}",
            remedy=remedy or f"pass {name} as one of these",
        )
    return value


def check_flag(name: str, value: object, *, error: type[SkipstepError] = InputError) -> bool:
    """`value`, if it is True or False; raises `error` if not: "False" would count as true."""
    if not isinstance(value, bool):
        raise error(got=f"{name}={shown(value)}", expected="True or False", remedy=f"pass {name} as one of these")
    return value


def check_text(name: str, value: object, *, error: type[SkipstepError] = InputError) -> str:
    """`value`, if it is text that can be written to a file; raises `error` if not."""
    # What JSON can hold and a file cannot.
    lone_surrogates = isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)
    if not isinstance(value, str) or lone_surrogates:
        raise error(got=f"{name}={shown(value)}", expected="text", remedy=f"pass {name} as a str")
    return value


def check_type(name: str, value: object, kind: type, *, remedy: str, error: type[SkipstepError] = InputError) -> None:
    """Raise `error` unless `value` is a `kind`; `remedy` says how one is made."""
    if not isinstance(value, kind):
        raise error(got=f"{name} of type {type(value).__name__}", expected=f"a {kind.__name__}", remedy=remedy)


def check_callable(name: str, value: Callable[..., object] | None, arguments: str) -> None:
    """Raise InputError unless `value` is None or can be called; `arguments` says with what it will be."""
    if value is not None and not callable(value):
        raise InputError(
            got=f"{name}={shown(value)}", expected=f"a function called as {name}({arguments})", remedy="leave it out"
        )


def check_items(
    name: str, values: object, *, expected: str, remedy: str, error: type[SkipstepError] = InputError
) -> list[Any]:
    """The items of an iterable; raises `error` for text, bytes, mappings, and what cannot be iterated."""
    items: list[Any] | None = None
    if not isinstance(values, str | bytes | bytearray | memoryview | Mapping):
        try:
            items = list(values)  # type: ignore[call-overload]
        except Exception:  # TypeError, and what arrays and tensors raise.
            items = None
    if items is None:
        raise error(got=f"{name}={shown(values)}", expected=expected, remedy=remedy)
    return items

"""The errors of skipstep: one small family, and every one says what was got, what was expected and the remedy.

Each class also derives from the built-in that a caller would reach for (`ValueError`, `LookupError`, `ImportError`,
...), so code that does not know skipstep catches the right thing.
"""

from __future__ import annotations


class SkipstepError(Exception):
    """Base of the family. `got`, `expected` and `remedy` stay readable as attributes beside the message."""

    def __init__(self, *, got: str, expected: str, remedy: str) -> None:
        super().__init__(f"got {got}; expected {expected}. Remedy: {remedy}.")
        self.got = got
        self.expected = expected
        self.remedy = remedy


class ScheduleError(SkipstepError, ValueError):
    """A noise schedule that is not one: values out of range, not decreasing, or a configuration key nobody honours."""


class PlanError(SkipstepError, ValueError):
    """A plan that cannot be: step counts, spacings, eta or conventions outside what the mathematics allows."""


class InputError(SkipstepError, ValueError):
    """An argument of a call with a wrong value, shape, dtype or device."""


class PlanNotFoundError(SkipstepError, LookupError):
    """The engine holds no such plan; the message lists those that it holds."""


class ModelFormatError(SkipstepError, ValueError):
    """A checkpoint folder or data file that is incomplete, damaged or of an unknown form."""


class UnsafeCheckpointError(ModelFormatError):
    """Weights stored as a pickle: loading them would run code, so they are refused unread."""


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
    """A bundle without the signature that was asked for, or with one that does not fit; nothing of it was used."""


class CacheError(SkipstepError, OSError):
    """The cache folder cannot be used as it is."""


class StorageError(SkipstepError, OSError):
    """A file could not be written whole; what was there before is untouched."""


class EngineStateError(SkipstepError, RuntimeError):
    """An engine that cannot be used any more: it was closed, its process was forked, or its CUDA context is lost."""


class CaptureError(SkipstepError, RuntimeError):
    """A loop that could not become a CUDA graph, where nothing less would do."""


class DeviceMemoryError(SkipstepError, MemoryError):
    """The device has too little free memory; the remedy says what would fit."""


class DeadlineError(SkipstepError, TimeoutError):
    """No plan of the engine is fast enough; the message lists how long each takes."""

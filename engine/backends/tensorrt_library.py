"""The two TensorRT libraries: which to use, how it is imported, and the kernels that TensorRT-RTX compiles here."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import astuple, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, cast, get_args

from skipstep.backends.denoiser import Keep, KeptBytes, Library
from skipstep.cuda.probe import DeviceFacts, cuda_device
from skipstep.errors import MissingDependencyError

if TYPE_CHECKING:
    # The full library has no stubs either; what the type checker reads of this one stands for both.
    import tensorrt_rtx as trt

# The extra that installs each.
EXTRAS: Final[Mapping[Library, str]] = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}


class TensorRt(Protocol):
    """What is used of the module `tensorrt` or `tensorrt_rtx`."""

    __version__: str
    ILogger: type[trt.ILogger]
    Runtime: type[trt.Runtime]
    DynamicShapesKernelSpecializationStrategy: type[trt.DynamicShapesKernelSpecializationStrategy]
    EngineStat: type[trt.EngineStat]
    Refitter: type[trt.Refitter]
    OnnxParserRefitter: type[trt.OnnxParserRefitter]
    ExecutionContextAllocationStrategy: type[trt.ExecutionContextAllocationStrategy]
    TensorFormat: type[trt.TensorFormat]
    TensorIOMode: type[trt.TensorIOMode]
    TensorLocation: type[trt.TensorLocation]


def choose_library(available: Collection[str], wanted: Library | None) -> Library:
    """The library that the caller wants, else the first that is installed of those that the network comes with
    engines for, full TensorRT before TensorRT-RTX. It may be missing: `load_library` says so."""
    if wanted is not None:
        return wanted
    libraries: tuple[Library, ...] = get_args(Library)
    offered = [each for each in libraries if each in available] or [*libraries]
    installed = [each for each in offered if importlib.util.find_spec(each) is not None]
    return (installed or offered[-1:])[0]


def import_library(library: Library) -> TensorRt:
    """The module; nothing of it is called. Raises MissingDependencyError, which names the extra."""
    try:
        return cast(TensorRt, importlib.import_module(library))
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            got=f"{library} that cannot be used: {error}",
            expected="an installation that works",
            remedy=f"pip install 'skipstep[{EXTRAS[library]}]'",
        ) from error


def load_library(library: Library, device: int = 0) -> TensorRt:
    """The module, to run engines. Raises MissingDependencyError; DeviceUnavailableError without the CUDA device of that
    number, where these libraries may crash."""
    module = import_library(library)
    cuda_device(device, remedy="run TensorRT engines on a machine with an NVIDIA GPU and its driver")
    _check_cuda_release(library)
    return module


def cuda_releases(library: Library) -> set[str]:
    """The releases of CUDA that the installed packages of a library are for, "12"; none where they do not say."""
    name = library.replace("_", "-")
    packages = (str(each.metadata["Name"]).lower().replace("_", "-") for each in metadata.distributions())
    return {found[1] for each in packages if (found := re.fullmatch(rf"{name}-cu(\d+)", each))}


def _check_cuda_release(library: Library) -> None:
    """The library and torch share a device's context and memory: both have to be for one CUDA release."""
    import torch

    name, releases = library.replace("_", "-"), cuda_releases(library)
    ours = (torch.version.cuda or "").partition(".")[0]
    if ours and releases and ours not in releases:
        raise MissingDependencyError(
            got=f"{library} for CUDA {', '.join(sorted(releases))} beside torch for CUDA {ours}",
            expected="both for one release of CUDA",
            remedy=f"pip install {name}-cu{ours}, or a build of torch for CUDA {max(releases)}",
        )


def error_log(library: TensorRt) -> Any:
    class ErrorLog(library.ILogger):  # type: ignore[name-defined, misc]
        """Keeps the last that the library complained about, for the error that follows."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                self._errors = [*self._errors[-2:], msg]

        def summary(self) -> str:
            return "; ".join(self._errors)[:1000] or "it does not say why"

    return ErrorLog()


@dataclass(slots=True)
class RuntimeCache:
    """The kernels that TensorRT-RTX compiled for one device, kept for the next process too.

    The library keeps a pointer to a cache and does not own it, so there is one for each device, which lives as long as
    the process: longer than every context.
    """

    kept: KeptBytes | None
    cache: Any = None
    saved_bytes: int = 0
    _of_device: ClassVar[dict[Hashable, RuntimeCache]] = {}

    @classmethod
    def of(
        cls, device: Hashable, library: TensorRt, keep: Keep | None, describe: Callable[[], DeviceFacts]
    ) -> RuntimeCache:
        if device not in cls._of_device:
            kept = None
            if keep is not None:
                facts = describe()
                parts = {"kind": "rtx-kernels", "library": library.__version__, "device": astuple(facts)}
                kept = keep(f"TensorRT-RTX's kernels on {facts.name}", parts)
            cls._of_device[device] = cls(kept)
        return cls._of_device[device]

    def made_by(self, config: trt.IRuntimeConfig) -> Any:
        """The library's object; the CUDA device must be the current one. What it does not take is compiled again."""
        if self.cache is None:
            self.cache = config.create_runtime_cache()  # type: ignore[no-untyped-call]
            stored = None if self.kept is None else self.kept.get()
            if stored is not None and self.cache.deserialize(stored):
                self.saved_bytes = len(stored)
        return self.cache

    def save(self) -> None:
        if self.kept is None:
            return
        data = bytes(self.cache.serialize())
        if len(data) != self.saved_bytes:
            self.kept.put(data)
            self.saved_bytes = len(data)

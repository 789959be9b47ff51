"""The table of backends: what each needs, where it runs, and which function makes its denoisers.

ADD A BACKEND: write `def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser` in a new file, and add a row
here.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from skipstep.errors import InputError, MissingDependencyError, check_choice, shown

if TYPE_CHECKING:
    from skipstep.backends.denoiser import Library, MakeDenoiser, NetworkSource, RunPart, Target


_PARTS = {"cpu": "skipstep.backends.onnxruntime", "cuda": "skipstep.backends.onnxruntime_cuda"}


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to run a network in the loops of one kind of device ("cpu" or "cuda").

    `needs` are packages; "a|b" is satisfied by either. `extras` are alternatives of what pip installs them with.
    `module` holds the function `denoisers`, and is imported when it is needed; it may have one named `capabilities`,
    which says in words what its library has on this machine. `loads_bundles`: it takes graphs or engines of a bundle.
    `precisions` that it runs a network in. `compiles_late`: it makes code for a batch size when that is first needed,
    and calls `Target.check`. `parts`: the module whose function `part` runs the other graphs of a pipeline, if that is
    not ONNX Runtime on the same device.
    """

    name: str
    device: str
    needs: tuple[str, ...]
    extras: tuple[str, ...]
    module: str
    loads_bundles: bool
    precisions: tuple[str, ...] = ("float32",)
    compiles_late: bool = False
    parts: str | None = None

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [
            each.replace("|", " or ")
            for each in self.needs
            if all(importlib.util.find_spec(package) is None for package in each.split("|"))
        ]

    def denoisers(self, source: NetworkSource, target: Target) -> MakeDenoiser:
        """A function from the network's batch size to a denoiser. Raises what the backend raises."""
        make: MakeDenoiser = importlib.import_module(self.module).denoisers(source, target)
        return make

    def part(self, graph: bytes, target: Target, *, decodes: bool, tiled: bool) -> RunPart:
        """A graph of a pipeline: one that `decodes`, after the loop, may round as the target's precision does. `tiled`:
        its inputs are one row of one size. Raises what the backend raises."""
        module = importlib.import_module(self.parts or _PARTS[self.device])
        made: RunPart = module.part(graph, target, decodes=decodes, tiled=tiled)
        return made


_ON_GPU = ("float32", "tf32", "float16", "bfloat16")
# On each device the first that is installed and runs in the precision is what "auto" chooses.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "onnxruntime",
        "cpu",
        ("onnxruntime",),
        ("cpu",),
        "skipstep.backends.onnxruntime",
        True,
        ("float32", "int8"),
    ),
    Backend("torch", "cpu", ("torch",), ("torch",), "skipstep.backends.torch", False),
    Backend(
        "openvino",
        "cpu",
        ("openvino",),
        ("openvino",),
        "skipstep.backends.openvino",
        True,
        ("float32", "bfloat16", "int8"),
        compiles_late=True,
        parts="skipstep.backends.openvino",
    ),
    Backend(
        "webgpu",
        "cpu",
        ("onnxruntime", "onnxruntime_ep_webgpu"),
        ("webgpu",),
        "skipstep.backends.webgpu",
        True,
        compiles_late=True,
    ),
    Backend("torch", "cuda", ("torch",), ("torch",), "skipstep.backends.torch_cuda", False, _ON_GPU),
    Backend(
        "tensorrt",
        "cuda",
        ("torch", "onnxruntime", "tensorrt|tensorrt_rtx"),
        ("gpu", "rtx,cpu,torch"),
        "skipstep.backends.tensorrt",
        True,
        (*_ON_GPU, "int8", "fp8"),
    ),
    Backend(
        "onnxruntime",
        "cuda",
        ("torch", "onnxruntime"),
        ("gpu",),
        "skipstep.backends.onnxruntime_cuda",
        True,
        _ON_GPU,
    ),
)
_GRAPH_READER = ("onnx", "onnxscript")
_EXPORTER = ("torch", *_GRAPH_READER)


def check_device(device: object, *, auto: bool = False) -> str:
    """`device`, if it names one, whether or not it is there. Raises InputError."""
    names = r"cpu|cuda(:[0-9]{1,3})?" + ("|auto" if auto else "")
    if not isinstance(device, str) or not re.fullmatch(names, device):
        raise InputError(
            got=f"device={shown(device)}",
            expected=("'auto', " if auto else "") + "'cpu', 'cuda' or 'cuda:N'",
            remedy="pick one of these",
        )
    return device


def check_library(library: object) -> Library | None:
    """`library`, if it is a TensorRT library's name or None. Raises InputError."""
    if library is not None:
        check_choice("library", library, ("tensorrt", "tensorrt_rtx"), remedy="leave it out for the one that is there")
    return cast("Library | None", library)


def resolve_backend(
    name: str, *, device: str, exports: bool, precision: str = "float32", from_graph: bool = False
) -> Backend:
    """The row for a name and a device ("cpu" or "cuda"); "auto" is the first that is installed and runs in `precision`.

    `exports`: the network comes from a model, so backends that read graphs need the exporter too; otherwise from a
    bundle, which is for them alone. `from_graph`: that model is a graph itself, which torch neither exports nor runs.
    Raises InputError for an unknown name, or one that does not run on the device or in the precision, and
    MissingDependencyError, with the command that installs it, for one that is not installed.
    """
    graphs_alone = from_graph or not exports
    there = [each for each in BACKENDS if each.device == device and (each.loads_bundles or not graphs_alone)]
    rows = [each for each in there if precision in each.precisions]
    packages = () if not exports else _GRAPH_READER if from_graph else _EXPORTER
    if name == "auto" and rows:
        chosen = next((each for each in rows if not _missing(each, packages)), rows[0])
    else:
        chosen = _named(name, device, there, precision)
    missing = _missing(chosen, packages)
    if missing:
        also = ",export" if exports and chosen.loads_bundles else ""
        raise MissingDependencyError(
            got=f"no package {', '.join(missing)}",
            expected=f"what the {chosen.name} backend needs",
            remedy="pip install " + ", or ".join(f"'skipstep[{extra}{also}]'" for extra in chosen.extras),
        )
    return chosen


def _named(name: str, device: str, there: list[Backend], precision: str) -> Backend:
    for row in there:
        if row.name == name and precision in row.precisions:
            return row
    able = [each.name for each in there if precision in each.precisions]
    if name == "auto" or any(each.name == name for each in there):
        where = "on the CPU" if device == "cpu" else "on a GPU"
        raise InputError(
            got=f"precision={precision!r} {where}" + ("" if name == "auto" else f" with backend={name!r}"),
            expected=f"a backend that has it: {', '.join(able)}" if able else "a CUDA device",
            remedy=f"pass backend={able[0]!r}, or leave precision out" if able else "leave it out, or see device=",
        )
    elsewhere = sorted({each.device for each in BACKENDS if each.name == name} - {device})
    raise InputError(
        got=f"backend={name!r} on {device}",
        expected=f"auto, {', '.join(each.name for each in there)}",
        remedy=f"pass device={elsewhere[0]!r}, or backend='auto'" if elsewhere else "pass backend='auto'",
    )


def capabilities(name: str, device: str) -> str | None:
    """What the library of a backend in use has on this machine, in words; None where it does not say."""
    for row in BACKENDS:
        if (row.name, row.device) == (name, device.partition(":")[0]):
            say = getattr(importlib.import_module(row.module), "capabilities", None)
            return None if say is None else str(say())
    return None


def _missing(backend: Backend, packages: tuple[str, ...]) -> list[str]:
    missing = backend.missing()
    if backend.loads_bundles:
        missing += [each for each in packages if importlib.util.find_spec(each) is None]
    return list(dict.fromkeys(missing))

"""ONNX graphs to TensorRT engines, by either of two libraries with one Python interface.

    rtx:sm86    TensorRT-RTX   for a named architecture; built on any machine, with or without a GPU, in seconds
    tensorrt    TensorRT       times kernels on the GPU of the machine; the engine is for that GPU

The graph decides the precision: networks are strongly typed, and float32 means float32 unless TF32 is asked for.

The libraries are native code that a graph can crash. So the builder is a separate process
(skipstep.export.tensorrt_builder); a crash ends that process and becomes an ExportError here. Graph and engine pass
through pipes: a build that is killed leaves no file behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np

from skipstep.backends.denoiser import Library
from skipstep.backends.tensorrt_library import EXTRAS
from skipstep.backends.tensorrt_options import DEFAULTS, TensorRTOptions, builder_options, check_library_options
from skipstep.errors import DeviceUnavailableError, ExportError, InputError, MissingDependencyError, check_integer
from skipstep.networks.large_graph import graph_sha256, weights_of

Progress = Callable[[str, int, int], None]

_FP8_FROM = 89
_ERRORS = {error.__name__: error for error in (DeviceUnavailableError, ExportError, InputError, MissingDependencyError)}


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """Which library builds, and for which architecture: 86 is sm_86; None is the GPU of this machine."""

    library: Library
    compute_capability: int | None = None

    def __str__(self) -> str:
        name = "rtx" if self.library == "tensorrt_rtx" else self.library
        return name if self.compute_capability is None else f"{name}:sm{self.compute_capability}"

    def check(self, precision: str) -> None:
        """Raise InputError for a precision that the architecture does not compute in."""
        if precision == "fp8" and (self.compute_capability or _FP8_FROM) < _FP8_FROM:
            raise InputError(
                got=f"precision='fp8' for {self}",
                expected=f"an architecture that multiplies in 8-bit floats: from sm_{_FP8_FROM} on",
                remedy="pass precision='int8', or leave the architecture out",
            )


def parse_targets(text: str) -> tuple[EngineTarget, ...]:
    """Targets from "tensorrt", "rtx" or "rtx:sm86,sm89", each once, in order. Raises InputError.

    Whether the installed library knows an architecture is seen when building: newer ones know more.
    """
    if text == "tensorrt":
        return (EngineTarget("tensorrt"),)
    if text == "rtx":
        return (EngineTarget("tensorrt_rtx"),)
    if not re.fullmatch(r"rtx:sm_?[0-9]{2,3}(,sm_?[0-9]{2,3})*", text, re.ASCII):
        raise InputError(
            got=f"target {text!r}",
            expected="'rtx:sm86' or several as 'rtx:sm86,sm89', or 'tensorrt' for the GPU of this machine",
            remedy="name the architectures to build for",
        )
    numbers = dict.fromkeys(int(number) for number in re.findall("[0-9]+", text))
    return tuple(EngineTarget("tensorrt_rtx", number) for number in numbers)


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """An input or output of an engine. A dimension of `shape` is a number, or the name of one that is open."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A serialised engine and what made it.

    `profiles`: the batch sizes of its profiles, in order; None where the shapes are fixed. `device` and
    `num_multiprocessors`: the GPU that a TensorRT engine is for; None where any of its architecture will do. `flags`:
    the builder's, by name.
    """

    engine: bytes = field(repr=False)
    timing_cache: bytes | None = field(repr=False)
    library: Library
    library_version: str
    compute_capability: int
    device: str | None
    num_multiprocessors: int | None
    platform: str
    flags: tuple[str, ...]
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    profiles: tuple[int, ...] | None
    seconds: float
    onnx_sha256: str

    def describe(self) -> dict[str, Any]:
        """All but the bytes, as JSON has it; for the engine's bytes their number and SHA-256."""
        facts = asdict(self)
        engine = facts.pop("engine")
        del facts["timing_cache"]
        digest = hashlib.sha256(engine).hexdigest()
        described: dict[str, Any] = json.loads(json.dumps({**facts, "bytes": len(engine), "sha256": digest}))
        return described


def build_engine(
    onnx_model: bytes,
    *,
    library: Library,
    compute_capability: int | None = None,
    batch_sizes: Sequence[int] = (),
    device: int = 0,
    options: TensorRTOptions = DEFAULTS,
    timing_cache: bytes | None = None,
    tf32: bool = False,
    channels_last: bool = False,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build an engine from an ONNX graph that carries its weights.

    `batch_sizes` are those of the dimension named "batch". One makes an engine of fixed shape; several make one with a
    profile of exactly that size for each, which holds the weights once. TensorRT-RTX builds the same bytes every time.
    A graph whose shapes are fixed needs none.
    `compute_capability` (86 for sm_86) is TensorRT-RTX's to choose; None is the GPU of this machine with the number
    `device`.
    `timing_cache` is what an earlier TensorRT build on this GPU measured; one that the library does not take any more
    is replaced. `channels_last`: images are read and written in this order in memory, in which the library computes.
    The caller owns all memory, without which TensorRT-RTX cannot run inside a CUDA graph; not with weight streaming.
    `progress(phase, done, of)` is called here, as the builder goes on.

    Raises MissingDependencyError, DeviceUnavailableError, InputError (architecture, batch sizes, options) and
    ExportError (a graph that the library cannot build, named by node and operator; a builder that died).
    """
    request = _checked_request(library, compute_capability, batch_sizes, options)
    device = check_integer("device", device, low=0, high=999)
    request |= {"tf32": tf32, "channels_last": channels_last, "progress": progress is not None}
    request |= {"model_bytes": len(onnx_model), "cache_bytes": len(timing_cache or b"")}
    weights = weights_of(onnx_model)
    if weights and options.strip:
        raise InputError(
            got="strip=True for a network whose weights are beside its graph",
            expected="a network below a gigabyte, whose graph an engine is given its weights from",
            remedy="leave strip out",
        )
    request["weights"] = [(name, array.nbytes) for name, array in weights.items()]
    started = time.perf_counter()
    facts, engine, new_cache = _run_builder(request, onnx_model, timing_cache or b"", progress, device)
    inputs, outputs = (
        tuple(EngineTensor(name, dtype, tuple(shape)) for name, dtype, shape in facts[role])
        for role in ("inputs", "outputs")
    )
    return BuiltEngine(
        engine=engine,
        timing_cache=new_cache or None,
        library=library,
        library_version=facts["library_version"],
        compute_capability=facts["compute_capability"],
        device=facts["device"],
        num_multiprocessors=facts["num_multiprocessors"],
        platform=facts["platform"],
        flags=tuple(facts["flags"]),
        inputs=inputs,
        outputs=outputs,
        profiles=None if facts["profiles"] is None else tuple(facts["profiles"]),
        seconds=time.perf_counter() - started,
        onnx_sha256=graph_sha256(onnx_model).hexdigest(),
    )


def _checked_request(
    library: Library,
    compute_capability: int | None,
    batch_sizes: Sequence[int],
    options: TensorRTOptions,
) -> dict[str, Any]:
    """The request, after checks that need only the arguments."""
    if library not in get_args(Library):
        raise InputError(got=f"library={library!r}", expected="'tensorrt' or 'tensorrt_rtx'", remedy="pick one")
    for package, remedy in ((library, f"pip install 'skipstep[{EXTRAS[library]}]'"), ("onnx", "pip install onnx")):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                got=f"no package {package}", expected="the engine builder and onnx to check its input", remedy=remedy
            )
    if library == "tensorrt" and compute_capability is not None:
        raise InputError(
            got=f"compute_capability={compute_capability} for TensorRT",
            expected="none: it builds for the GPU that it runs on",
            remedy="leave it out and build on the target, or use TensorRT-RTX",
        )
    check_library_options(options, library)
    sizes = [check_integer("batch_sizes", size, low=1, high=2**31 - 1, remedy="pass (1, 8)") for size in batch_sizes]
    return {
        "library": library,
        "compute_capability": compute_capability,
        "batch_sizes": sizes,
        "options": builder_options(options),
    }


def _run_builder(
    request: Mapping[str, Any], model: bytes, cache: bytes, progress: Progress | None, device: int
) -> tuple[dict[str, Any], bytes, bytes]:
    """Facts, engine and timing cache from a fresh interpreter, which finds the packages that this one finds."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "skipstep.export.tensorrt_builder"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # The builder sees that GPU alone, as its first: the libraries build for the current device.
    visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if device or visible:
        environment["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
    with (
        open(os.memfd_create("messages"), "r+b") as messages,
        # A separate session: an interrupt from the keyboard reaches only this process, which then ends the builder.
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            start_new_session=True,
        ) as builder,
    ):
        assert builder.stdin is not None
        assert builder.stdout is not None
        try:
            # If the builder has died, its exit status is reported below.
            with contextlib.suppress(BrokenPipeError), builder.stdin:
                builder.stdin.writelines((json.dumps(request).encode() + b"\n", model, cache))
                for array in weights_of(model).values():
                    builder.stdin.write(array.reshape(-1).view(np.uint8).data)
            for line in builder.stdout:
                if not line.endswith(b"\n"):  # It died while it wrote.
                    break
                answer = json.loads(line)
                if "progress" in answer:
                    if progress is not None:
                        progress(*answer["progress"])
                elif "error" in answer:
                    raise _ERRORS[answer.pop("error")](**answer)
                else:
                    engine_bytes, cache_bytes = answer.pop("engine_bytes"), answer.pop("cache_bytes")
                    payload = builder.stdout.read(engine_bytes + cache_bytes)
                    if len(payload) == engine_bytes + cache_bytes:
                        return answer, payload[:engine_bytes], payload[engine_bytes:]
            status = builder.wait()
        except BaseException:
            builder.kill()
            raise
        messages.seek(0)
        last = messages.read().decode(errors="replace").strip().splitlines()[-3:]
    target = EngineTarget(request["library"], request["compute_capability"])
    ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"that ended with status {status}"
    raise ExportError(
        got=f"a builder of {target} {ended}" + (f" ({' / '.join(last)})" if last else ""),
        expected="an engine",
        remedy="free memory or build for a smaller batch: the system kills what takes too much"
        if status == -signal.SIGKILL
        else "try another version of the library, and report the graph: it crashes the builder",
    )

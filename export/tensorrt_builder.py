"""The process that builds a TensorRT engine: a graph in, an engine or one of our errors out.

The library is native code that a graph can crash, so whatever can be refused is refused before the library reads the
graph: an installation or device that cannot be used, and graphs that skipstep.export.tensorrt_graph refuses.

skipstep.export.tensorrt_engine starts this as `python -P -m skipstep.export.tensorrt_builder` and writes the request to
its standard input: a line of JSON, then the bytes of the graph, of the timing cache and of weights beside the graph.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from skipstep.backends.denoiser import Library
from skipstep.backends.tensorrt_library import EXTRAS, import_library
from skipstep.cuda.probe import DeviceFacts, cuda_device
from skipstep.errors import ExportError, InputError, MissingDependencyError, SkipstepError
from skipstep.export.norms import write_out_norms
from skipstep.export.tensorrt_engine import Progress
from skipstep.export.tensorrt_graph import BATCH, batch_profiles, checked_graph, messages
from skipstep.networks.graphs import PREDICTION, SAMPLE
from skipstep.networks.large_graph import LargeGraph, Weights, weights_of

_DTYPE_NAMES: Mapping[str, str] = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
_NO_DEVICE = "build on the machine that will run the engine, or name an architecture, as in rtx:sm86"
_SECONDS_BETWEEN_REPORTS = 0.05


def _serve() -> None:
    """Answer one request with lines of progress, then with the error, or facts and bytes."""
    # Linux: a caller that is killed takes its builder along.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Native code may print to standard output; that must not mix with the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.readline())
    model = sys.stdin.buffer.read(request["model_bytes"])
    cache = sys.stdin.buffer.read(request["cache_bytes"])
    weights = {name: np.frombuffer(sys.stdin.buffer.read(size), np.uint8) for name, size in request["weights"]}
    model = LargeGraph(model, weights) if weights else model

    def send(message: Mapping[str, Any], *payload: bytes) -> None:
        # One write for each message: the library reports progress from other threads.
        channel.write(json.dumps(message).encode() + b"\n" + b"".join(payload))
        channel.flush()

    def report(phase: str, done: int, of: int) -> None:
        if request["progress"]:
            send({"progress": (phase, done, of)})

    try:
        facts, engine, new_cache = _build(request, model, cache, report)
    except SkipstepError as error:
        send({"error": type(error).__name__, "got": error.got, "expected": error.expected, "remedy": error.remedy})
    else:
        send({**facts, "engine_bytes": len(engine), "cache_bytes": len(new_cache)}, engine, new_cache)


def _build(
    request: Mapping[str, Any], onnx_model: bytes, cache: bytes, report: Progress
) -> tuple[dict[str, Any], bytes, bytes]:
    """Facts, engine and timing cache; all refusals come before the library reads the graph."""
    library: Library = request["library"]
    trt = _import_library(library)
    number, only_for = _resolve_architecture(trt, library, request["compute_capability"])
    report("check the graph", 0, 1)
    model = checked_graph(onnx_model)
    profiles = batch_profiles(model, request["batch_sizes"])
    write_out_norms(model)
    report("check the graph", 1, 1)

    logger = _error_logger(trt)
    builder = trt.Builder(logger)
    # TensorRT 11's networks are always strongly typed, and the flag is gone.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    _parse(trt, network, model, weights_of(onnx_model), logger)
    inputs = _tensors(model.graph.input, network.get_input, network.num_inputs)
    if request["channels_last"]:
        images = [network.get_output(0), *map(network.get_input, range(network.num_inputs))]
        for each in images:
            if each.name in (SAMPLE, PREDICTION) and len(each.shape) == 4:
                each.allowed_formats = 1 << int(trt.TensorFormat.HWC)

    config = builder.create_builder_config()
    if library == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{number}"], 0)
    if not request["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    _set_options(trt, config, request["options"], library)
    for size in profiles or ():
        shapes = builder.create_optimization_profile()
        for name, _, shape in inputs:
            if BATCH in shape:
                exactly = tuple(size if each == BATCH else each for each in shape)
                shapes.set_shape(name, exactly, exactly, exactly)
        config.add_optimization_profile(shapes)
    timings = _timing_cache(config, cache) if library == "tensorrt" else None
    if request["progress"] and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = monitor = _monitor(trt, report)  # noqa: F841 - the config does not keep it alive
    report("build", 0, 1)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(
            got=f"no engine from {library} {trt.__version__} for sm_{number}: {logger.summary()}",
            expected="a graph that the library can build for this architecture",
            remedy="choose another architecture, or export the network in another dtype, as the message suggests",
        )
    report("build", 1, 1)
    facts = {
        "library_version": trt.__version__,
        "compute_capability": number,
        "device": None if only_for is None else only_for.name,
        "num_multiprocessors": None if only_for is None else only_for.num_multiprocessors,
        "platform": sysconfig.get_platform(),
        "flags": sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)),
        "inputs": inputs,
        "outputs": _tensors(model.graph.output, network.get_output, network.num_outputs),
        "profiles": profiles,
    }
    return facts, bytes(engine), b"" if timings is None else bytes(timings.serialize())


def _set_options(trt: Any, config: Any, options: Mapping[str, Any], library: Library) -> None:
    """Those of skipstep.backends.tensorrt_options. Raises MissingDependencyError for a flag of another release, and
    DeviceUnavailableError."""
    if library == "tensorrt_rtx" and (options["refit"] or options["strip"]):
        cuda_device(remedy="leave refit and strip out, or build on a GPU: tensorrt_rtx compiles such engines on one")
    # TensorRT-RTX takes memory while it streams weights.
    flags = {
        "WEIGHT_STREAMING": options["weight_streaming"],
        "REFIT": options["refit"],
        "STRIP_PLAN": options["strip"],
        "REQUIRE_USER_ALLOCATION": library == "tensorrt_rtx" and not options["weight_streaming"],
    }
    for name in (name for name, wanted in flags.items() if wanted):
        # An engine without weights could not be told from others.
        if name in trt.BuilderFlag.__members__ and (name != "STRIP_PLAN" or hasattr(trt, "EngineStat")):
            config.set_flag(trt.BuilderFlag.__members__[name])
        elif name != "REQUIRE_USER_ALLOCATION":
            raise MissingDependencyError(
                got=f"{library} {trt.__version__}, whose engines cannot be built and loaded with {name}",
                expected="a release that has it",
                remedy=f"pip install -U {library}, or leave the option out",
            )
    config.max_aux_streams = options["aux_streams"]
    if options["optimization_level"] is not None:
        config.builder_optimization_level = options["optimization_level"]
    if options["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_bytes"])


def _import_library(library: Library) -> Any:
    trt = import_library(library)
    # Before 10 its networks were weakly typed, and became float16 without being asked.
    if library == "tensorrt_rtx" or int(trt.__version__.split(".")[0]) >= 10:
        return trt
    raise MissingDependencyError(
        got=f"{library} that cannot be used: version {trt.__version__}",
        expected="an installation that works, TensorRT from version 10 on",
        remedy=f"pip install 'skipstep[{EXTRAS[library]}]'",
    )


def _resolve_architecture(trt: Any, library: Library, wanted: int | None) -> tuple[int, DeviceFacts | None]:
    """The compute capability to build for, and the GPU where the engine is for that one alone."""
    if library == "tensorrt":
        # Without a device this library may crash instead of saying so.
        device = cuda_device(remedy=_NO_DEVICE)
        return device.compute_capability, device
    number = cuda_device(remedy=_NO_DEVICE).compute_capability if wanted is None else wanted
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name))
    if number not in known:
        raise InputError(
            got=f"architecture sm_{number}",
            expected=f"one that {library} {trt.__version__} knows: {', '.join(f'sm_{each}' for each in known)}",
            remedy="choose one of these, or build with TensorRT on the device itself",
        )
    return number, None


def _parse(trt: Any, network: Any, model: Any, weights: Weights, logger: Any) -> None:
    parser = trt.OnnxParser(network, logger)
    own = {function.name for function in model.functions}
    nodes = [(name, each) for name, each in messages(model) if type(each).__name__ == "NodeProto"]
    unknown = [
        f"{node.op_type} (node {name!r})"
        for name, node in nodes
        if node.op_type not in own and not parser.supports_operator(node.op_type)
    ]
    problems = unknown
    if not unknown and not _parsed(trt, parser, model.SerializeToString(), weights):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        problems = [f"{e.node_operator()} (node {e.node_name() or e.node()!r}): {e.desc()}" for e in errors]
        problems = problems or [logger.summary()]
    if problems:
        raise ExportError(
            got="a graph that the library does not support: " + "; ".join(problems[:3])[:1000],
            expected="operators that TensorRT implements",
            remedy="rewrite the module that these nodes come from, or run it with onnxruntime",
        )


def _parsed(trt: Any, parser: Any, model: bytes, weights: Weights) -> bool:
    if not weights:
        return bool(parser.parse(model))
    if not hasattr(parser, "load_initializer"):
        raise MissingDependencyError(
            got=f"TensorRT {trt.__version__}, whose parser reads weights from files alone",
            expected="one that takes verified weights from memory, for a network of this size",
            remedy="pip install -U tensorrt, to 10.13 or later",
        )
    return (
        parser.load_model_proto(model)
        and all(parser.load_initializer(name, each.ctypes.data, each.nbytes) for name, each in weights.items())
        and parser.parse_model_proto()
    )


def _tensors(infos: Any, get: Callable[[int], Any], count: int) -> list[tuple[str, str, list[int | str]]]:
    """Name, dtype and shape of the network's inputs or outputs: dtypes as the library has them, shapes as the graph."""
    shapes = {
        info.name: [
            d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in info.type.tensor_type.shape.dim
        ]
        for info in infos
    }
    tensors = map(get, range(count))
    return [
        (each.name, _DTYPE_NAMES.get(each.dtype.name, each.dtype.name.lower()), shapes[each.name]) for each in tensors
    ]


def _timing_cache(config: Any, stored: bytes) -> Any:
    """The cache that the build reads and adds to: what was stored, or an empty one where the library refuses that."""
    for data in (stored, b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _error_logger(trt: Any) -> Any:
    class ErrorLogger(trt.ILogger):  # type: ignore[misc]
        """Keeps the library's messages for the error that follows."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a GPU the library adds to each message that it finds no driver.
            if severity <= trt.ILogger.Severity.ERROR and "catchCudaError" not in message:
                self._errors.append(message)

        def summary(self) -> str:
            return "; ".join(self._errors[:3])[:1000] or "no reason given"

    return ErrorLogger()


def _monitor(trt: Any, report: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports each start and end of the library's phases, and at most 20 steps a second in between."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._last = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            report(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._last > _SECONDS_BETWEEN_REPORTS:
                self._last = now
                report(phase, step + 1, self._steps.get(phase, step + 1))
            return True

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.get(phase, 1)
            report(phase, steps, steps)

    return Monitor()


if __name__ == "__main__":
    _serve()

"""OpenVINO as a library: imported without its telemetry, asked for what the processor has, and compiled models."""

from __future__ import annotations

import importlib
import io
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from skipstep.backends.processor import processor, thread_limit
from skipstep.errors import DeviceUnavailableError, ExportError
from skipstep.networks.large_graph import weights_as_inputs, weights_of

_TELEMETRY: Final = "openvino_telemetry"
_IMPORT_LOCK = threading.Lock()
# Names of OpenVINO's for each precision of ours, and what a model reports that runs in it: of int8, what is between
# its layers.
HINTS: Final[Mapping[str, str]] = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


def openvino() -> Any:
    """The package, imported once, without its telemetry.

    That would write a client's number to the home folder and report the import to its vendor, without asking; a library
    that is embedded in products sends nothing. Where the program has imported OpenVINO before, nothing is left to
    prevent.
    """
    with _IMPORT_LOCK:
        if "openvino" in sys.modules or _TELEMETRY in sys.modules:
            return importlib.import_module("openvino")
        try:
            # None makes its import fail with ImportError, and OpenVINO takes a stub in its place, for good.
            sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
            return importlib.import_module("openvino")
        finally:
            del sys.modules[_TELEMETRY]


@lru_cache(maxsize=1)
def core() -> Any:
    return openvino().Core()


def capabilities() -> str:
    """What arithmetic the library says that it has for this processor."""
    found = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    names = [name for name in ("FP32", "BF16", "FP16", "INT8") if name in found]
    return f"OpenVINO {_version()} has {', '.join(names)} for this processor"


def settings(precision: str, num_threads: int | None) -> dict[str, Any]:
    """One call at a time as fast as possible; threads are not tied to cores, which the program's others need too."""
    num_threads = num_threads or thread_limit()
    asked: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "ENABLE_CPU_PINNING": False,
    }
    return asked if num_threads is None else {**asked, "INFERENCE_NUM_THREADS": num_threads}


def check_precision(precision: str) -> None:
    """Raise DeviceUnavailableError if a model that is compiled for this precision runs in another one."""
    ov = openvino()
    given = ov.opset13.parameter([1], ov.Type.f32)
    compile_model(ov.Model([ov.opset13.relu(given)], [given], "probe"), precision, settings(precision, 1))


def read_model(graph: bytes, batch_size: int | None = None) -> Any:
    """A model of a serialised ONNX graph, of fixed shapes if `batch_size` is given. Raises ExportError.

    Weights beside the graph are shared, not copied: the library reads an input for each, which a constant replaces.
    """
    ov, weights = openvino(), weights_of(graph)
    frontend = importlib.import_module("openvino.frontend")
    try:
        # The reader of ONNX alone: left to itself, the library offers the bytes to the readers of every format.
        reader = frontend.FrontEndManager().load_by_framework("onnx")
        model = reader.convert(reader.load(io.BytesIO(weights_as_inputs(graph))))
        for each in model.get_parameters():
            if (array := weights.get(each.get_friendly_name())) is not None:
                each.output(0).replace(ov.op.Constant(array, shared_memory=True).output(0))
                model.remove_parameter(each)
        if batch_size is not None:
            model.reshape({each: [batch_size, *list(each.partial_shape)[1:]] for each in model.inputs})
    except Exception as error:  # OpenVINO's exceptions share no public base class but Exception.
        raise _refused(error) from error
    return model


def input_ports(compiled: Any) -> dict[str, Any]:
    """The inputs by the graph's names for them: a port's own names include those of values that became equal to it."""
    return {each.get_node().get_friendly_name(): each for each in compiled.inputs}


def compile_model(model: Any, precision: str, config: Mapping[str, Any]) -> Any:
    """Compiled for this processor. Raises ExportError, and DeviceUnavailableError if it would run in another
    precision."""
    try:
        compiled = core().compile_model(model, "CPU", dict(config))
    except Exception as error:  # As above.
        raise _refused(error) from error
    return _in_precision(compiled, precision)


def import_model(data: bytes, precision: str, config: Mapping[str, Any]) -> Any | None:
    """What `export_model` wrote, or None where this library does not take it. Only for verified bytes: the library
    trusts them."""
    try:
        return _in_precision(core().import_model(data, "CPU", dict(config)), precision)
    except Exception:  # As above. It is compiled again.
        return None


def export_model(compiled: Any) -> bytes:
    data: io.BytesIO | bytes = compiled.export_model()
    return data if isinstance(data, bytes) else data.getvalue()


def key_parts(graph_digest: bytes, config: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """What a compiled model depends on."""
    return {
        "kind": "openvino.model",
        "library": openvino().__version__,
        "processor": processor(),
        "graph": graph_digest,
        "settings": tuple(f"{name}={value}" for name, value in sorted(config.items())),
        "batch_size": batch_size,
    }


def _in_precision(compiled: Any, precision: str) -> Any:
    """`compiled`, if it reports that it runs in this precision: the hint is a wish that it may set aside."""
    reported = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if reported != HINTS[precision]:
        raise DeviceUnavailableError(
            got=f"a network that OpenVINO compiled for {precision} and reports to run in {reported}",
            expected=f"a processor with {precision} arithmetic",
            remedy="pass precision='float32'",
        )
    return compiled


def _version() -> str:
    return str(openvino().__version__).partition("-")[0]


def _refused(error: Exception | str) -> ExportError:
    return ExportError(
        got=f"a graph that OpenVINO {_version()} does not take: {error!s:.500}",
        expected="a graph with operators that it knows",
        remedy="upgrade openvino, or use backend='onnxruntime'",
    )

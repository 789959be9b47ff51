"""ONNX Runtime's WebGPU provider: the step network on a GPU of any vendor, through Vulkan, Direct3D 12 or Metal.

The loop, and the network's parts that run before it, stay on the CPU. The provider is a plugin, the package
onnxruntime-ep-webgpu, beside any onnxruntime. Each batch size in use has a session of its own: with an open size ten
nodes of the shipped network compute shapes on the CPU between those on the GPU, with a fixed one none do.
"""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from functools import lru_cache
from typing import Any

import onnxruntime

from skipstep.backends.denoiser import MakeDenoiser, NetworkSource, Target
from skipstep.backends.early import graph_failed
from skipstep.backends.onnxruntime import EarlyGraphs, LazySession, OnnxRuntimeDenoiser, make_session
from skipstep.backends.prefetch import Lazy, Shared
from skipstep.errors import DeviceUnavailableError, ExportError
from skipstep.networks.graphs import BATCH
from skipstep.networks.spec import NetworkSpec

PROVIDER = "WebGpuExecutionProvider"
# y = |x| of one float32, an ONNX model: a session of it needs an adapter, and compiles nothing.
_SMALLEST = bytes.fromhex(
    "08083a320a0b0a017812017922034162731201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808011204"
    "0a02080142040a001011"
)
# All sessions share one device of the library, which is not for two threads at once.
_DEVICE_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _register() -> None:
    plugin = importlib.import_module("onnxruntime_ep_webgpu")
    onnxruntime.register_execution_provider_library("webgpu", plugin.get_library_path())


def _devices() -> list[Any]:
    return [each for each in onnxruntime.get_ep_devices() if each.ep_name == PROVIDER]


@lru_cache(maxsize=1)
def device() -> Any:
    """What ONNX Runtime runs the provider on. Raises DeviceUnavailableError where there is no GPU or no driver."""
    try:
        if not _devices():  # The program itself may have registered the provider.
            _register()
        found = _devices()
    except Exception as error:  # ONNX Runtime's own, an AttributeError of one too old, an OSError of a broken wheel.
        raise _no_device(f"{type(error).__name__}: {error}") from error
    if not found:
        raise _no_device("no GPU that the provider finds")
    try:
        make_session(_SMALLEST, prepare=lambda options: options.add_provider_for_devices(found[:1], {}))
    except ExportError as error:
        raise _no_device(f"no adapter: {str(error.__cause__)[-200:]}") from error
    return found[0]


def capabilities() -> str:
    """The versions, and the GPU as far as the library tells which."""
    found = device()
    version, chip = found.ep_metadata.get("version", "of unknown version"), found.device
    kind = f"{chip.type.name}, {chip.vendor or 'unknown vendor'} {chip.vendor_id:04x}:{chip.device_id:04x}"
    return f"ONNX Runtime {onnxruntime.__version__} with WebGPU {version} on {kind}"


class WebGpuDenoiser(OnnxRuntimeDenoiser):
    """The step network at one batch size. `placement`: how many of its nodes run where, in words."""

    name = "webgpu"

    def __init__(self, session: LazySession, early: EarlyGraphs, spec: NetworkSpec, *, batch_size: int) -> None:
        with _DEVICE_LOCK:  # It binds its inputs.
            super().__init__(session, early, spec, batch_size=batch_size)
        self.placement = placement(self._session)

    def _run(self) -> None:
        with _DEVICE_LOCK:
            self._runs = [self._bound(self._session, slice(self.batch_size))]  # It copies inputs to the device.
            super()._run()


def placement(session: onnxruntime.InferenceSession) -> str:
    """Such as "438 of 438 nodes on WebGPU". Raises ExportError where none is."""
    nodes: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    if not nodes[PROVIDER]:
        raise graph_failed("the WebGPU provider takes none of its nodes")
    return f"{nodes[PROVIDER]} of {nodes.total()} nodes on WebGPU"


def denoisers(source: NetworkSource, target: Target) -> MakeDenoiser:
    """Denoisers for any batch size; the first of a size makes its session, and is compared with a reference.

    Raises DeviceUnavailableError where the provider finds no GPU.
    """
    gpu = device()
    graph = Lazy(lambda: source.step_graph("float32"))
    graph.prefetch()
    early = EarlyGraphs(source.before_loop(), source.spec, target.num_threads, tables=source.tables)

    def make(batch_size: int) -> onnxruntime.InferenceSession:
        def prepare(options: onnxruntime.SessionOptions) -> None:
            options.add_provider_for_devices([gpu], {})
            options.add_free_dimension_override_by_name(BATCH, batch_size)
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")

        with _DEVICE_LOCK:
            session = make_session(graph.get(), num_threads=target.num_threads, prepare=prepare)
        if target.check is not None:
            target.check()(denoiser(session, batch_size))
        return session

    def denoiser(session: onnxruntime.InferenceSession, batch_size: int) -> WebGpuDenoiser:
        return WebGpuDenoiser(Lazy(lambda: session), early, source.spec, batch_size=batch_size)

    sessions = Shared(make)
    return lambda batch_size: denoiser(sessions.get(batch_size), batch_size)


def _no_device(what: str) -> DeviceUnavailableError:
    return DeviceUnavailableError(
        got=f"WebGPU with {what:.300}",
        expected="a GPU with a driver for Vulkan, Direct3D 12 or Metal, on Linux the library libvulkan.so.1 too",
        remedy="install the GPU's driver, on Debian libvulkan1 and pip install 'skipstep[webgpu]' --upgrade, or pass "
        "backend='onnxruntime'",
    )

"""A bundle on an NVIDIA GPU with NumPy, cuda-bindings and TensorRT alone: skipstep.load(..., runtime="edge").

    kernels/*.cubin   step and initial noise of the device's architecture     skipstep.edge.launcher
    engines/*         the step network for the device and library here        skipstep.edge.network

What follows from the timesteps of the bundle's plans, and from labels, is in its tables; what a network computes from
other conditions before the loop is run by ONNX Runtime on the host. Everything is verified before use.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.denoiser import Library, NetworkSource, tensor_dtype
from skipstep.backends.early import BY_LABEL, EarlyParts
from skipstep.backends.tensorrt_engine import TensorRtEngine
from skipstep.backends.tensorrt_library import choose_library, cuda_releases, import_library
from skipstep.bundles.bundle import Bundle, read_engine
from skipstep.bundles.kept import CacheSlot
from skipstep.calls.plan_set import PlanSet
from skipstep.cuda.driver import CudaDriver, DeviceBuffer
from skipstep.cuda.queue import Queue
from skipstep.edge.launcher import StepLauncher
from skipstep.edge.loop import EdgeLoop
from skipstep.edge.network import EdgeNetwork
from skipstep.edge.step_binary import StepBinaryFacts
from skipstep.errors import DeviceUnavailableError, InputError, MissingDependencyError, check_choice, optional_package
from skipstep.loops.contract import Lifecycle
from skipstep.loops.runner import BatchRunner, CompiledNetwork
from skipstep.networks.graphs import Values
from skipstep.networks.spec import network_batch_sizes


@dataclass(slots=True)
class LateEarlyParts(EarlyParts):
    """Runs a part when its values are needed and stored nowhere; only that takes ONNX Runtime."""

    _graphs: list[EarlyParts] = field(default_factory=list)

    def _run(self, name: str, given: Mapping[str, NDArray[np.generic]]) -> Values:
        if not self._graphs:
            stored = name == "plan" or any(each.startswith(BY_LABEL) for held in self.tables.values() for each in held)
            optional_package(
                "onnxruntime",
                use=f"computes {name!r}, what of this network runs before the loop, on the host",
                remedy="pip install 'skipstep[cpu]'"
                + (", or use the bundle's own plans, whose values are stored" if stored else ""),
            )
            from skipstep.backends.onnxruntime import EarlyGraphs

            self._graphs.append(EarlyGraphs(self.graphs, self.spec))
        return self._graphs[0]._run(name, given)


class _Engines:
    """The bundle's engines that run here, each loaded once for all of its batch sizes."""

    def __init__(self, bundle: Bundle, library: Library, queue: Queue, releases: ExitStack) -> None:
        self._bundle, self._library, self._queue, self._releases = bundle, library, queue, releases
        self._module = import_library(library)
        self._device = queue.driver.facts()
        major = queue.driver.cuda_major()
        releases_of_cuda = {int(each) for each in cuda_releases(library)}
        if releases_of_cuda and min(releases_of_cuda) > major:
            raise MissingDependencyError(
                got=f"{library} for CUDA {min(releases_of_cuda)} on a driver for CUDA {major}",
                expected="a driver that is as new",
                remedy=f"pip install {library.replace('_', '-')}-cu{major}, or update the driver",
            )
        self._loaded: list[tuple[TensorRtEngine, DeviceBuffer]] = []

    def at(self, batch_size: int) -> tuple[TensorRtEngine, DeviceBuffer]:
        """With the memory of its activations. Raises DeviceUnavailableError, which lists the bundle's engines."""
        for engine, memory in self._loaded:
            if batch_size in engine.profiles:
                return engine, memory
        version, device = self._module.__version__, self._device
        data, _ = read_engine(
            self._bundle, library=self._library, version=version, device=device, batch_size=batch_size
        )
        driver = self._queue.driver
        engine = TensorRtEngine(
            data,
            library=self._library,
            module=self._module,
            device=("driver", driver.number),
            facts=driver.facts,
            current=driver.current,
            keep=CacheSlot,
        )
        self._loaded.append((engine, self._queue.zeros(engine.activation_bytes, self._releases)))
        return self._loaded[-1]


def edge_network(
    bundle: Bundle,
    source: NetworkSource,
    plans: PlanSet,
    gpu: int,
    *,
    form: str,
    library: Library | None,
    backend: str,
    precision: str,
) -> CompiledNetwork:
    """The network of a bundle, which is `source`, on device `gpu`. Raises DeviceUnavailableError where it has no engine
    or kernel for that device, InputError, MissingDependencyError and what reading the bundle raises."""
    manifest, network = bundle.manifest, bundle.manifest.network
    check_choice("loop", form, ("captured", "stepwise"), remedy="leave it out: without torch there are no others")
    built = _precision(bundle, backend, precision)
    lifecycle = Lifecycle()
    early = LateEarlyParts(source.before_loop(), network, tables=source.tables)
    with ExitStack() as opened:
        driver = CudaDriver(gpu)
        opened.callback(driver.close)
        queue = Queue(driver)
        opened.callback(queue.releases.close)
        releases = opened.enter_context(ExitStack())
        launcher = StepLauncher(
            [(StepBinaryFacts.from_json(each.facts, each.file), bundle.read(each.file)) for each in manifest.kernels],
            num_elements=network.num_elements,
            network_dtype=tensor_dtype(built),
            driver=driver,
        )
        engines = _Engines(bundle, choose_library(source.engine_libraries, library), queue, releases)
        networks = {
            size: EdgeNetwork(*engines.at(size), early, network, queue, batch_size=size, releases=releases)
            for size in network_batch_sizes(network, manifest.batch_sizes)
        }
        made = EdgeLoop(
            networks,
            network,
            queue,
            launcher,
            lifecycle,
            batch_sizes=manifest.batch_sizes,
            form=form,
            releases=releases.pop_all(),
        )
        opened.pop_all()
    calibrations = None if manifest.calibration is None else bundle.read(manifest.calibration)
    runner = BatchRunner(made, network, manifest.batch_sizes, lifecycle)
    return CompiledNetwork(source, plans, runner, "tensorrt", built, None, calibrations=calibrations)


def _precision(bundle: Bundle, backend: str, precision: str) -> str:
    """Of the bundle's engines. Raises DeviceUnavailableError where there are none, InputError for another."""
    engines = bundle.manifest.engines
    if not engines:
        raise DeviceUnavailableError(
            got=f"{bundle.path}, a bundle without engines for a GPU",
            expected="TensorRT engines for this device",
            remedy="build engines on this device: skipstep build",
        )
    built = engines[0].precision
    if backend not in ("auto", "tensorrt") or precision not in ("auto", built):
        raise InputError(
            got=f"backend={backend!r}, precision={precision!r} for a bundle on a GPU",
            expected=f"tensorrt in {built}, for which the bundle has engines",
            remedy="leave both out, or export the bundle in another precision",
        )
    return built

"""A bundle as a network source, and the network that is made of it: ONNX Runtime or OpenVINO on a CPU, TensorRT on
a GPU, with torch or without (skipstep.edge_loading).

The start of a process counts: the runtime begins to load its session before the packages that only a call needs are
imported.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast, get_args

from skipstep.backends.denoiser import Denoiser, Precision, Target
from skipstep.backends.registry import BACKENDS, check_device, check_library, resolve_backend
from skipstep.bundles.bundle import Bundle, open_bundle, read_engine, while_unchanged
from skipstep.cuda.probe import cuda_device
from skipstep.errors import (
    BundleError,
    DeviceUnavailableError,
    InputError,
    MissingDependencyError,
    check_choice,
    check_flag,
)
from skipstep.loops.choice import make_loop, resolve_form
from skipstep.loops.contract import Lifecycle
from skipstep.networks.graphs import Values
from skipstep.networks.spec import NetworkSpec

if TYPE_CHECKING:
    from skipstep.calls.plan_set import PlanSet
    from skipstep.loops.runner import CompiledNetwork


@dataclass(frozen=True, slots=True)
class BundleSource:
    """A bundle as a network source (skipstep.backends.denoiser.NetworkSource). Every byte is verified before use."""

    bundle: Bundle
    tables: dict[bytes, Values] = field(default_factory=dict)
    # Set once the step graph has been read, in the background; what went wrong meanwhile.
    step_read: threading.Event = field(default_factory=threading.Event)
    failures: list[BundleError] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.bundle.manifest.model

    @property
    def spec(self) -> NetworkSpec:
        return self.bundle.manifest.network

    def module(self) -> Any:
        raise InputError(
            got="the torch backend for a bundle",
            expected="a backend that runs graphs or engines",
            remedy="build the engine from the model that the bundle was made from: Engine.build(..., backend='torch')",
        )

    def before_loop(self) -> Mapping[str, bytes]:
        graphs = self.bundle.manifest.graphs
        return {part: self.bundle.read_graph(graphs[part]) for part in ("plan", "prompt", "call") if part in graphs}

    def step_graph(self, precision: str) -> bytes:
        try:
            return self.bundle.read_graph(_step_file(self.bundle, precision))
        except BundleError as error:
            self.failures.append(error)
            raise
        finally:
            self.step_read.set()

    @property
    def engine_libraries(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(each.facts.get("library")) for each in self.bundle.manifest.engines))

    def tensorrt_engine(
        self,
        library: str,
        *,
        version: str,
        device: int,
        batch_sizes: Sequence[int],
        precision: str,
        again: bool = False,
    ) -> bytes:
        facts = cuda_device(device)
        return read_engine(self.bundle, library=library, version=version, device=facts, batch_size=batch_sizes[0])[0]

    def engine_graph(self, precision: str) -> bytes:
        from skipstep.model_source import engine_graph

        return engine_graph(self.step_graph(precision))


def _step_file(bundle: Bundle, precision: str) -> str:
    """The file of the step network in a precision. Raises InputError where the bundle has none."""
    graphs = bundle.manifest.graphs
    name = "step" if precision == "float32" else f"step-{precision}"
    if name not in graphs:
        raise InputError(
            got=f"{bundle.path}, a bundle without a step network in {precision}",
            expected=f"one of {', '.join(graph for graph in graphs if graph.startswith('step'))}",
            remedy="leave precision out, or save the bundle again: engine.save(..., precision='int8', "
            "calibration=range(8))"
            if precision.startswith("int8")
            else "leave precision out, or load the bundle with device='cuda'",
        )
    return graphs[name]


def load_network(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    loop: str = "auto",
    runtime: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    library: str | None = None,
    require_captured: bool = False,
    num_threads: int | None = None,
    require_signature: str | os.PathLike[str] | None = None,
    allow_hard_links: bool = False,
    compile_on_miss: bool = False,
) -> CompiledNetwork:
    """See skipstep.load."""
    check_device(device)
    for name, flag in (
        ("require_captured", require_captured),
        ("allow_hard_links", allow_hard_links),
        ("compile_on_miss", compile_on_miss),
    ):
        check_flag(name, flag)
    kind, _, number = device.partition(":")
    if kind == "cpu" and require_captured:
        raise InputError(
            got=f"device={device!r}, require_captured=True",
            expected="'cuda', a GPU, whose loops can be captured",
            remedy="pass device='cuda', or leave require_captured out",
        )
    form = resolve_form(loop, device=kind)
    gpu = None if kind == "cpu" else int(number or 0)
    check_choice("backend", backend, ("auto", *dict.fromkeys(each.name for each in BACKENDS if each.loads_bundles)))
    check_choice("precision", precision, ("auto", *get_args(Precision)))
    check_choice("runtime", runtime, ("auto", "torch", "edge"), remedy="leave it out, or see LoadOptions")
    if gpu is None and runtime == "edge":
        raise InputError(
            got=f"runtime='edge' on {device!r}",
            expected="a GPU: on the CPU there is nothing to launch kernels on",
            remedy="pass device='cuda', or leave runtime out",
        )
    # Without torch there is only the driver.
    edge = runtime == "edge" or (runtime == "auto" and importlib.util.find_spec("torch") is None)
    target = Target(num_threads=num_threads, library=check_library(library))

    def opened() -> CompiledNetwork:
        bundle = open_bundle(path, require_signature=require_signature, allow_hard_links=allow_hard_links)
        if gpu is not None and edge:
            from skipstep.edge_loading import edge_network

            source = BundleSource(bundle)
            plans = held_plans(bundle, source, compile_on_miss)
            return edge_network(
                bundle,
                source,
                plans,
                gpu,
                form=form,
                library=target.library,
                backend=backend,
                precision=precision,
            )
        return _network_of(bundle, gpu, form, require_captured, target, compile_on_miss, backend, precision)

    return while_unchanged(path, opened)


def _network_of(
    bundle: Bundle,
    gpu: int | None,
    form: str,
    require_captured: bool,
    target: Target,
    compile_on_miss: bool,
    asked_backend: str,
    asked_precision: str,
) -> CompiledNetwork:
    kind = "cpu" if gpu is None else "cuda"
    manifest = bundle.manifest
    precision = asked_precision
    if precision == "auto":
        precision = "float32" if gpu is None or not manifest.engines else manifest.engines[0].precision
    name = "tensorrt" if gpu is not None and asked_backend == "auto" else asked_backend
    backend = resolve_backend(name, device=kind, exports=False, precision=precision)
    if gpu is None and precision == "int8":
        _step_file(bundle, f"int8-{backend.name}")
    source, lifecycle, cuda = BundleSource(bundle), Lifecycle(), None
    target = replace(target, precision=cast(Precision, precision))
    if gpu is not None:
        # The device is probed before anything of TensorRT or CUDA is touched.
        cuda_device(gpu)
        if not manifest.engines:
            raise DeviceUnavailableError(
                got=f"{bundle.path}, a bundle without engines for a GPU",
                expected="TensorRT engines for this device",
                remedy="build engines on this device: skipstep build",
            )
        import torch

        from skipstep.bundles.kept import CacheSlot
        from skipstep.cuda.device import CudaDevice

        built = manifest.engines[0].precision
        if backend.name != "tensorrt" or precision != built:
            raise InputError(
                got=f"backend={backend.name!r}, precision={precision!r} for a bundle on a GPU",
                expected=f"tensorrt in {built}, for which the bundle has engines",
                remedy="leave both out, or export the bundle in another precision",
            )
        cuda = CudaDevice(torch.device("cuda", gpu))
        stream = getattr(cuda.stream, "torch_stream", None)
        target = replace(
            target,
            device=str(cuda.torch_device),
            stream=stream,
            keep=CacheSlot,
        )
    if gpu is None:
        from skipstep.bundles.kept import CacheSlot

        check = _check_with(source, precision) if backend.compiles_late else None
        target = replace(target, keep=CacheSlot, check=check)
    # Loading the runtime's session takes longest: it goes on in the background while the rest is read.
    make = backend.denoisers(source, target)
    from skipstep.loops.runner import BatchRunner, CompiledNetwork

    plans = held_plans(bundle, source, compile_on_miss)
    made = make_loop(
        make,
        manifest.network,
        manifest.batch_sizes,
        form=form,
        required=require_captured,
        lifecycle=lifecycle,
        device=cuda,
        precision=precision,
        reference=lambda: resolve_backend("onnxruntime", device="cpu", exports=False).denoisers(source, Target())(2),
        splits=target.splits,
    )
    calibrations = None if manifest.calibration is None else bundle.read(manifest.calibration)
    pipeline = None
    if manifest.pipeline is not None:
        from skipstep.pipelines.pipeline import Pipeline
        from skipstep.pipelines.spec import read_pipeline_spec

        spec = read_pipeline_spec(bundle.read(manifest.pipeline), manifest.network.sample_shape[0])
        pipeline = Pipeline(
            spec,
            lambda name: (bundle.read_graph if name.endswith(".onnx") else bundle.read)(name),
            partial(backend.part, target=target),
        )
    if cuda is None:
        source.step_read.wait()
        for failure in source.failures:
            raise failure
    return CompiledNetwork(
        source,
        plans,
        BatchRunner(made, manifest.network, manifest.batch_sizes, lifecycle, pipeline),
        backend.name,
        precision,
        target.num_threads,
        calibrations=calibrations,
    )


def held_plans(bundle: Bundle, source: BundleSource, compile_on_miss: bool) -> PlanSet:
    """The bundle's plans; the tables of `source` get the step inputs that follow from their timesteps alone."""
    from skipstep.bundles.tables import default_options, plan_values, read_plans
    from skipstep.calls.conditioning import distinct
    from skipstep.calls.plan_set import PlanSet

    manifest = bundle.manifest
    arrays = bundle.read_arrays(manifest.tables)
    plans = tuple(read_plans(manifest, arrays))
    source.tables.update(
        {distinct(plan.evaluation_timesteps)[0].tobytes(): plan_values(plan, arrays) for plan in plans}
    )
    return PlanSet(
        manifest.network,
        plans,
        defaults=default_options(manifest, arrays),
        compile_on_miss=compile_on_miss,
        network_digest=manifest.digest,
    )


def _check_with(source: BundleSource, precision: str) -> Callable[[], Callable[[Denoiser], float]] | None:
    """Compares a denoiser with what ONNX Runtime predicted before; None where that is not installed."""
    try:
        reference = resolve_backend("onnxruntime", device="cpu", exports=False)
    except MissingDependencyError:
        return None

    def check() -> Callable[[Denoiser], float]:
        from skipstep.loops.agreement import NetworkProbe

        probe = NetworkProbe.of(reference.denoisers(source, Target())(2), source.spec)
        return partial(probe.check, precision=precision)

    return check

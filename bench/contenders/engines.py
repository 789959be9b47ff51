"""Our own loops and backends, through the public API."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from skipstep import Engine, load
from skipstep.bench.contenders.network_alone import network_alone
from skipstep.bench.contenders.workload import Built, ContenderKind, Draw, Samples, Setup, Workload
from skipstep.bench.models import Subject
from skipstep.export.graph_cost import partition_costs


def prepared(engine: Engine) -> Callable[[Workload], Draw]:
    def prepare(workload: Workload) -> Draw:
        arguments: dict[str, Any] = {"plan": workload.plan, "x_T": workload.x_T}
        if workload.labels is not None:
            arguments["class_labels"] = workload.labels.tolist()
        if workload.prompts is not None:
            arguments["prompt_embeds"] = workload.prompts

        def draw() -> Samples:
            drawn: Samples = engine.sample(**arguments, output_type="np")
            return drawn

        return draw

    return prepare


def build_engine(subject: Subject, setup: Setup, *, backend: str, loop: str) -> Engine:
    """From the folder; a bundle is loaded, and takes the plans that it lacks."""
    if subject.is_bundle:
        engine = load(subject.path, num_threads=setup.threads, allow_hard_links=True, compile_on_miss=True)
        for plan in setup.plans:
            engine.add_plan(plan)
        return engine
    options: dict[str, Any] = {} if setup.device == "cpu" else {"precision": setup.dtype}
    return Engine.build(
        str(subject.path),
        plans=setup.plans,
        batch_sizes=setup.batch_sizes,
        backend=backend,
        loop=loop,
        device=setup.device,
        num_threads=setup.threads,
        **options,
    )


def _kind(name: str, backend: str, loop: str, lacks: Callable[[Subject, Setup], str | None]) -> ContenderKind:
    def build(subject: Subject, setup: Setup) -> Built:
        engine = build_engine(subject, setup, backend=backend, loop=loop)
        if backend == "torch" or engine._built is None:
            return Built(prepared(engine))
        cost = partition_costs(engine._built.parts())["step"]
        return Built(
            prepared(engine),
            nodes=cost.nodes,
            weight_bytes=cost.weight_bytes,
            network_alone=network_alone(engine, setup.threads) if loop == "onnx" else None,
        )

    return ContenderKind(name, backend=backend, loop=loop, build=build, lacks=lacks)


def _lacks_module(subject: Subject, setup: Setup) -> str | None:
    return "a bundle holds no network that torch could run" if subject.is_bundle else None


def _lacks_cpu(subject: Subject, setup: Setup) -> str | None:
    if setup.device != "cpu" or setup.dtype != "float32":
        return f"runs on the CPU in float32; this run measures {setup.dtype} on {setup.device}"
    if importlib.util.find_spec("onnxruntime") is None:
        return "no package onnxruntime: pip install 'skipstep[cpu]'"
    return None


def _lacks_stepwise(subject: Subject, setup: Setup) -> str | None:
    return "a bundle holds the whole loop alone" if subject.is_bundle else _lacks_cpu(subject, setup)


def _lacks_gpu(subject: Subject, setup: Setup) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device that torch can see"
    if not setup.device.startswith("cuda"):
        return f"runs on a GPU; this run measures {setup.device}"
    return _lacks_module(subject, setup)


def _lacks_tensorrt(subject: Subject, setup: Setup) -> str | None:
    if importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_rtx") is None:
        return "no package tensorrt or tensorrt_rtx"
    return _lacks_gpu(subject, setup)


ONNX = _kind("skipstep-onnx", "onnxruntime", "onnx", _lacks_cpu)
ENGINES = (
    ONNX,
    _kind("skipstep-onnx-stepwise", "onnxruntime", "stepwise", _lacks_stepwise),
    _kind("skipstep-torch-stepwise", "torch", "stepwise", _lacks_module),
    _kind("skipstep-captured", "torch", "captured", _lacks_gpu),
    _kind("skipstep-step-graph", "torch", "step_graph", _lacks_gpu),
    _kind("skipstep-tensorrt", "tensorrt", "captured", _lacks_tensorrt),
)

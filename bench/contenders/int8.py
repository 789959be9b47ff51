"""Our whole loop with convolutions in 8-bit integers: faster on this kind of CPU, and less exact.

ONNX Runtime's static quantisation: activations uint8, weights int8 for each channel, ranges from the sampler's own
states on other seeds. Weights keep to 7 bits, as AVX2 adds two products in 16 bits, which 8 would overflow. The first
ninth and the last sixth of the convolutions stay float32: they take little of the time and make most of the error (on
the shipped model, ten steps, 0.11 of the samples' size instead of 0.22). Dynamic quantisation takes three times as long
as float32 there, and is no contender.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from skipstep import Engine
from skipstep.backends.onnxruntime import EarlyGraphs, Values, make_session
from skipstep.bench.contenders.engines import prepared
from skipstep.bench.contenders.lowered import draw_lowered
from skipstep.bench.contenders.workload import Built, ContenderKind, Setup, Workload
from skipstep.bench.models import Subject
from skipstep.export.graph_cost import partition_costs
from skipstep.export.onnx_loop import build_loop
from skipstep.export.partition import partition
from skipstep.loops.graph_loop import GraphLoop
from skipstep.loops.loop_sessions import LoopSessions
from skipstep.networks.graphs import Partition
from skipstep.plans.stages import Stages

_STEPS = 10
_SAMPLES = 8
# Not the seed of any case: what is measured has not been calibrated on.
_SEED = 1


def quantised(parts: Partition, seen: list[Values]) -> Partition:
    """`parts` with a step graph that convolves in 8 bits; `seen` are inputs of the step graph, to find ranges from."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[Values] = iter(seen)

        def get_next(self) -> Values | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder:
        exact, plain, low = (Path(folder) / name for name in ("step.onnx", "plain.onnx", "low.onnx"))
        exact.write_bytes(parts.graphs.step)
        # Its symbolic inference needs another package, and the graph's shapes are known.
        quant_pre_process(exact, plain, skip_symbolic_shape=True)
        quantize_static(
            plain,
            low,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=_outermost(onnx.load(plain).graph),
        )
        return replace(parts, graphs=replace(parts.graphs, step=low.read_bytes()))


def _outermost(graph: onnx.GraphProto) -> list[str]:
    """Convolutions next to the state and next to the prediction."""
    names = [node.name for node in graph.node if node.op_type == "Conv"]
    return names[: -(-len(names) // 9)] + names[len(names) - -(-len(names) // 6) :]


def build(subject: Subject, setup: Setup) -> Built:
    _, spec = subject.prepared
    exact = partition(subject.exported)
    calibration = Workload(subject, subject.plan(_STEPS), _SAMPLES, seed=_SEED)
    _, seen = draw_lowered(exact.graphs.step, exact, calibration, threads=setup.threads)
    parts = quantised(exact, seen)
    constants = EarlyGraphs(parts.graphs.before_loop, spec, setup.threads)
    sessions = LoopSessions(lambda features: make_session(build_loop(parts, spec, features), num_threads=setup.threads))
    loop = GraphLoop(sessions, constants, spec)
    loop.prepare([Stages.of([plan]) for plan in setup.plans])
    engine = Engine(
        spec,
        loops={0: loop},
        batch_sizes=setup.batch_sizes,
        backend="onnxruntime",
        device="cpu",
        plan_defaults={},
        any_batch=True,
    )
    for plan in setup.plans:
        engine.add_plan(plan)
    step: Any = onnx.load_from_string(parts.graphs.step)
    weights = sum(len(each.raw_data) for each in step.graph.initializer)
    return Built(prepared(engine), nodes=partition_costs(exact)["step"].nodes, weight_bytes=weights)


def lacks(subject: Subject, setup: Setup) -> str | None:
    if subject.is_bundle:
        return "a bundle holds the whole loop alone"
    if setup.device != "cpu":
        return f"quantised for the CPU; this run measures {setup.device}"
    if importlib.util.find_spec("onnxruntime") is None:
        return "no package onnxruntime: pip install 'skipstep[cpu]'"
    return None


INT8 = ContenderKind(
    "skipstep-onnx-int8", backend="onnxruntime", loop="onnx", build=build, lacks=lacks, precision="int8"
)

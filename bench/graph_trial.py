"""Changes of the step graph for ONNX Runtime on the CPU, each beside the graph as it is stored:
`python -m skipstep.bench.graph_trial --out FILE`.

One process, all forms in turn in every round; the ratio of a round is the stored graph's time by the form's, and the
medians over rounds are reported. With one thread the time is the thread's processor time, which other processes on the
machine change little; with more it is wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper, shape_inference

from skipstep.backends.onnxruntime_graph import with_attention
from skipstep.bench.models import open_subject
from skipstep.bench.record import environment, write_json
from skipstep.export.partition import partition
from skipstep.networks.graphs import BATCH

CASES = (("fashion-mnist", (1, 4, 16)), ("cifar10-architecture", (1, 4)))


def _edited(graph: bytes, change: Callable[[onnx.ModelProto, Mapping[str, list[int]]], None]) -> bytes:
    model, fixed = onnx.load_from_string(graph), onnx.load_from_string(graph)
    for each in fixed.graph.input:
        each.type.tensor_type.shape.dim[0].dim_value = 1
    del fixed.graph.value_info[:]
    typed = shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {
        each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in (*typed.value_info, *typed.input)
    }
    change(model, shapes)
    needed, kept = {each.name for each in model.graph.output}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    return bytes(model.SerializeToString())


def constant_shapes(model: onnx.ModelProto, shapes: Mapping[str, list[int]]) -> None:
    """Reshapes back after a norm with [0, …] for a shape that is put together at every run."""
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        put = makers.get(node.input[1]) if node.op_type == "Reshape" else None
        if put is not None and put.op_type == "Concat" and put.input[0] == "batch/size":
            target = np.array([0, *shapes[node.output[0]][1:]], np.int64)
            name = f"{node.output[0]}/target"
            model.graph.initializer.append(numpy_helper.from_array(target, name))
            node.input[1] = name


def layer_norms(model: onnx.ModelProto, shapes: Mapping[str, list[int]]) -> None:
    """LayerNormalization, which uses all threads, for InstanceNormalization, which uses one."""
    ones = {}
    for node in model.graph.node:
        if node.op_type == "InstanceNormalization":
            size = shapes[node.input[0]][-1]
            ones[f"ones/{size}"] = np.ones(size, np.float32)
            node.op_type = "LayerNormalization"
            node.input[1:] = [f"ones/{size}"]
            node.attribute.append(helper.make_attribute("axis", -1))
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in ones.items())


def one_scale_and_bias(model: onnx.ModelProto, shapes: Mapping[str, list[int]]) -> None:
    """The scale and bias of each norm in one pass over memory, as a BatchNormalization of mean 0 and variance 1."""
    users = {name: node for node in model.graph.node for name in node.input}
    made: dict[str, Any] = {"flat": np.array([-1])}
    for node in [each for each in model.graph.node if each.op_type == "InstanceNormalization"]:
        back = users[node.output[0]]
        scaled = users[back.output[0]]
        added = users[scaled.output[0]]
        if (back.op_type, scaled.op_type, added.op_type) != ("Reshape", "Mul", "Add"):
            continue
        channels, name = shapes[back.output[0]][1], added.output[0]
        made |= {f"zeros/{channels}": np.zeros(channels, np.float32), f"ones/{channels}": np.ones(channels, np.float32)}
        new = []
        for kind, each in (("scale", scaled), ("bias", added)):
            given = next(value for value in each.input if value not in (back.output[0], scaled.output[0]))
            new.append(helper.make_node("Reshape", [given, "flat"], [f"{name}/{kind}"]))
        names = [back.output[0], f"{name}/scale", f"{name}/bias", f"zeros/{channels}", f"ones/{channels}"]
        new.append(helper.make_node("BatchNormalization", names, [name], name=f"{name}/norm", epsilon=0.0))
        added.output[0] = f"{name}/before"
        place = list(model.graph.node).index(added)
        for offset, each in enumerate(new):
            model.graph.node.insert(place + offset, each)
    model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in made.items())


def _session(graph: bytes, threads: int, fixed: int | None, without: list[str]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # The next session's turn.
    if fixed:
        options.add_free_dimension_override_by_name(BATCH, fixed)
    return onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"], disabled_optimizers=without)


def compare(graph: bytes, batch: int, threads: int, seconds: float) -> list[list[str]]:
    scaled = _edited(graph, one_scale_and_bias)
    forms: Mapping[str, tuple[bytes, int | None, list[str]]] = {
        "stored": (graph, None, []),
        "stored, again": (graph, None, []),
        "attention as one operator": (with_attention(graph), None, []),
        "fixed batch": (graph, batch, []),
        "constant shapes": (_edited(graph, constant_shapes), None, []),
        "norms as LayerNormalization": (_edited(graph, layer_norms), None, []),
        "scale and bias in one": (scaled, None, []),
        "attention, scale and bias": (with_attention(scaled), None, []),
        "without blocked layout": (graph, None, ["NchwcTransformer"]),
    }
    sessions = {name: _session(form[0], threads, form[1], form[2]) for name, form in forms.items()}
    numbers = np.random.default_rng(0)
    given = {
        each.name: numbers.standard_normal((batch, *each.shape[1:])).astype(np.float32)
        for each in sessions["stored"].get_inputs()
    }
    results = {name: np.asarray(session.run(None, given)[0]) for name, session in sessions.items()}
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in forms}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["stored"]) < 11:
        turn = len(times["stored"]) % len(forms)
        for name in [*list(forms)[turn:], *list(forms)[:turn]]:
            begun = clock()
            sessions[name].run(None, given)
            times[name].append(clock() - begun)
    return [
        [
            name,
            f"{1e3 * statistics.median(taken):.2f}",
            f"{statistics.median(a / b for a, b in zip(times['stored'], taken, strict=True)):.3f}",
            f"{np.abs(results[name] - results['stored']).max():.1e}",
            str(len(taken)),
        ]
        for name, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each case (default: 60)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, batches in CASES:
            graph = partition(open_subject(name, folder=Path(folder)).exported).graphs.step
            for batch in batches:
                for threads in options.threads:
                    for row in compare(graph, batch, threads, options.seconds):
                        rows.append([name, str(batch), str(threads), *row])
                        print(*rows[-1], sep="  ", flush=True)
    facts = environment()
    header = ["network", "batch", "threads", "form", "ms a step", "times as fast", "off by at most", "rounds"]
    write_json(options.out, {"commit": facts["commit"], "environment": facts, "header": header, "rows": rows})


if __name__ == "__main__":
    main()

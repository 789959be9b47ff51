"""What else a CPU might gain, each beside what is: `python -m skipstep.bench.cpu_trial TRIAL --out FILE`.

    graph        Winograd's F(4x4, 3x3) of wide convolutions in standard operators; a batch split over two sessions
    width        the shipped network's 24-channel layers with 32 channels: what padding them could gain at most
    throughput   calls a second from 1 to 16 threads, beside OpenVINO with its throughput hint

Runs take turns within a round; medians over rounds, wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from skipstep import load
from skipstep.backends.openvino_library import core
from skipstep.bench.contenders.runtimes import ddim
from skipstep.bench.measurements import throughput
from skipstep.bench.models import open_subject
from skipstep.bench.quality.train_unet import Recipe, _Classes, write_diffusers_folder
from skipstep.bench.record import environment, write_json
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.export.partition import partition

_INPUT = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
     [0, 4, 0, -5, 0, 1]]
)  # fmt: skip
_WEIGHT = np.array(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
) / 24  # fmt: skip
_OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def _over_a_side(side: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Matrices of a row: from `side` pixels, with a zero at both ends, to six values a tile; and from those back."""
    tiles = side // 4
    to, back = np.zeros((6 * tiles, side + 2)), np.zeros((side, 6 * tiles))
    for tile in range(tiles):
        to[6 * tile : 6 * tile + 6, 4 * tile : 4 * tile + 6] = _INPUT
        back[4 * tile : 4 * tile + 4, 6 * tile : 6 * tile + 6] = _OUTPUT
    return to[:, 1:-1].astype(np.float32), back.astype(np.float32)


def winograd(graph: bytes, sides: tuple[int, ...], channels: int) -> tuple[bytes, int]:
    """The graph with Winograd's algorithm for 3x3 convolutions of so many channels or more; how many there are."""
    model, fixed = onnx.load_from_string(graph), onnx.load_from_string(graph)
    for each in fixed.graph.input:
        each.type.tensor_type.shape.dim[0].dim_value = 1
    del fixed.graph.value_info[:]
    typed = shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in typed.value_info}
    held = {each.name: each for each in model.graph.initializer}
    constants: dict[str, NDArray[Any]] = {}
    nodes, found = [], 0
    for node in model.graph.node:
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        weight = numpy_helper.to_array(held[node.input[1]]) if node.op_type == "Conv" else np.empty(0)
        side = shapes.get(node.input[0], [0])[-1] if node.op_type == "Conv" else 0
        plain = settings.get("strides", [1, 1]) == [1, 1] and settings.get("pads") == [1, 1, 1, 1]
        if not (plain and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= channels and side in sides):
            nodes.append(node)
            continue
        found += 1
        (rows, columns), tiles, name = weight.shape[:2], side // 4, node.output[0]
        to, back = _over_a_side(side)
        made = np.einsum("ia,kcab,jb->ijkc", _WEIGHT, weight.astype(np.float64), _WEIGHT).reshape(36, rows, columns)
        constants |= {f"{name}/weight": made.astype(np.float32), f"{side}/to": to, f"{side}/to/t": to.T.copy()}
        constants |= {f"{side}/back": back, f"{side}/back/t": back.T.copy()}
        for label, shape in (
            ("a", [-1, columns, tiles, 6, tiles, 6]),
            ("b", [36, columns, -1]),
            ("c", [6, 6, rows, -1, tiles, tiles]),
            ("d", [-1, rows, 6 * tiles, 6 * tiles]),
        ):
            constants[f"{name}/{label}"] = np.array(shape, np.int64)
        steps: list[tuple[str, list[str], dict[str, Any]]] = [
            ("MatMul", [node.input[0], f"{side}/to/t"], {}),
            ("MatMul", [f"{side}/to", ""], {}),
            ("Reshape", ["", f"{name}/a"], {}),
            ("Transpose", [""], {"perm": [3, 5, 1, 0, 2, 4]}),
            ("Reshape", ["", f"{name}/b"], {}),
            ("MatMul", [f"{name}/weight", ""], {}),
            ("Reshape", ["", f"{name}/c"], {}),
            ("Transpose", [""], {"perm": [3, 2, 4, 0, 5, 1]}),
            ("Reshape", ["", f"{name}/d"], {}),
            ("MatMul", ["", f"{side}/back/t"], {}),
            ("MatMul", [f"{side}/back", ""], {}),
        ]
        if len(node.input) == 3:
            constants[f"{name}/bias"] = numpy_helper.to_array(held[node.input[2]]).reshape(-1, 1, 1)
            steps.append(("Add", ["", f"{name}/bias"], {}))
        last = ""
        for number, (kind, given, options) in enumerate(steps):
            output = name if number == len(steps) - 1 else f"{name}/{number}"
            nodes.append(helper.make_node(kind, [each or last for each in given], [output], name=output, **options))
            last = output
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return model.SerializeToString(), found


def _session(graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # The next one's turn.
    return onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])


Form = Callable[[], NDArray[Any]]


def _form(graph: bytes, given: Mapping[str, NDArray[Any]], threads: int, sessions: int = 1) -> Form:
    size = len(next(iter(given.values()))) // sessions
    made = [_session(graph, threads // sessions) for _ in range(sessions)]
    parts = [{key: value[i * size : (i + 1) * size] for key, value in given.items()} for i in range(sessions)]
    if sessions == 1:
        return lambda: np.asarray(made[0].run(None, parts[0])[0])
    pool = ThreadPoolExecutor(sessions)
    return lambda: np.concatenate(list(pool.map(lambda session, part: session.run(None, part)[0], made, parts)))


def _in_turns(forms: Mapping[str, Form], seconds: float) -> list[list[str]]:
    first = next(iter(forms))
    results = {name: form() for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[first]) < 7:
        turn = len(times[first]) % len(forms)
        for name in [*list(forms)[turn:], *list(forms)[:turn]]:
            begun = time.perf_counter()
            forms[name]()
            times[name].append(time.perf_counter() - begun)
    rows = []
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[first], taken, strict=True))
        same = results[name].shape == results[first].shape
        largest = np.abs(results[first]).max()
        off = f"{np.abs(results[name] - results[first]).max() / largest:.1e}" if same else ""
        rows.append([name, f"{1e3 * statistics.median(taken):.2f}", f"{ratio:.3f}", off, str(len(taken))])
    return rows


def _random_inputs(graph: bytes, batch: int) -> dict[str, NDArray[Any]]:
    numbers = np.random.default_rng(0)
    return {
        each.name: numbers.standard_normal((batch, *each.shape[1:])).astype(np.float32)
        for each in _session(graph, 1).get_inputs()
    }


def graphs(folder: Path, seconds: float) -> list[list[str]]:
    rows = []
    for model, batches in (("cifar10-architecture", (1, 4, 8, 16)), ("fashion-mnist", (4, 16))):
        step = partition(open_subject(model, folder=folder).exported).graphs.step
        for batch in batches:
            given = _random_inputs(step, batch)
            forms = {"stored": _form(step, given, 2), "stored, again": _form(step, given, 2)}
            for sides in ((16,), (8, 16)):
                graph, found = winograd(step, sides, 256)
                if found:
                    sizes = " and ".join(f"{side}x{side}" for side in sides)
                    forms[f"Winograd at {sizes}, 256 channels ({found})"] = _form(graph, given, 2)
            if batch > 1:
                forms["two sessions of a thread each"] = _form(step, given, 2, sessions=2)
            for row in _in_turns(forms, seconds):
                rows.append([model, str(batch), *row])
                print(*rows[-1], sep="  ", flush=True)
    return rows


def widths(folder: Path, seconds: float) -> list[list[str]]:
    steps = {}
    for width in (24, 32):
        recipe = Recipe((width, 48, 128), "v_prediction", has_classes=True)
        torch.manual_seed(0)
        path = folder / f"width-{width}"
        write_diffusers_folder(_Classes(recipe).unet, recipe, path)
        steps[width] = partition(open_subject(str(path), folder=folder).exported).graphs.step
    rows = []
    for batch in (1, 4, 16):
        forms = {f"{width} channels": _form(step, _random_inputs(step, batch), 2) for width, step in steps.items()}
        for row in _in_turns(forms, seconds):
            rows.append(["fashion-mnist's shape", str(batch), *row])
            print(*rows[-1], sep="  ", flush=True)
    return rows


def throughputs(folder: Path, seconds: float) -> list[list[str]]:
    subject = open_subject("fashion-mnist", folder=folder)
    plan, conditioning = subject.plan(10), {"class_labels": np.array([3])}
    model = core().read_model(subject.exported)
    model.reshape({each: [1, *list(each.partial_shape)[1:]] for each in model.inputs})
    compiled = core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"})
    own = threading.local()
    x_t = np.random.default_rng(0).standard_normal((1, *subject.spec.sample_shape)).astype(np.float32)

    def network(given: dict[str, Any]) -> NDArray[Any]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        own.request.infer(given, share_inputs=True)
        return np.asarray(own.request.get_output_tensor(0).data)

    draws: dict[str, Callable[[], object]] = {
        "OpenVINO, throughput hint": lambda: ddim(network, plan, x_t, conditioning, subject.spec.timestep_dtype)
    }
    for backend in ("onnxruntime", "openvino"):
        engine = load(SHIPPED_BUNDLE, device="cpu", backend=backend, precision="float32")
        draws[f"skipstep, {backend}"] = partial(engine.sample, steps=10, seeds=[0], class_labels=[3])
    rows = []
    for callers in (1, 2, 4, 8, 16):
        rates: dict[str, list[float]] = {name: [] for name in draws}
        for _ in range(5):
            for name, draw in draws.items():
                time.sleep(0.1)
                rates[name].append(throughput(draw, callers=callers, seconds=seconds / 5)["calls_per_second"])
        for name, each in rates.items():
            rows.append([str(callers), name, f"{statistics.median(each):.1f}"])
            print(*rows[-1], sep="  ", flush=True)
    return rows


FORM_HEADER = ["network", "batch", "form", "ms a step", "times as fast", "off by, of the largest magnitude", "rounds"]
TRIALS: Mapping[str, tuple[Callable[[Path, float], list[list[str]]], list[str], str]] = {
    "graph": (graphs, FORM_HEADER, "One step of the network, two threads; forms take turns in every round; medians."),
    "width": (widths, FORM_HEADER, "One step of networks of the shipped shape, random weights, two threads; medians."),
    "throughput": (
        throughputs,
        ["threads that call", "what", "calls a second"],
        "Ten steps of the shipped network in float32, batch 1, two cores; medians over five turns.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    options = parser.parse_args()
    measure, header, note = TRIALS[options.trial]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.seconds)
    facts = environment()
    command = f"python -m skipstep.bench.cpu_trial {options.trial} --out {options.out.name}"
    found = {"command": command, "commit": facts["commit"], "environment": facts, "header": header, "rows": rows}
    write_json(options.out, {**found, "note": note})


if __name__ == "__main__":
    main()

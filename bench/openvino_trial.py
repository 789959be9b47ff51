"""OpenVINO beside ONNX Runtime on the step network: `python -m skipstep.bench.openvino_trial --out FILE`.

Needs `pip install openvino`. Each runtime has a process to itself, so that neither's waiting threads take the other's
cores, and processes take turns. OpenVINO is asked for float32 and for bfloat16; what it then runs in is what the
processor has, and is recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from skipstep.backends.torch import prepare_module
from skipstep.bench.models import MODELS
from skipstep.bench.record import write_json
from skipstep.export.onnx_model import export_onnx
from skipstep.export.partition import partition
from skipstep.networks.spec import NetworkSpec

_TIMING = """
import json, statistics, sys, time
import numpy as np
path, runs = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
{prepare}
run()
times = []
for _ in range(runs):
    started = time.perf_counter()
    result = run()
    times.append(time.perf_counter() - started)
np.save(sys.argv[3], result)
print(json.dumps([statistics.median(times), precision]))
"""
_ONNX_RUNTIME = """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
feeds = {i.name: rng.standard_normal([1, *i.shape[1:]], dtype=np.float32) for i in session.get_inputs()}
precision = "float32"
run = lambda: session.run(None, feeds)[0]
"""
_OPENVINO = """
import openvino
model = openvino.Core().read_model(path)
shapes = {{i.get_any_name(): [1, *(d.get_length() for d in list(i.partial_shape)[1:])] for i in model.inputs}}
model.reshape(shapes)
options = {{"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "{hint}"}}
compiled = openvino.Core().compile_model(model, "CPU", options)
precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
request = compiled.create_infer_request()
feeds = {{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}}
run = lambda: next(iter(request.infer(feeds).values()))
"""
_CONTENDERS = {
    "onnxruntime": _ONNX_RUNTIME,
    "openvino f32": _OPENVINO.format(hint="f32"),
    "openvino bf16": _OPENVINO.format(hint="bf16"),
}


def compare(name: str, folder: Path, *, rounds: int, runs: int) -> dict[str, Any]:
    """Median milliseconds of the network at batch 1 by contender, over processes that take turns."""
    import numpy as np

    model = MODELS[name]()
    spec = NetworkSpec.of_module(model.unet, null_label=10 if model.conditional else None)
    module, spec = prepare_module(model.unet, spec)
    graph = folder / f"{name}.onnx"
    graph.write_bytes(partition(export_onnx(module, spec)).graphs.step)
    times: dict[str, list[float]] = {contender: [] for contender in _CONTENDERS}
    precisions, results = {}, {}
    for _ in range(rounds):
        for contender, prepare in _CONTENDERS.items():
            output = folder / "result.npy"
            command = [sys.executable, "-c", _TIMING.format(prepare=prepare), str(graph), str(runs), str(output)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, precisions[contender] = json.loads(printed.splitlines()[-1])
            times[contender].append(seconds * 1e3)
            results[contender] = np.load(output)
    reference = results["onnxruntime"]
    return {
        "model": name,
        "milliseconds": {contender: statistics.median(found) for contender, found in times.items()},
        "ran_in": precisions,
        "largest_difference": {
            contender: float(np.abs(found - reference).max() / np.abs(reference).max())
            for contender, found in results.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(name, Path(folder), rounds=5, runs=20) for name in MODELS]
    write_json(options.out, {"networks": results})


if __name__ == "__main__":
    main()

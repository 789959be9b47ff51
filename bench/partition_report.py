"""What leaves the loop of each benchmark network: `python -m skipstep.bench.partition_report --out FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from skipstep.backends.torch import prepare_module
from skipstep.bench.models import MODELS
from skipstep.bench.record import write_json
from skipstep.export.onnx_model import export_onnx
from skipstep.export.partition import Binding, partition
from skipstep.network import NetworkSpec


def describe(name: str) -> dict[str, Any]:
    """Nodes and megabytes by binding time, and the values that cross into the loop."""
    model = MODELS[name]()
    spec = NetworkSpec.of_module(model.unet, null_label=10 if model.conditional else None)
    prepared, spec = prepare_module(model.unet, spec, device=torch.device("cpu"), dtype=torch.float32)
    parts = partition(export_onnx(prepared, spec))
    graphs = {"plan": parts.graphs.plan, "call": parts.graphs.call, "step": parts.graphs.step}
    return {
        "model": name,
        "nodes": {binding.name.lower(): parts.num_nodes[binding] for binding in Binding if binding in parts.num_nodes},
        "megabytes": {part: round(len(graph or b"") / 1e6, 2) for part, graph in graphs.items()},
        "tables": len(parts.tables),
        "conditions": len(parts.conditions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    write_json(options.out, {"networks": [describe(name) for name in MODELS]})


if __name__ == "__main__":
    main()

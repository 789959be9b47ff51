"""What leaves the loop of each benchmark network: `python -m skipstep.bench.partition_report --out FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipstep.backends.torch import prepare_module
from skipstep.bench.models import ALL_MODELS
from skipstep.bench.record import write_json
from skipstep.export.graph_cost import costs_as_json, partition_costs
from skipstep.export.onnx_model import export_onnx
from skipstep.export.partition import partition
from skipstep.networks.spec import NetworkSpec


def describe(name: str) -> dict[str, Any]:
    """Nodes, operations and bytes by binding time (skipstep.export.graph_cost)."""
    model = ALL_MODELS[name]()
    spec = NetworkSpec.of_module(
        model.unet, null_label=10 if model.conditional else None, prompt_shape=model.prompt_shape
    )
    prepared, spec = prepare_module(model.unet, spec)
    parts = partition(export_onnx(prepared, spec))
    return {"model": name, "parts": costs_as_json(partition_costs(parts))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    write_json(options.out, {"networks": [describe(name) for name in ALL_MODELS]})


if __name__ == "__main__":
    main()

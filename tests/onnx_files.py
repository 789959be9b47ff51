"""Networks as other people's .onnx files: exported by either of torch's exporters, under names of their own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_networks import tiny_text_unet
from torch import nn

from skipstep.backends.torch import DenoisingModule

WEIGHT = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8) / 64


def text_unet(**options: Any) -> nn.Module:
    """A diffusers UNet for 2×8×8 that attends to prompts of width 6, with the same random weights every time."""
    sizes = {"in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16)}
    return tiny_text_unet(**{**sizes, "cross_attention_dim": 6, "attention_head_dim": 4, **options})


def write_onnx(
    path: Path,
    network: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    graph_exporter: bool = False,
    opset: int = 17,
    external: bool = False,
    output: str = "out",
) -> Path:
    """Export a network called with these inputs; `dynamic` names dimensions. `graph_exporter`: torch's newer one."""
    module = DenoisingModule(network).eval()
    given: dict[str, Any] = {"input_names": list(inputs), "output_names": [output], "opset_version": opset}
    if graph_exporter:
        dims = {name: torch.export.Dim(name, min=1) for each in (dynamic or {}).values() for name in each.values()}
        shapes = [{axis: dims[name] for axis, name in (dynamic or {}).get(each, {}).items()} or None for each in inputs]
        rest = (tuple(shapes[2:]),) if shapes[2:] else ()
        given |= {"dynamic_shapes": (*shapes[:2], *rest) if dynamic else None, "external_data": external}
    else:
        given["dynamic_axes"] = {name: dict(axes) for name, axes in (dynamic or {}).items()}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, tuple(inputs.values()), str(path), dynamo=graph_exporter, verbose=False, **given)
    finally:
        logging.disable(logging.NOTSET)
    return path


def batch_axes(names: Sequence[str]) -> dict[str, dict[int, str]]:
    return {name: {0: "n"} for name in names}


def small_model(*, opset: int = 17, domain: str = "", op_type: str = "Mul", batch: int | str = "n") -> onnx.ModelProto:
    """x · weight + t, with the weight as an initializer; written without torch."""
    state = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 8, 8])
    timestep = helper.make_tensor_value_info("t", TensorProto.FLOAT, [batch, 1, 1, 1])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 1, 8, 8])
    nodes = [
        helper.make_node(op_type, ["x", "weight"], ["scaled"], domain=domain),
        helper.make_node("Add", ["scaled", "t"], ["out"]),
    ]
    graph = helper.make_graph(nodes, "net", [state, timestep], [out], [numpy_helper.from_array(WEIGHT, "weight")])
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=domains, ir_version=8)

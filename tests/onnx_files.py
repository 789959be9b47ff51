"""Networks as other people's .onnx files: exported by either of torch's exporters, under names of their own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipstep.backends.torch import DenoisingModule


def text_unet(**options: Any) -> nn.Module:
    """A diffusers UNet for 2×8×8 that attends to prompts of width 6, with the same random weights every time."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: nn.Module = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 6,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **options,
        }
    )
    return unet.eval()


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

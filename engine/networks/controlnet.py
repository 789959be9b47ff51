"""ControlNets beside a network: their folders, and what they make a call pass: a picture for each, and its weight.

Network and ControlNets are one module (skipstep.pipelines.modules.Controlled), so the partition moves what follows from
the pictures alone out of the loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from skipstep.errors import InputError, ModelFormatError, check_integer, check_path, shown
from skipstep.networks.condition import Condition
from skipstep.networks.spec import NetworkSpec
from skipstep.networks.weights import DOWNLOAD, find_weights, tensor_shapes
from skipstep.storage.untrusted import read_json_object

if TYPE_CHECKING:
    from skipstep.networks.checkpoint import Checkpoint

# The conditions: a picture for each ControlNet, numbered, and the weights of all.
CONTROL_IMAGE: Final = "control_image"
CONTROL_SCALE: Final = "controlnet_conditioning_scale"
_CLASS: Final = "ControlNetModel"
_MOST: Final = 8
# Where these differ from the network's, what a ControlNet gives does not fit into it.
_SHARED: Final = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")


def read_controlnets(given: Any, network: Checkpoint) -> tuple[Checkpoint, ...]:
    """One folder or several, checked, and no weight is loaded. Raises InputError, ModelFormatError and
    UnsafeCheckpointError."""
    if given is None:
        return ()
    folders = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(folders, list | tuple) or not 1 <= len(folders) <= _MOST:
        raise InputError(
            got=f"controlnet={shown(given)}",
            expected=f"the folder of a ControlNet, or a list of up to {_MOST}",
            remedy="pass controlnet='sd-controlnet-canny/'",
        )
    return tuple(_read(Path(check_path("controlnet", folder)), network) for folder in folders)


def _read(folder: Path, network: Checkpoint) -> Checkpoint:
    config = read_json_object(folder / "config.json", remedy=DOWNLOAD)
    if config.get("_class_name") != _CLASS:
        raise ModelFormatError(
            got=f"_class_name={shown(config.get('_class_name'))} in {folder / 'config.json'}",
            expected=_CLASS,
            remedy="pass the folder of such a ControlNet",
        )
    for key in _SHARED:
        own, other = config.get(key), network.unet_config.get(key)
        if own != other and own is not None and other is not None:
            raise ModelFormatError(
                got=f"{key}={shown(own)} in {folder}",
                expected=f"that of the network, {shown(other)}",
                remedy="pass a ControlNet that was trained with this family of networks",
            )
    weights = find_weights(folder)
    for path in weights:
        tensor_shapes(path)
    return replace(network, folder=folder, class_name=_CLASS, unet_config=config, weights=weights, scheduler=None)


def with_controls(network: NetworkSpec, nets: Sequence[Checkpoint]) -> NetworkSpec:
    """The network with the conditions of its ControlNets."""
    if not nets:
        return network
    found = dict(network.conditions)
    for i, net in enumerate(nets):
        remedy = f"correct config.json in {net.folder}"
        channels = check_integer(
            "conditioning_channels", net.unet_config.get("conditioning_channels", 3), low=1, high=64, remedy=remedy
        )
        # Each block of the picture's embedding but the first halves it: three where the configuration says nothing.
        blocks = net.unet_config.get("conditioning_embedding_out_channels", [16, 32, 96, 256])
        halvings = len(blocks) - 1 if isinstance(blocks, list) and 1 <= len(blocks) <= 8 else -1
        factor = 2 ** check_integer("conditioning_embedding_out_channels", halvings, low=0, remedy=remedy)
        sides = (side * factor for side in network.sample_shape[1:])
        found[f"{CONTROL_IMAGE}_{i}"] = Condition((channels, *sides), null="same")
    found[CONTROL_SCALE] = Condition((len(nets),), null="same")
    return replace(network, conditions=found)


def control_names(conditions: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Those of the pictures, in the order of the ControlNets."""
    return [name for name in conditions if name.startswith(f"{CONTROL_IMAGE}_")]

"""LoRA files: low-rank updates of the layers of a pipeline's networks.

Files of diffusers and PEFT ("unet.….to_q.lora_A.weight") and of kohya ("lora_unet_…_to_q.lora_down.weight" with
"….alpha") name the same layers: they differ in dots and underscores, and SDXL's in the names of the original code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from skipstep.errors import InputError, ModelFormatError, check_items, check_number, check_path
from skipstep.networks.weights import DOWNLOAD, tensor_shapes
from skipstep.reporting import LOGGER

NETWORK, TEXTS = "unet", ("text_encoder", "text_encoder_2")
Lora = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
Shape = tuple[int, ...]
Array = NDArray[np.float32]
# The path and the shape of layers, by what files call them.
Named = Mapping[str, tuple[str, Shape]]
# What layers of a part are called before their own names.
_PREFIXES: Final = {
    "lora_unet_": NETWORK, "lora_te1_": TEXTS[0], "lora_te2_": TEXTS[1], "lora_te_": TEXTS[0],
    "text_encoder_2.": TEXTS[1], "text_encoder.": TEXTS[0],
    "unet.": NETWORK, "transformer.": NETWORK, "base_model.model.": NETWORK,
}  # fmt: skip
_FACTOR: Final = re.compile(r"(.+)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight")
# bfloat16 is the upper half of float32.
_STORED: Final = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16}
# Of UNets, and what the original code of latent diffusion calls their layers outside of blocks and inside of resnets.
_BLOCK: Final = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
_OUTER: Final = {
    "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2",
    "conv_in": "input_blocks_0_0", "conv_out": "out_2",
}  # fmt: skip
_INNER: Final = {
    "conv1": "in_layers_2", "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Update:
    """Of one layer: down `[rank, in, …]`, up `[out, rank, …]`; `factor` is scale · alpha / rank."""

    name: str
    down: Array
    up: Array
    factor: float

    def fits(self, shape: Shape) -> bool:
        rank = len(self.down)
        return (_plain(self.down.shape), _plain(self.up.shape)) == (_plain((rank, *shape[1:])), (shape[0], rank))


@dataclass(frozen=True, slots=True)
class LoraFile:
    """`parts`: the updates of a pipeline's part by a layer's flat name. `digest` is over the file and the scale, where
    it was asked for."""

    path: str
    digest: bytes
    parts: Mapping[str, Mapping[str, Update]]


def read_loras(loras: Iterable[Lora], *, digests: bool = True) -> list[LoraFile]:
    """Raises InputError for what is no list of files with scales, ModelFormatError for files of other contents."""
    expected, remedy = "(path, scale) pairs", "pass [('style.safetensors', 0.8)]"
    found = []
    for each in check_items("loras", loras, expected=expected, remedy=remedy):
        pair = each if isinstance(each, tuple | list) else (each, 1.0)
        if len(pair) != 2:
            raise InputError(got=f"a tuple of {len(pair)} in loras", expected=expected, remedy=remedy)
        path = check_path("loras", pair[0])
        scale = check_number(f"scale of {path}", pair[1], remedy=remedy)
        found.append(_read(Path(path), scale, digests))
    return found


def _read(path: Path, scale: float, digests: bool) -> LoraFile:
    if not path.is_file() or path.suffix != ".safetensors":
        raise ModelFormatError(
            got=f"{path} as a LoRA", expected="a .safetensors file; pickles run code and are not read", remedy=DOWNLOAD
        )
    tensor_shapes(path)
    data = path.read_bytes()
    try:
        tensors = {name: _array(**stored) for name, stored in deserialize(data)}  # type: ignore[no-untyped-call]
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        factors, alphas = _sorted(tensors)
        parts: dict[str, dict[str, Update]] = {}
        for name, pair in factors.items():
            down, up = pair["down"], pair["up"]
            part, own = _part(name)
            alpha = alphas.get(name)
            share = alpha / len(down) if alpha is not None else _stated(config, name, len(down))
            parts.setdefault(part, {})[_flat(own)] = Update(name, down, up, scale * share)
        broken = [each.name for part in parts.values() for each in part.values() if not _finite(each)]
    except (
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelFormatError(
            got=f"{path}: {type(error).__name__}: {error!s:.300}",
            expected="a LoRA: for each layer lora_A and lora_B, or lora_down and lora_up, and at most an alpha",
            remedy="convert it, or fuse it with the tool that made it",
        ) from error
    if not parts or broken:
        raise ModelFormatError(
            got=f"{path} with NaN or infinity in {_some(broken)}" if broken else f"{path} without any LoRA layer",
            expected="finite low-rank updates",
            remedy=DOWNLOAD,
        )
    return LoraFile(str(path), hashlib.sha256(data).digest() + repr(scale).encode() if digests else b"", parts)


def _array(dtype: str, shape: Sequence[int], data: bytes) -> Array:
    """A tensor's values, with NumPy alone: it has one thread, and this is done between calls."""
    stored = np.frombuffer(data, _STORED[dtype]).reshape(shape)
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else stored.astype(np.float32)


def _sorted(tensors: Mapping[str, Array]) -> tuple[dict[str, dict[str, Array]], dict[str, float]]:
    """The two factors and the alphas, by layer. Raises ValueError for tensors that are neither."""
    factors: dict[str, dict[str, Array]] = {}
    alphas = {}
    for name, tensor in tensors.items():
        known = _FACTOR.fullmatch(name)
        if known is not None:
            side = {"A": "down", "B": "up"}.get(known[2], known[2])
            factors.setdefault(known[1], {})[side] = tensor
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            raise ValueError(f"a tensor {name!r:.120}, which is no factor of a LoRA (DoRA, LoHa and LoKr are not read)")
    alone = [name for name, pair in factors.items() if len(pair) < 2]
    if alone:
        raise ValueError(f"one factor alone, of {_some(alone)}")
    return factors, alphas


def _stated(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank as diffusers' metadata has it; 1 where there is none."""
    prefix = name.split(".")[0]
    said = {key.removeprefix(f"{prefix}."): value for key, value in config.items() if key.startswith(f"{prefix}.")}
    if said.get("use_dora"):
        raise ValueError("a DoRA")
    patterns = said.get("alpha_pattern") or {}
    own = (each for pattern, each in patterns.items() if f".{name}".endswith("." + pattern.removeprefix("^")))
    alpha = float(next(own, said.get("lora_alpha") or rank))
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _finite(update: Update) -> bool:
    return math.isfinite(update.factor) and all(math.isfinite(each.sum()) for each in (update.down, update.up))


def _part(name: str) -> tuple[str, str]:
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return NETWORK, name


def _flat(name: str) -> str:
    return name.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")


def check_parts(files: Sequence[LoraFile], parts: Collection[str]) -> None:
    """Raise InputError for files that update other parts than these. A network alone leaves the text encoders' out."""
    for file in files:
        others = [part for part in file.parts if part not in parts]
        if others and (len(parts) > 1 or NETWORK not in file.parts):
            raise InputError(
                got=f"{file.path}, which updates {', '.join(others)}",
                expected=f"updates of {', '.join(parts)}",
                remedy="use a LoRA that was trained for this pipeline, and build the engine from the pipeline's folder",
            )
        if others:
            LOGGER.warning("%s also updates %s: encode the prompts with it", file.path, ", ".join(others))


def fit(files: Sequence[LoraFile], part: str, layers: Named) -> dict[str, list[Update]]:
    """The updates of a part by its layers' own names, `layers` by those of files. Raises InputError with what does not
    fit."""
    found: dict[str, list[Update]] = {}
    for file in files:
        updates = file.parts.get(part, {})
        known = {each if each in layers else f"{each}_0": update for each, update in updates.items()}
        unknown = [update.name for name, update in known.items() if name not in layers]
        misfits = []
        for name, update in known.items():
            if name in layers and not update.fits(layers[name][1]):
                has = len(update.up), *update.down.shape[1:]
                misfits.append(f"{update.name}, {has} for {layers[name][1]}")
            elif name in layers:
                found.setdefault(layers[name][0], []).append(update)
        if unknown or misfits:
            counted = ((unknown, "not there"), (misfits, "of another shape"))
            raise InputError(
                got=f"{file.path}, which does not fit: of {len(updates)} layers of the {part} that it updates "
                + " and ".join(f"{len(names)} are {why} ({_some(names)})" for names, why in counted if names),
                expected="updates of layers that can be changed here",
                remedy="use a LoRA that was trained for this network; where it was, name it in loras= of Engine.build, "
                "which then makes its layers ready",
            )
    return found


def named(layers: Mapping[str, Shape]) -> Named:
    """Path and shape of each layer, by what files call it: the path, or the name in the original code of latent
    diffusion, whose blocks are counted through."""
    found = {_flat(path): path for path in layers} | {_OUTER[path]: path for path in layers if path in _OUTER}
    per_block = 1 + len({path.split(".")[3] for path in layers if path.startswith("down_blocks.0.resnets.")})
    for path in layers:
        parts = _BLOCK.fullmatch(path)
        if parts is None:
            continue
        side, kind, rest = parts[1], parts[3], _flat(parts[5])
        attention, sampler, place = kind == "attentions", kind.endswith("samplers"), int(parts[4])
        if kind == "resnets":
            rest = _INNER.get(rest, rest)
        at = int(parts[2] or 0) * per_block + (per_block - 1 if sampler else place)
        if side == "mid":
            block = f"middle_block_{1 if attention else 2 * place}"
        elif side == "down":
            block, rest = f"input_blocks_{1 + at}_{attention:d}", "op" if sampler else rest
        else:
            after = 1 + (f"up_blocks.{parts[2]}.attentions.0.proj_in" in layers)
            block = f"output_blocks_{at}_{after if sampler else int(attention)}"
        found[f"{block}_{rest}"] = path
    return {name: (path, layers[path]) for name, path in found.items()}


def _plain(shape: Shape) -> Shape:
    """Without the sides of a kernel of one element."""
    return tuple(shape[:2] if math.prod(shape[2:]) == 1 else shape)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")

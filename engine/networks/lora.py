"""LoRA files: low-rank updates of the layers of a pipeline's networks. Needs torch.

Files of diffusers and PEFT ("unet.….to_q.lora_A.weight") and of kohya ("lora_unet_…_to_q.lora_down.weight" with
"….alpha") name the same layers: they differ in dots and underscores, and SDXL's in the names of the original code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from skipstep.errors import InputError, ModelFormatError, check_items, check_number, check_path
from skipstep.networks.weights import DOWNLOAD, tensor_shapes
from skipstep.reporting import LOGGER

NETWORK, TEXTS = "unet", ("text_encoder", "text_encoder_2")
Lora = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
Shape = tuple[int, ...]
# What layers of a part are called before their own names.
_PREFIXES: Final = {
    "lora_unet_": NETWORK, "lora_te1_": TEXTS[0], "lora_te2_": TEXTS[1], "lora_te_": TEXTS[0],
    "text_encoder_2.": TEXTS[1], "text_encoder.": TEXTS[0],
    "unet.": NETWORK, "transformer.": NETWORK, "base_model.model.": NETWORK,
}  # fmt: skip
_FACTOR: Final = re.compile(r"(.+)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight")


@dataclass(frozen=True, slots=True)
class Update:
    """Of one layer: down `[rank, in, …]`, up `[out, rank, …]`; `factor` is scale · alpha / rank."""

    name: str
    down: Tensor
    up: Tensor
    factor: float

    @property
    def size(self) -> Shape:
        """Of what it updates."""
        return len(self.up), *self.down.shape[1:]

    def fits(self, shape: Shape) -> bool:
        rank, more = len(self.down), (1,) * len(shape)
        down, up = ((*each.shape, *more)[: len(shape)] for each in (self.down, self.up))
        sizes = rank * math.prod(shape[1:]), rank * shape[0]
        return (down, up) == ((rank, *shape[1:]), (shape[0], rank, *more[2:])) and sizes == (
            self.down.numel(),
            self.up.numel(),
        )


@dataclass(frozen=True, slots=True)
class LoraFile:
    """`parts`: the updates of a pipeline's part by a layer's flat name. `digest` is over the file and the scale."""

    path: str
    digest: bytes
    parts: Mapping[str, Mapping[str, Update]]


def read_loras(loras: Iterable[Lora]) -> list[LoraFile]:
    """Raises InputError for what is no list of files with scales, ModelFormatError for files of other contents."""
    expected, remedy = "(path, scale) pairs", "pass [('style.safetensors', 0.8)]"
    found = []
    for each in check_items("loras", loras, expected=expected, remedy=remedy):
        pair = each if isinstance(each, tuple) else (each, 1.0)
        if len(pair) != 2:
            raise InputError(got=f"a tuple of {len(pair)} in loras", expected=expected, remedy=remedy)
        path = check_path("loras", pair[0])
        found.append(_read(Path(path), check_number(f"scale of {path}", pair[1], remedy=remedy)))
    return found


def _read(path: Path, scale: float) -> LoraFile:
    if not path.is_file() or path.suffix != ".safetensors":
        raise ModelFormatError(
            got=f"{path} as a LoRA", expected="a .safetensors file; pickles run code and are not read", remedy=DOWNLOAD
        )
    tensor_shapes(path)
    data = path.read_bytes()
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        factors, alphas = _sorted(tensors)
        parts: dict[str, dict[str, Update]] = {}
        for name, pair in factors.items():
            down, up = (pair[each].float() for each in ("down", "up"))
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
    return LoraFile(str(path), hashlib.sha256(data).digest() + repr(scale).encode(), parts)


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """The two factors and the alphas, by layer. Raises ValueError for tensors that are neither."""
    factors: dict[str, dict[str, Tensor]] = {}
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
    return math.isfinite(update.factor) and all(bool(each.isfinite().all()) for each in (update.down, update.up))


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


def fit(files: Sequence[LoraFile], part: str, layers: Mapping[str, Shape]) -> dict[str, list[Update]]:
    """The updates of a part by the paths of its layers. Raises InputError with what does not fit."""
    paths = {name: path for path in layers for name in _names(path, layers)}
    found: dict[str, list[Update]] = {}
    for file in files:
        updates = file.parts.get(part, {})
        places = {name: paths.get(name, paths.get(f"{name}_0")) for name in updates}
        unknown = [updates[name].name for name, path in places.items() if path is None]
        misfits = []
        for name, path in places.items():
            if path is not None and not updates[name].fits(layers[path]):
                misfits.append(f"{updates[name].name}, {updates[name].size} for {layers[path]}")
            elif path is not None:
                found.setdefault(path, []).append(updates[name])
        if unknown or misfits:
            counted = ((unknown, "not there"), (misfits, "of another shape"))
            raise InputError(
                got=f"{file.path}, which does not fit: of {len(updates)} layers of the {part} that it updates "
                + " and ".join(f"{len(names)} are {why} ({_some(names)})" for names, why in counted if names),
                expected=f"updates of the {len(layers)} layers that can be changed here",
                remedy="use a LoRA that was trained for this network; where it was, name it in loras= of Engine.build, "
                "which then makes its layers ready",
            )
    return found


def _names(path: str, layers: Iterable[str]) -> Iterator[str]:
    """What files call a layer: its own path, and what the original code of latent diffusion calls it."""
    yield _flat(path)
    per_block = len({each.split(".")[3] for each in layers if each.startswith("down_blocks.0.resnets.")}) + 1
    outer = {"time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2"}
    outer |= {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
    outer |= {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
    inner = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3"}
    inner["conv_shortcut"] = "skip_connection"
    if path in outer:
        yield outer[path]
    found = re.fullmatch(
        r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|(?:down|up)samplers)\.(\d+)\.(.+)", path
    )
    if found is None:
        return
    side, block, kind, place, rest = found[1], int(found[2] or 0), found[3], int(found[4]), _flat(found[5])
    if kind == "resnets":
        rest = inner.get(rest, rest)
    if side == "mid":
        yield f"middle_block_{1 if kind == 'attentions' else 2 * place}_{rest}"
    elif side == "down":
        last = kind == "downsamplers"
        where = 1 + block * per_block + (per_block - 1 if last else place)
        yield f"input_blocks_{where}_{1 if kind == 'attentions' else 0}_{'op' if last else rest}"
    else:
        where = block * per_block + (per_block - 1 if kind == "upsamplers" else place)
        attends = any(each.startswith(f"up_blocks.{block}.attentions.") for each in layers)
        index = {"resnets": 0, "attentions": 1}.get(kind, 1 + attends)
        yield f"output_blocks_{where}_{index}_{rest}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")

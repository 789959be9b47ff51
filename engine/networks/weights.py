"""The weights of a network on disk: safetensors files, whole or in shards, whose headers are checked before anything is
loaded. A pickle runs code when it is loaded, so it is refused unread."""

from __future__ import annotations

import json
from pathlib import Path

from skipstep.errors import ModelFormatError, UnsafeCheckpointError
from skipstep.storage.untrusted import read_json_object

STEM = "diffusion_pytorch_model"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DOWNLOAD = "download it again"


def find_weights(unet: Path, name: str = STEM) -> tuple[Path, ...]:
    """The safetensors files of a network's folder, called `name`. Raises ModelFormatError, UnsafeCheckpointError."""
    for stem in (name, f"{name}.fp16"):
        if (unet / f"{stem}.safetensors").exists():
            return (unet / f"{stem}.safetensors",)
    for variant in ("", ".fp16"):
        index = unet / f"{name}.safetensors.index{variant}.json"
        if index.exists():
            return _shards(index)
    pickles = sorted(path for path in unet.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UnsafeCheckpointError(
            got=f"weights as a pickle, {pickles[0]}",
            expected=f"{name}.safetensors: a pickle runs code when it is loaded, so it was not opened",
            remedy='convert it once, where you trust the file: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{unet / name}.safetensors')\"",
        )
    raise ModelFormatError(
        got=f"no weights in {unet}",
        expected=f"{name}.safetensors",
        remedy="write the folder again with save_pretrained(), or complete the download",
    )


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json_object(index, remedy=DOWNLOAD).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFormatError(
            got=f"{index} without a weight_map", expected="a map from tensors to files", remedy=DOWNLOAD
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFormatError(
                got=f"the shard {name!r} in {index}",
                expected="the name of a .safetensors file in the same folder",
                remedy="do not use this checkpoint: its index points elsewhere",
            )
        if not (index.parent / name).exists():
            raise ModelFormatError(
                got=f"no shard {index.parent / name}",
                expected=f"all {len(names)} shards of {index.name}",
                remedy="complete the download",
            )
    return tuple(index.parent / name for name in names)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, after comparing its header with the size of the file: eight
    bytes of length, a JSON header, then the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _truncated(path, f"{size} bytes, fewer than its header")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = int(max((entry["data_offsets"][1] for entry in entries.values()), default=0))
            shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ModelFormatError(
                got=f"{path} with a header that is not that of a safetensors file",
                expected="a safetensors file",
                remedy="download it again, or write it with safetensors.torch.save_file",
            ) from error
    if size != 8 + length + end:
        raise _truncated(path, f"{size} bytes where its header says {8 + length + end}")
    return shapes


def _truncated(path: Path, size: str) -> ModelFormatError:
    return ModelFormatError(got=f"{path} with {size}", expected="a whole safetensors file", remedy=DOWNLOAD)

"""diffusers checkpoint folders, read without running anything that is in them.

    model_index.json        optional; its `id2label` names the classes, as in diffusers' DiTPipeline
    unet/config.json        the network's class and arguments; of transformers transformer/config.json
    unet/*.safetensors      its weights, in one file or in shards with an index
    scheduler/scheduler_config.json

A folder that holds config.json itself is taken as the network's folder alone; scheduler_config.json may lie beside it.
A single .safetensors file is taken with the folder of its configuration, `config`, or with the one that it lies in; the
names of its tensors may be those of the original latent-diffusion code (skipstep.networks.single_file).
Weights are safetensors or nothing: a pickle runs code when it is loaded, so it is refused unread.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.errors import InputError, ModelFormatError, check_integer, check_path, needs_packages, shown
from skipstep.networks.families import check_class, classes_in_table, prompt_tokens, prompt_width
from skipstep.networks.single_file import config_folder, is_original_layout, load_original
from skipstep.networks.weights import DOWNLOAD, find_weights, tensor_shapes
from skipstep.plans.scheduler_config import SchedulerConfig, read_scheduler_config
from skipstep.storage.untrusted import read_json_object

if TYPE_CHECKING:
    from torch import nn

# Where a pipeline's folder holds its network.
NETWORK_FOLDERS = ("unet", "transformer")
# Of a configuration's numbers, and of those that count layers or items.
_LARGEST_SIZE = 1 << 20
_MOST_LAYERS = 256


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder says about its network. `sample_shape` is what it reads, (C, H, W); `weights` are the safetensors
    files. `name` is that of the folder, or of a single file.

    `num_classes` counts the real classes. Where the network embeds one class more than `id2label` names, the last one
    is `null_label`, which stands for "no class"; without `id2label` every embedded class is real. `prompt_shape` is
    (tokens, width) of a text-conditional network's prompts.
    """

    folder: Path
    name: str
    class_name: str
    unet_config: Mapping[str, Any]
    weights: tuple[Path, ...]
    scheduler: SchedulerConfig | None
    sample_shape: tuple[int, ...]
    num_classes: int | None
    null_label: int | None
    class_names: tuple[str, ...] | None
    prompt_shape: tuple[int, int] | None

    def plan_options(self) -> dict[str, Any]:
        """The options of a step count's plan, empty where the folder has no scheduler configuration."""
        return {} if self.scheduler is None else self.scheduler.plan_options()

    def digest(self) -> str:
        """sha256 over the network's configuration and weights, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.unet_config, sort_keys=True).encode())
        for path in self.weights:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()


def read_checkpoint(
    folder: str | os.PathLike[str], *, scheduler: bool = True, config: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Read and check a folder, or a single file with the folder `config` of its configuration; neither torch nor
    diffusers is needed, and no weight is loaded.

    Without `scheduler` the scheduler's configuration is not read.
    Raises ModelFormatError, UnsafeCheckpointError (only a pickle is there) and ScheduleError.
    """
    given = Path(check_path("folder", folder))
    root = config_folder(given, config) if given.is_file() or given.suffix == ".safetensors" else given
    if config is not None and root is given:
        raise InputError(
            got=f"config={shown(config)} beside the folder {given}",
            expected="a configuration for a single .safetensors file; a folder has its own",
            remedy="leave config out",
        )
    if not root.is_dir():
        raise ModelFormatError(
            got=f"no folder {root}",
            expected="a folder written by diffusers' save_pretrained()",
            remedy="check the path",
        )
    places = (root, *(root / name for name in NETWORK_FOLDERS))
    unet = next((place for place in places if (place / "config.json").exists()), None)
    if unet is None:
        raise ModelFormatError(
            got=f"the folder {root} without config.json, {' or '.join(f'{n}/config.json' for n in NETWORK_FOLDERS)}",
            expected="a folder written by diffusers' save_pretrained()",
            remedy="pass a pipeline's folder, or its unet or transformer folder",
        )
    configuration = read_json_object(unet / "config.json", remedy=DOWNLOAD)
    class_name = configuration.get("_class_name")
    check_class(class_name, configuration, f"_class_name={class_name!r} in {unet / 'config.json'}")
    weights = find_weights(unet) if root is given else (given,)
    for path in weights:
        tensor_shapes(path)
    files = (root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json")
    scheduler_file = next((path for path in files if scheduler and path.exists()), None)
    names = _class_names(root / "model_index.json")
    num_classes, null_label = _classes(configuration, names)
    return Checkpoint(
        folder=root,
        name=given.resolve().name if root is given else given.stem,
        class_name=str(class_name),
        unet_config=configuration,
        weights=weights,
        scheduler=None if scheduler_file is None else read_scheduler_config(scheduler_file),
        sample_shape=_sample_shape(configuration, unet / "config.json"),
        num_classes=num_classes,
        null_label=null_label,
        class_names=names,
        prompt_shape=_prompt_shape(configuration, root),
    )


def load_unet(checkpoint: Checkpoint, channels: int | None = None) -> nn.Module:
    """Build the network with its weights as float32, in eval mode and without gradients. Of `channels` and one more,
    k-diffusion's, the last is a variance that no sampler reads: it is left out.

    Raises MissingDependencyError without torch and diffusers, ModelFormatError where weights and network disagree.
    """
    with needs_packages(
        "torch and diffusers, which build the network of a diffusers folder",
        remedy="pip install 'skipstep[torch,diffusers]'",
    ):
        import diffusers
        import torch
        from safetensors.torch import load_file
    arguments = {key: value for key, value in checkpoint.unet_config.items() if not key.startswith("_")}

    def build() -> nn.Module:
        try:
            return getattr(diffusers, checkpoint.class_name)(**arguments)  # type: ignore[no-any-return]
        except Exception as error:  # Whatever a constructor makes of arguments that it does not check.
            raise ModelFormatError(
                got=f"a configuration that {checkpoint.class_name} refuses: {type(error).__name__}: {error!s:.500}",
                expected="the arguments of the installed diffusers' class",
                remedy="upgrade diffusers, or write the folder again with save_pretrained()",
            ) from error

    _check_sizes(arguments)
    # Without memory first: only a network of exactly the shapes that are on disk is built.
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    shapes = {name: shape for path in checkpoint.weights for name, shape in tensor_shapes(path).items()}
    if is_original_layout(checkpoint.class_name, shapes, expected):
        return load_original(checkpoint.weights[0], checkpoint.class_name, arguments, shapes, expected)
    problems = {
        "missing": sorted(set(expected) - set(shapes)),
        "unexpected": sorted(set(shapes) - set(expected)),
        "of another shape": sorted(name for name in set(expected) & set(shapes) if expected[name] != shapes[name]),
    }
    if any(problems.values()):
        raise ModelFormatError(
            got="; ".join(f"{len(names)} tensors {what} ({_some(names)})" for what, names in problems.items() if names),
            expected=f"exactly the {len(expected)} tensors of {checkpoint.class_name} with this config.json",
            remedy=f"check that config.json and the weights in {checkpoint.folder} belong together",
        )
    network = build()
    network.load_state_dict({name: each for path in checkpoint.weights for name, each in load_file(path).items()})
    is_k = "KUpBlock2D" in arguments.get("up_block_types", ())
    if is_k and channels is not None and arguments.get("out_channels") == channels + 1:
        last: Any = network.conv_out
        for each in (last.weight, last.bias):
            each.data = each.data[:-1].clone()
    return network.float().eval().requires_grad_(False)


def _check_sizes(value: Any, key: str = "") -> None:
    """Refuse numbers that no network has, before a constructor takes time or memory for them."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            _check_sizes(each, name)
    elif isinstance(value, list | tuple):
        _check_size(f"{key}, items", len(value), _MOST_LAYERS)
        for each in value:
            _check_sizes(each, key)
    elif isinstance(value, int | float):
        _check_size(key, value, _MOST_LAYERS if "layers" in key else _LARGEST_SIZE)


def _check_size(what: str, value: float, high: int) -> None:
    if not abs(value) <= high:
        raise ModelFormatError(
            got=f"{what}={shown(value)} in config.json", expected=f"at most {high}", remedy="correct config.json"
        )


def _class_names(index: Path) -> tuple[str, ...] | None:
    if not index.exists():
        return None
    id2label = read_json_object(index, remedy=DOWNLOAD).get("id2label")
    if id2label is None:
        return None
    keys = [str(i) for i in range(len(id2label))] if isinstance(id2label, dict) else []
    if not keys or set(keys) != set(id2label):
        raise ModelFormatError(
            got=f"id2label={id2label!r} in {index}",
            expected='an object with the keys "0", "1", … and a name for each',
            remedy="correct it, or remove it to use class numbers",
        )
    return tuple(str(id2label[key]) for key in keys)


def _classes(config: Mapping[str, Any], names: Sequence[str] | None) -> tuple[int | None, int | None]:
    embedded, null = classes_in_table(config)
    if embedded is None:
        return None, None
    remedy = "correct config.json"
    embedded = check_integer("num_class_embeds", embedded, low=1, remedy=remedy, error=ModelFormatError)
    if names is not None and embedded == len(names) + 1:
        return len(names), len(names)
    if names is not None and embedded != len(names):
        raise ModelFormatError(
            got=f"{len(names)} class names for {embedded} embedded classes",
            expected="as many, or one fewer where the last embedding stands for no class",
            remedy="correct id2label in model_index.json",
        )
    return embedded - (null is not None), null


def _sample_shape(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    channels, size = config.get("in_channels"), config.get("sample_size")
    axes = 1 if config.get("_class_name") == "UNet1DModel" else 2
    sides = [size] * axes if isinstance(size, int) else size
    if (
        not isinstance(channels, int)
        or not isinstance(sides, list)
        or not all(isinstance(n, int) for n in sides)
        or len(sides) != axes
    ):
        raise ModelFormatError(
            got=f"in_channels={channels!r}, sample_size={size!r} in {path}",
            expected="an integer, and an integer or a pair of them",
            remedy="add them to config.json: the engine compiles for fixed shapes",
        )
    return channels, *sides


def _prompt_shape(config: Mapping[str, Any], root: Path) -> tuple[int, int] | None:
    """Tokens and width of the prompts that a text-conditional network attends to; the tokenizer says how many."""
    default = {"cross_attention_dim": 1280} if config.get("_class_name") == "UNet2DConditionModel" else {}
    width = prompt_width({**default, **config})
    if not default and width is None:
        return None
    path = root / "tokenizer" / "tokenizer_config.json"
    says = read_json_object(path, remedy=DOWNLOAD).get("model_max_length", 0) if path.exists() else None
    tokens = prompt_tokens(config, says)
    if not isinstance(width, int) or not isinstance(tokens, int) or width < 1 or not 1 <= tokens <= 1 << 16:
        raise ModelFormatError(
            got=f"prompts of the width {width!r} and model_max_length={tokens!r} in {root}",
            expected="the width of a prompt's embeddings, and how many tokens a prompt has",
            remedy="pass prompt_shape=(tokens, width) with the network itself to Engine.build",
        )
    return tokens, width


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")

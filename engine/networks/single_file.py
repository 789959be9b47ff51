"""Single .safetensors files: where their configuration lies, and the original latent-diffusion names of their tensors.

Such a file holds a network, or a whole pipeline of which the network is one part, under the names of the code that it
was trained with. diffusers' own loader translates them; it needs the configuration, which is never downloaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstep.errors import ModelFormatError, UnsafeCheckpointError, check_path
from skipstep.networks.weights import PICKLES

if TYPE_CHECKING:
    from torch import nn

# Of diffusers' classes, those whose original layout its loader knows.
_TRANSLATED = ("UNet2DConditionModel",)
# What the original code calls the network inside a whole pipeline.
_ORIGINAL_PREFIXES = ("model.diffusion_model.", "input_blocks.", "time_embed.")

Shapes = Mapping[str, tuple[int, ...]]


def config_folder(file: Path, config: str | os.PathLike[str] | None) -> Path:
    """The folder of a single file's configuration: the given one, or the one that it lies in.

    Raises ModelFormatError where there is none, UnsafeCheckpointError for a pickle.
    """
    if file.suffix in PICKLES:
        raise UnsafeCheckpointError(
            got=f"weights as a pickle, {file}",
            expected="a .safetensors file: a pickle runs code when it is loaded, so it was not opened",
            remedy='convert it once, where you trust the file: python -c "import torch, safetensors.torch as s; '
            f"d = torch.load('{file}', weights_only=True); "
            f"s.save_file(d.get('state_dict', d), '{file.with_suffix('.safetensors')}')\"",
        )
    if file.suffix != ".safetensors":
        raise ModelFormatError(
            got=f"the file {file}", expected="a .safetensors or .onnx file, or a diffusers folder", remedy="pass one"
        )
    if not file.exists():
        raise ModelFormatError(got=f"no file {file}", expected="a .safetensors file", remedy="check the path")
    if config is not None:
        return Path(check_path("config", config))
    if (file.parent / "config.json").exists():
        return file.parent
    raise ModelFormatError(
        got=f"{file} without a configuration",
        expected="a local folder with the config.json of its network, since weights do not say how they are connected",
        remedy="pass config='FOLDER', with unet/config.json and scheduler/scheduler_config.json of this model family; "
        "nothing is downloaded",
    )


def is_original_layout(class_name: str, shapes: Shapes, expected: Shapes) -> bool:
    """Whether a file names its tensors as the original code does, and diffusers can translate that."""
    return (
        class_name in _TRANSLATED
        and set(shapes).isdisjoint(expected)
        and any(name.startswith(_ORIGINAL_PREFIXES) for name in shapes)
    )


def load_original(
    file: Path, class_name: str, arguments: Mapping[str, Any], shapes: Shapes, expected: Shapes
) -> nn.Module:
    """The network with the weights of a file in the original layout, float32, in eval mode, without gradients.

    `expected` are the tensors of the class with these arguments. Raises ModelFormatError where they are not all there.
    """
    import json
    import tempfile

    import diffusers
    from safetensors.torch import load_file

    def refused(what: str) -> ModelFormatError:
        return ModelFormatError(
            got=f"{file}, {what}",
            expected=f"the weights of a {class_name} with this configuration, in the original latent-diffusion layout",
            remedy="pass the config= folder of this model's own family",
        )

    needed, there = (sum(map(math.prod, each.values())) for each in (expected, shapes))
    if needed > there:
        raise refused(f"which holds {there} numbers where the configuration needs {needed}")
    known = getattr(diffusers, class_name)

    def load_state_dict(self: Any, state: Any, strict: bool = True, **options: Any) -> Any:
        return known.load_state_dict(self, state, strict=True, **options)

    # The loader itself would leave what the file lacks at random values.
    complete: Any = type(class_name, (known,), {"load_state_dict": load_state_dict})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"_class_name": class_name, **arguments}), encoding="utf-8")
        try:
            network = complete.from_single_file(
                load_file(file), config=folder, local_files_only=True, low_cpu_mem_usage=False
            )
        except Exception as error:  # Whatever the loader makes of names that it does not expect.
            raise refused(f"which diffusers does not translate: {type(error).__name__}: {error!s:.500}") from error
    return network.float().eval().requires_grad_(False)  # type: ignore[no-any-return]

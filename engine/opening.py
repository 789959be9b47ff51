"""What people have, as one thing: a diffusers folder, a weight file, an .onnx file, a pipeline object, a torch module.

ADD A FORM HERE: a case in `open_model`. It is checked at once, as far as that goes without torch; `read` does the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from skipstep.errors import InputError
from skipstep.model_source import (
    GraphSource,
    OnnxSource,
    SpecOptions,
    open_onnx,
    read_model,
    specification,
)
from skipstep.networks.checkpoint import NETWORK_FOLDERS, read_checkpoint
from skipstep.networks.controlnet import read_controlnets, with_controls
from skipstep.networks.families import prompt_tokens, prompt_width
from skipstep.networks.spec import NetworkSpec
from skipstep.networks.weights import DOWNLOAD
from skipstep.plans.scheduler_config import SchedulerConfig, read_scheduler_config
from skipstep.storage.untrusted import read_json_object

if TYPE_CHECKING:
    from torch import nn

_LONGEST_PROMPT = 1 << 16
SCHEDULER_FILE = "scheduler_config.json"


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that was checked and not loaded: `read` makes it ready to be run. `scheduler`: what came with it.

    `is_torch`: it becomes a torch module. `guessed`: what was guessed of it, in words.
    """

    network: NetworkSpec
    scheduler: SchedulerConfig | None
    read: Callable[[], GraphSource]
    is_torch: bool = True
    guessed: tuple[str, ...] = ()

    def plan_options(self) -> dict[str, Any]:
        """The options of a step count's plan, empty where no scheduler configuration came with the model."""
        return {} if self.scheduler is None else self.scheduler.plan_options()


def open_model(
    model: Any,
    *,
    with_scheduler: bool = True,
    scheduler: object = None,
    config: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, str] | None = None,
    controlnet: object = None,
    **said: Unpack[SpecOptions],
) -> OpenedModel:
    """`said` completes what the model says of itself, and `scheduler` stands for the configuration that came with it.
    Without `with_scheduler` none is read.

    Raises InputError, ModelFormatError, UnsafeCheckpointError and ScheduleError.
    """
    if scheduler is not None:
        if not with_scheduler:
            raise InputError(got="scheduler= beside schedule=", expected="one of them", remedy="leave schedule out")
        given = _given_scheduler(scheduler)
        options: Any = {"config": config, "inputs": inputs, "controlnet": controlnet}
        opened = open_model(model, with_scheduler=False, **options, **_with_time(said, given))
        return replace(opened, scheduler=given)
    in_object = not is_module(model) and is_module(getattr(model, "controlnet", None))
    in_folder = isinstance(model, str | os.PathLike) and not is_onnx_path(model)
    if in_object or (controlnet is not None and not in_folder):
        raise InputError(
            got=f"a ControlNet beside {'an .onnx file' if is_onnx_path(model) else f'a {type(model).__name__}'}",
            expected="the folder of a pipeline or of a network",
            remedy="pass the folder that pipeline.save_pretrained() wrote, or a module around network and ControlNet",
        )
    if is_onnx_path(model) and config is None:
        return _opened_file(Path(model), inputs, with_scheduler, said)
    if inputs is not None:
        raise InputError(
            got=f"inputs= beside {model if isinstance(model, str | os.PathLike) else f'a {type(model).__name__}'}",
            expected="an .onnx file, whose names they are",
            remedy="leave inputs out",
        )
    if isinstance(model, str | os.PathLike) and not is_onnx_path(model):
        checkpoint = read_checkpoint(model, scheduler=with_scheduler, config=config)
        nets = read_controlnets(controlnet, checkpoint)
        network = with_controls(specification(model, checkpoint, **_with_time(said, checkpoint.scheduler)), nets)
        return OpenedModel(network, checkpoint.scheduler, lambda: read_model(model, checkpoint, network, nets))
    if config is not None:
        raise InputError(
            got=f"config= beside {'an .onnx file' if is_onnx_path(model) else f'a {type(model).__name__}'}",
            expected="the configuration of a single .safetensors file",
            remedy="leave config out",
        )
    found = None
    inside = next((each for name in NETWORK_FOLDERS if is_module(each := getattr(model, name, None))), None)
    if not is_module(model) and inside is not None:
        found = _scheduler_of(getattr(model, "scheduler", None)) if with_scheduler else None
        if said.get("prompt_shape") is None:
            said["prompt_shape"] = _prompt_shape_of(inside, getattr(model, "tokenizer", None))
        model = inside
    if not is_module(model):
        raise InputError(
            got=f"a model of type {type(model).__name__}",
            expected="a torch.nn.Module, a diffusers pipeline with a unet or transformer, or the path of a diffusers "
            "folder or file",
            remedy="pass pipeline.unet, pipeline.transformer, or the folder that pipeline.save_pretrained() wrote",
        )
    return _opened_module(model, found, said)


def _opened_module(module: nn.Module, scheduler: SchedulerConfig | None, said: SpecOptions) -> OpenedModel:
    network = specification(module, None, **_with_time(said, scheduler))
    return OpenedModel(network, scheduler, lambda: read_model(module, None, network))


def _with_time(said: SpecOptions, scheduler: SchedulerConfig | None) -> SpecOptions:
    """What is said of a network, and what its scheduler says of the state and the time that it reads."""
    if scheduler is None or scheduler.state == "vp":
        return said
    time = {"time_input": scheduler.time_input, "state": scheduler.state, "sigma_data": scheduler.sigma_data}
    return {**time, **said}  # type: ignore[typeddict-item]


def find_scheduler(
    model: str | os.PathLike[str], *, scheduler: object = None, config: str | os.PathLike[str] | None = None
) -> SchedulerConfig | None:
    """What Engine.build would take for the scheduler of the model at a path, without reading the model as a whole."""
    if scheduler is not None:
        return _given_scheduler(scheduler)
    return _beside(Path(model)) if is_onnx_path(model) else read_checkpoint(model, config=config).scheduler


def _beside(path: Path) -> SchedulerConfig | None:
    """The scheduler of an .onnx file: in its folder, or where diffusers' layout has it."""
    places = (path.parent / SCHEDULER_FILE, path.parent.parent / "scheduler" / SCHEDULER_FILE)
    found = next((each for each in places if each.exists()), None)
    return None if found is None else read_scheduler_config(found)


def _opened_file(path: Path, inputs: object, with_scheduler: bool, said: SpecOptions) -> OpenedModel:
    """What diffusers and optimum write beside a network, its configuration and the scheduler's, completes it."""
    beside = path.parent / "config.json"
    config = read_json_object(beside, remedy=DOWNLOAD) if beside.exists() else None
    scheduler = _beside(path) if with_scheduler else None
    network = open_onnx(path, inputs=inputs, config=config, **_with_time(said, scheduler))
    return OpenedModel(
        network.spec,
        scheduler,
        lambda: OnnxSource(path.stem, network.spec, network, network.digest),
        is_torch=False,
        guessed=network.guessed,
    )


def _given_scheduler(scheduler: Any) -> SchedulerConfig:
    found = scheduler if isinstance(scheduler, SchedulerConfig) else _scheduler_of(scheduler)
    return read_scheduler_config(scheduler) if found is None else found


def _scheduler_of(scheduler: Any) -> SchedulerConfig | None:
    """The configuration of a diffusers scheduler object, None for anything else."""
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        return None
    return read_scheduler_config({"_class_name": type(scheduler).__name__, **config})


def _prompt_shape_of(network: Any, tokenizer: Any) -> tuple[int, int] | None:
    """Tokens and width of the prompts, None where the tokenizer or the network does not say."""
    config = getattr(network, "config", None)
    tokens = prompt_tokens(config, getattr(tokenizer, "model_max_length", 0))
    width = prompt_width(config)
    if not isinstance(width, int) or not isinstance(tokens, int) or not 1 <= tokens <= _LONGEST_PROMPT:
        return None
    return tokens, width


def is_module(model: object) -> bool:
    torch = sys.modules.get("torch")  # Without torch there are no modules.
    return torch is not None and isinstance(model, torch.nn.Module)


def is_onnx_path(model: object) -> bool:
    return isinstance(model, str | os.PathLike) and str(model).endswith(".onnx")

"""A diffusers pipeline's folder, read and checked without torch. ADD A FAMILY HERE: its name in `FAMILIES`.

skipstep.pipelines.exporting makes its parts. A folder of another pipeline, or of a network alone, is built as a network
alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from skipstep.errors import (
    InputError,
    ModelFormatError,
    check_flag,
    check_integer,
    check_path,
)
from skipstep.networks.condition import MAX_SIDE, Condition
from skipstep.networks.families import prompt_width
from skipstep.networks.weights import DOWNLOAD
from skipstep.pipelines.pictures import config_of_squares
from skipstep.pipelines.spec import ENLARGED, MASK, MASKED, MAX_CHUNKS, UPSCALER, PipelineSpec
from skipstep.pipelines.tokenizer import read_tokenizer
from skipstep.plans.diffusers_config import scheduler_contents
from skipstep.plans.scheduler_config import SchedulerConfig, read_scheduler_config
from skipstep.plans.spacing import Spacing
from skipstep.storage.untrusted import read_json_object

XL: Final = "StableDiffusionXL"
FAMILIES: Final = (
    *(
        f"{stem}{control}{task}Pipeline"
        for stem in ("StableDiffusion", XL)
        for control in ("", "ControlNet")
        for task in ("", "Img2Img", "Inpaint")
    ),
    *("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "LDMPipeline", UPSCALER),
)
TEXT_CLASSES: Final = ("CLIPTextModel", "CLIPTextModelWithProjection")
SMALL: Final = "AutoencoderTiny"
CHECKER: Final = "StableDiffusionSafetyChecker"
DECODERS: Final = {"vae": "AutoencoderKL", "vqvae": "VQModel"}
# Pixels a side that the autoencoder takes as a whole: what these models were made for.
_TILE: Final = 1024


class PartsOptions(TypedDict, total=False):
    """Of a pipeline's folder (skipstep.pipelines.building.FAMILIES):

    height, width   pixels of the pictures, multiples of the autoencoder's factor; None: what the network was made for.
    tile            pixels a side above which the autoencoder works in blended tiles; None: 1024.
    prompt_chunks   how many chunks of tokens, of 75 with CLIP, a prompt may have; None: one, and the rest is cut off.
    preview         the folder of an AutoencoderTiny (TAESD) for the same latents, with which Engine.preview draws.
    safety_checker  None: run the checker that the folder has, which turns pictures black and warns; False: not.
    """

    height: int | None
    width: int | None
    tile: int | None
    prompt_chunks: int | None
    preview: str | os.PathLike[str] | None
    safety_checker: bool | None


@dataclass(frozen=True, slots=True)
class FoundParts:
    """A pipeline's folder that was checked and not loaded; what follows `decoder` is of its network, and
    `prompt_shape` None for one chunk. `scheduler` is an upscaler's, whose network is told the noise level."""

    folder: Path
    spec: PipelineSpec
    texts: tuple[tuple[str, str], ...]  # Folder and class of each text encoder.
    tokenizers: tuple[str, ...]  # Contents of their files.
    decoder: str
    sample_shape: tuple[int, ...]
    conditions: Mapping[str, Condition]
    prompt_shape: tuple[int, int] | None
    controlnets: tuple[Path, ...] | None  # Those of the folder.
    preview: str | None = None  # The folder of a small decoder.
    scheduler: SchedulerConfig | None = None


def find_parts(model: Any, sample_shape: Any = None, **options: Unpack[PartsOptions]) -> FoundParts | None:
    """The parts of the folder of a pipeline in FAMILIES, None for anything else. Raises InputError, ModelFormatError,
    UnsafeCheckpointError, MissingDependencyError."""
    index = Path(model) / "model_index.json" if isinstance(model, str | os.PathLike) else None
    if index is None or not index.is_file():
        _refuse(options)
        return None
    contents = read_json_object(index, remedy=DOWNLOAD)
    family, folder = contents.get("_class_name"), index.parent
    if family not in FAMILIES:
        _refuse(options)
        return None
    parts = {n: each for n, each in contents.items() if isinstance(each, list) and len(each) == 2 and each[0]}
    checks = _checker_side(folder, parts, options.get("safety_checker"))
    if contents.get("requires_aesthetics_score"):
        raise ModelFormatError(
            got=f"requires_aesthetics_score in {index}, an SDXL refiner",
            expected="a pipeline whose conditions are prompts and sizes",
            remedy=_alone(folder),
        )
    pixels = contents.get("vae") == [None, None] and family != "LDMPipeline"
    _check_complete(folder, family, parts, pixels)
    decoder = "" if pixels else next(name for name in DECODERS if name in parts)
    network = read_json_object(folder / "unet" / "config.json", remedy=DOWNLOAD)
    remedy = "correct the config.json of the part"
    if pixels:
        config = config_of_squares(network, remedy=_alone(folder))
    else:
        config = read_json_object(folder / decoder / "config.json", remedy=DOWNLOAD)
    blocks = config.get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 1 <= len(blocks) <= 8 else 0
    factor = check_integer("factor of the autoencoder", factor, low=1, high=256, remedy=remedy, error=ModelFormatError)
    channels = check_integer("out_channels", config.get("out_channels", 3), low=1, high=64, remedy=remedy)
    latents = check_integer("latent_channels", config.get("latent_channels", 4), low=1, high=MAX_SIDE, remedy=remedy)
    shape = _sample_shape(network, latents, factor, sample_shape, options)
    extra = network.get("in_channels", latents) - latents
    enlarges = family == UPSCALER
    if extra not in ((latents,) if enlarges else (0, 1 + latents)):
        raise ModelFormatError(
            got=f"a network of {network.get('in_channels')} channels for latents of {latents}",
            expected=f"{2 * latents}" if enlarges else f"{latents}, or {1 + 2 * latents} for inpainting",
            remedy=_alone(folder) + " and conditions=",
        )
    beside = Condition((extra, *shape[1:]), null="same", concat_to_state=True) if extra else None
    conditions = {} if beside is None else {ENLARGED if enlarges else MASKED: beside}
    if enlarges:
        if shape[1] % 2 or shape[2] % 2:
            raise InputError(
                got=f"latents of {shape[1]} by {shape[2]} for an upscaler",
                expected="twice the size of a small picture's",
                remedy=f"pass height= and width= that {2 * factor} divides",
            )
        width = check_integer(
            "time_cond_proj_dim", network.get("time_cond_proj_dim"), low=1, high=MAX_SIDE, remedy=remedy
        )
        conditions["timestep_cond"] = Condition((width,))
    tile = (
        check_integer("tile", options.get("tile") or _TILE, low=4 * factor, remedy="pass pixels, such as 512") // factor
    )
    names = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    texts, tokenizers = [], []
    for name in names:
        pooled = family.startswith((XL, UPSCALER)) and parts[name][1] == TEXT_CLASSES[not enlarges]
        found, text = read_tokenizer(folder / name.replace("text_encoder", "tokenizer"), pooled=pooled)
        texts.append(text)
        tokenizers.append(found)
    asked, most = options.get("prompt_chunks"), MAX_CHUNKS if texts else 1
    chunks = 1 if asked is None else check_integer("prompt_chunks", asked, low=1, high=most)
    prompt_shape = None
    if chunks > 1:
        told = prompt_width({"cross_attention_dim": 1280, **network})
        width = check_integer("cross_attention_dim", told, low=1, high=MAX_SIDE, remedy=remedy)
        prompt_shape = chunks * texts[0].num_tokens, width
        conditions[MASK] = Condition(prompt_shape[:1], null=1.0)
    small = _small_decoder(options.get("preview"), latents, factor)
    return FoundParts(
        folder,
        PipelineSpec(
            family=family,
            texts=tuple(texts),
            factor=factor,
            channels=channels,
            tile=(min(tile, shape[1]), min(tile, shape[2])),
            zero_negative=bool(contents.get("force_zeros_for_empty_prompt", False)),
            encodes=True,
            chunks=chunks,
            checks=checks,
            previews=small is not None,
            pixels=pixels,
        ),
        tuple((name, parts[name][1]) for name in names),
        tuple(tokenizers),
        decoder,
        shape,
        conditions,
        prompt_shape,
        tuple(folder / name for name in _controlnets(folder)) or None,
        small,
        _scheduler_of_levels(folder / "scheduler") if enlarges else None,
    )


def _scheduler_of_levels(folder: Path) -> SchedulerConfig:
    """An upscaler's. Its pipeline divides the state by √(sigma²+1), tells the network ln(sigma)/4, and makes the image
    of x and what is predicted as EDM does with data of the spread 1; its scheduler takes that for the image."""
    contents = scheduler_contents(folder)
    found = (contents.get("_class_name"), contents.get("prediction_type"))
    if found not in [("EulerDiscreteScheduler", kind) for kind in ("sample", "original_sample")]:
        raise ModelFormatError(
            got=f"{found[0]!r:.80} with prediction_type={found[1]!r:.80} for an upscaler, in {folder}",
            expected="EulerDiscreteScheduler with 'sample' or 'original_sample'",
            remedy=DOWNLOAD,
        )
    # Which Euler's rule does not know, though files have them from one conversion to the next.
    foreign = ("prediction_type", "clip_sample", "thresholding", "set_alpha_to_one")
    read = read_scheduler_config({name: value for name, value in contents.items() if name not in foreign})
    spacing: Spacing = "interpolated" if read.spacing == "linspace" else read.spacing
    return replace(read, prediction_type="edm", time_input="c_noise", state="edm", sigma_data=1.0, spacing=spacing)


def _small_decoder(given: Any, channels: int, factor: int) -> str | None:
    if given is None:
        return None
    folder = Path(check_path("preview", given)).resolve()
    config = read_json_object(folder / "config.json", remedy=DOWNLOAD)
    blocks = config.get("num_decoder_blocks", [3, 3, 3, 1])
    halvings = len(blocks) - 1 if isinstance(blocks, list) and len(blocks) <= 8 else 0
    kind, width = config.get("_class_name"), config.get("latent_channels", 4)
    if (kind, width, 1 << halvings) != (SMALL, channels, factor):
        raise ModelFormatError(
            got=f"preview= of a {kind!r:.80} with {width!r:.20} latent channels, {1 << halvings} pixels a side",
            expected=f"an {SMALL} for the pipeline's latents: {channels} channels, {factor} pixels a side",
            remedy="pass the one that was made for this autoencoder, or leave preview out",
        )
    return str(folder)


def _refuse(options: PartsOptions) -> None:
    found = [name for name, value in options.items() if value is not None]
    if found:
        raise InputError(
            got=f"{found[0]}= for a model that is no folder of {', '.join(FAMILIES[:2])}, …",
            expected="the folder of such a pipeline",
            remedy="leave it out; sample_shape= sets the size of a network's state",
        )


def _checker_side(folder: Path, parts: Mapping[str, Any], asked: bool | None) -> int:
    """Pixels a side that the safety checker reads; 0 where there is none, or it is left out."""
    there = "safety_checker" in parts
    if asked is not None and check_flag("safety_checker", asked) and not there:
        raise InputError(
            got=f"safety_checker=True for {folder}, which has none",
            expected="a folder with one",
            remedy="leave it out, and check the pictures yourself",
        )
    if not there or asked is False:
        return 0
    remedy = f"{DOWNLOAD}; or pass safety_checker=False to Engine.build, and check the pictures yourself"
    if parts["safety_checker"][1] != CHECKER:
        raise ModelFormatError(
            got=f"a safety checker of the class {parts['safety_checker'][1]!r:.80}", expected=CHECKER, remedy=remedy
        )
    vision = read_json_object(folder / "safety_checker" / "config.json", remedy=remedy).get("vision_config")
    read_json_object(folder / "feature_extractor" / "preprocessor_config.json", remedy=remedy)
    side = vision.get("image_size", 224) if isinstance(vision, dict) else 224
    return check_integer("image_size", side, low=1, high=MAX_SIDE, remedy=remedy, error=ModelFormatError)


def _check_complete(folder: Path, family: str, parts: Mapping[str, Any], pixels: bool) -> None:
    needed = ["unet"] if pixels else ["vqvae" if family == "LDMPipeline" and "vae" not in parts else "vae", "unet"]
    if family != "LDMPipeline":
        needed += ["text_encoder", "tokenizer"] + (["text_encoder_2", "tokenizer_2"] if family.startswith(XL) else [])
    needed += ["controlnet"] if "ControlNet" in family else []
    missing = [name for name in needed if name not in parts or not (folder / name).is_dir()]
    if missing:
        raise ModelFormatError(
            got=f"a {family} without {', '.join(missing)} in {folder}",
            expected=f"the folders {', '.join(needed)}",
            remedy=f"complete the download, or {_alone(folder)}",
        )
    kinds = {**DECODERS, **{name: " or ".join(TEXT_CLASSES) for name in ("text_encoder", "text_encoder_2")}}
    for name, kind in kinds.items():
        if name in parts and parts[name][1] not in kind.split(" or "):
            raise ModelFormatError(
                got=f"{name} of the class {parts[name][1]!r:.80} in {folder}", expected=kind, remedy=_alone(folder)
            )


def _controlnets(folder: Path) -> list[str]:
    """The folders of a pipeline's ControlNets, as diffusers names them."""
    names = ("controlnet", *(f"controlnet_{i}" for i in range(1, 8)))
    return [name for name in names if (folder / name).is_dir()]


def _alone(folder: Path) -> str:
    return (
        f"build the network alone: Engine.build({str(folder / 'unet')!r}, "
        f"scheduler={str(folder / 'scheduler' / 'scheduler_config.json')!r})"
    )


def _sample_shape(
    network: Mapping[str, Any], channels: int, factor: int, given: Any, options: PartsOptions
) -> tuple[int, ...]:
    asked = [options.get(name) for name in ("height", "width")]
    if given is not None and asked != [None, None]:
        raise InputError(got="sample_shape beside height or width", expected="one of them", remedy="leave one out")
    if given is not None:
        return tuple(given)
    size: Any = network.get("sample_size")
    sides = []
    for name, pixels, usual in zip(
        ("height", "width"), asked, size if isinstance(size, list) else [size] * 2, strict=True
    ):
        usual = check_integer("sample_size", usual, low=1, high=MAX_SIDE, remedy="pass height= and width=")
        pixels = usual * factor if pixels is None else check_integer(name, pixels, low=1, remedy="pass pixels")
        halvings = 2 ** (len(network.get("block_out_channels") or [0]) - 1)
        if pixels % factor or (pixels // factor) % math.gcd(halvings, usual):
            unit = factor * math.gcd(halvings, usual)
            near = max(unit, round(pixels / unit) * unit)
            raise InputError(got=f"{name}={pixels}", expected=f"a multiple of {unit}", remedy=f"pass {name}={near}")
        sides.append(pixels // factor)
    return channels, *sides

"""From a diffusers pipeline's folder to its parts as graphs. ADD A FAMILY HERE: its name in `FAMILIES`.

`find_parts` reads and checks without torch; `FoundParts.built` loads the modules, which needs torch, transformers and
diffusers, and exports them. A folder of another pipeline, or of a network alone, is built as a network alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

import numpy as np
from safetensors.numpy import save

from skipstep.errors import (
    InputError,
    ModelFormatError,
    NonFiniteError,
    SkipstepError,
    check_flag,
    check_integer,
    optional_package,
)
from skipstep.networks.condition import MAX_SIDE, Condition
from skipstep.networks.spec import NetworkSpec
from skipstep.networks.weights import DOWNLOAD, find_weights, tensor_shapes
from skipstep.pipelines.pipeline import EMBEDS, LATENTS, MOMENTS, PICTURES, POOLED, TOKENS, Pipeline
from skipstep.pipelines.spec import FOLDER, GOLDEN_FILE, MASKED, PipelineSpec
from skipstep.pipelines.tokenizer import read_tokenizer
from skipstep.storage.untrusted import read_json_object

if TYPE_CHECKING:
    from torch import nn

    from skipstep.networks.lora_layers import Loras

_XL: Final = "StableDiffusionXL"
FAMILIES: Final = (
    *(f"{stem}{task}Pipeline" for stem in ("StableDiffusion", _XL) for task in ("", "Img2Img", "Inpaint")),
    *("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "LDMPipeline"),
)
_TEXT_CLASSES: Final = ("CLIPTextModel", "CLIPTextModelWithProjection")
_DECODERS: Final = {"vae": "AutoencoderKL", "vqvae": "VQModel"}
# Pixels a side that the autoencoder takes as a whole: what these models were made for.
_TILE: Final = 1024
_FORMAT: Final = 1


class PartsOptions(TypedDict, total=False):
    """Of a pipeline's folder (skipstep.pipelines.building.FAMILIES):

    height, width   pixels of the pictures, multiples of the autoencoder's factor; None: what the network was made for.
    tile            pixels a side above which the autoencoder works in blended tiles; None: 1024.
    safety_checker  False: leave out the checker that the folder has, which is not run here; it then has to be said.
    """

    height: int | None
    width: int | None
    tile: int | None
    safety_checker: bool | None


@dataclass(frozen=True, slots=True)
class FoundParts:
    """A pipeline's folder that was checked and not loaded; `sample_shape` and `conditions` are its network's."""

    folder: Path
    spec: PipelineSpec
    texts: tuple[tuple[str, str], ...]  # Folder and class of each text encoder.
    tokenizers: tuple[str, ...]  # Contents of their files.
    decoder: str
    sample_shape: tuple[int, ...]
    conditions: Mapping[str, Condition]

    def built(
        self, network: NetworkSpec, num_threads: int | None, report: Callable[[str], None], loras: Loras | None = None
    ) -> Pipeline:
        """Raises MissingDependencyError, ModelFormatError, ExportError; InputError for LoRAs that do not fit."""
        from skipstep.networks.lora_layers import Loras

        loras = loras or Loras()
        files = {name: text.encode() for name, text in zip(self.spec.tokenizer_names(), self.tokenizers, strict=True)}
        for i, (name, class_name) in enumerate(self.texts):
            report(f"export {name}")
            files[f"{FOLDER}/text-{i}.onnx"] = self._graph(name, class_name, "text", self.spec.texts[i].pooled, loras)
        for part in ("decoder", "encoder")[: 1 + self.spec.encodes]:
            report(f"export the {part} of {self.decoder}")
            files[f"{FOLDER}/{part}.onnx"] = self._graph(self.decoder, _DECODERS[self.decoder], part, False, Loras())
        inputs = {f"text-{i}": loras.inputs.get(name, {}) for i, (name, _) in enumerate(self.texts)}
        made = Pipeline(self.spec, files.__getitem__, num_threads=num_threads, inputs=inputs)
        self._check_widths(made, network)
        latents = np.random.default_rng(0).standard_normal((1, *self.sample_shape), np.float32)
        files[GOLDEN_FILE] = save(made.golden(latents))
        return made

    def _graph(self, name: str, class_name: str, part: str, pooled: bool, loras: Loras) -> bytes:
        from skipstep.bundles.cache import ArtefactCache
        from skipstep.bundles.cache_key import cache_key
        from skipstep.export.onnx_model import exporter_versions

        config = read_json_object(self.folder / name / "config.json", remedy=DOWNLOAD)
        weights = find_weights(self.folder / name, *(["model"] if part == "text" else []))
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for path in weights:
            tensor_shapes(path)  # Refuses what is no whole file.
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())

        @cache
        def module() -> nn.Module:
            made = _load(self.folder / name, class_name, "fp16" if ".fp16" in weights[0].name else None)
            loras.apply(name, made, "encoder")
            return made

        if loras.rank is not None:
            module()  # Slots are needed even where the graph is known.

        def export() -> bytes:
            return _exported(module(), part, self.spec, config, pooled, loras.inputs.get(name, {}))

        digest.update(loras.key(name))
        key = cache_key(
            kind=f"pipeline {part}",
            weights=digest.hexdigest(),
            shape=repr((_FORMAT, class_name, self.spec.tile, self.spec.texts)),
            exporter=exporter_versions(),
        )
        return ArtefactCache().get_or_build(key, export, f"{part} of {class_name}, exported to ONNX")

    def _check_widths(self, made: Pipeline, network: NetworkSpec) -> None:
        if not self.texts:
            return
        embeds, pooled = made.embed([""])
        given = {"encoder_hidden_states": embeds.shape[1:]} | (
            {} if pooled is None else {"text_embeds": pooled.shape[1:]}
        )
        read = {name: each.shape for name, each in network.all_conditions.items() if name in given}
        if given != read:
            raise ModelFormatError(
                got=f"text encoders in {self.folder} that give {given}",
                expected=f"what the network reads, {read}",
                remedy="check that the parts belong together: download the whole folder again",
            )


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
    _check_safety(parts, options.get("safety_checker"))
    if contents.get("requires_aesthetics_score"):
        raise ModelFormatError(
            got=f"requires_aesthetics_score in {index}, an SDXL refiner",
            expected="a pipeline whose conditions are prompts and sizes",
            remedy=_alone(folder),
        )
    _check_complete(folder, family, parts)
    decoder = next(name for name in _DECODERS if name in parts)
    config = read_json_object(folder / decoder / "config.json", remedy=DOWNLOAD)
    network = read_json_object(folder / "unet" / "config.json", remedy=DOWNLOAD)
    remedy = "correct the config.json of the part"
    blocks = config.get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 1 <= len(blocks) <= 8 else 0
    factor = check_integer("factor of the autoencoder", factor, low=1, high=256, remedy=remedy, error=ModelFormatError)
    channels = check_integer("out_channels", config.get("out_channels", 3), low=1, high=64, remedy=remedy)
    latents = check_integer("latent_channels", config.get("latent_channels", 4), low=1, high=MAX_SIDE, remedy=remedy)
    shape = _sample_shape(network, latents, factor, sample_shape, options)
    extra = network.get("in_channels", latents) - latents
    if extra not in (0, 1 + latents):
        raise ModelFormatError(
            got=f"a network of {network.get('in_channels')} channels for latents of {latents}",
            expected=f"{latents}, or {1 + 2 * latents} for inpainting",
            remedy=_alone(folder) + " and conditions=",
        )
    masked = {MASKED: Condition((extra, *shape[1:]), null="same", concat_to_state=True)} if extra else {}
    tile = (
        check_integer("tile", options.get("tile") or _TILE, low=4 * factor, remedy="pass pixels, such as 512") // factor
    )
    names = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    texts, tokenizers = [], []
    for name in names:
        pooled = parts[name][1] == _TEXT_CLASSES[1] and family.startswith(_XL)
        found, text = read_tokenizer(folder / name.replace("text_encoder", "tokenizer"), pooled=pooled)
        texts.append(text)
        tokenizers.append(found)
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
        ),
        tuple((name, parts[name][1]) for name in names),
        tuple(tokenizers),
        decoder,
        shape,
        masked,
    )


def _refuse(options: PartsOptions) -> None:
    found = [name for name, value in options.items() if value is not None]
    if found:
        raise InputError(
            got=f"{found[0]}= for a model that is no folder of {', '.join(FAMILIES[:2])}, …",
            expected="the folder of such a pipeline",
            remedy="leave it out; sample_shape= sets the size of a network's state",
        )


def _check_safety(parts: Mapping[str, Any], asked: bool | None) -> None:
    if asked is not None and check_flag("safety_checker", asked):
        raise InputError(
            got="safety_checker=True",
            expected="False: the checker is not run here",
            remedy="check the pictures yourself",
        )
    if "safety_checker" in parts and asked is None:
        raise InputError(
            got="a folder with a safety checker, which is not run here",
            expected="safety_checker=False, so that leaving it out is your decision",
            remedy="pass safety_checker=False to Engine.build, and check the pictures yourself where others see them",
        )


def _check_complete(folder: Path, family: str, parts: Mapping[str, Any]) -> None:
    needed = ["vqvae" if family == "LDMPipeline" and "vae" not in parts else "vae", "unet"]
    if family != "LDMPipeline":
        needed += ["text_encoder", "tokenizer"] + (["text_encoder_2", "tokenizer_2"] if family.startswith(_XL) else [])
    missing = [name for name in needed if name not in parts or not (folder / name).is_dir()]
    if missing:
        raise ModelFormatError(
            got=f"a {family} without {', '.join(missing)} in {folder}",
            expected=f"the folders {', '.join(needed)}",
            remedy=f"complete the download, or {_alone(folder)}",
        )
    kinds = {**_DECODERS, **{name: " or ".join(_TEXT_CLASSES) for name in ("text_encoder", "text_encoder_2")}}
    for name, kind in kinds.items():
        if name in parts and parts[name][1] not in kind.split(" or "):
            raise ModelFormatError(
                got=f"{name} of the class {parts[name][1]!r:.80} in {folder}", expected=kind, remedy=_alone(folder)
            )


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


def _load(folder: Path, class_name: str, variant: str | None) -> nn.Module:
    remedy = "pip install 'skipstep[torch,diffusers,prompts]'"
    torch, transformers, diffusers = (
        optional_package(package, use="builds the parts of a pipeline's folder", remedy=remedy)
        for package in ("torch", "transformers", "diffusers")
    )
    home, dtype = (transformers, "dtype") if class_name in _TEXT_CLASSES else (diffusers, "torch_dtype")
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
    try:
        module = getattr(home, class_name).from_pretrained(folder, variant=variant, **options, **{dtype: torch.float32})
    except SkipstepError:
        raise
    except Exception as error:  # Whatever a library makes of files that it does not check.
        raise ModelFormatError(
            got=f"{folder}, of which {class_name} cannot be made: {type(error).__name__}: {error!s:.300}",
            expected="its configuration and its weights",
            remedy=DOWNLOAD,
        ) from error
    made: nn.Module = module.eval().requires_grad_(False)
    return made


def _exported(module: nn.Module, part: str, spec: PipelineSpec, config: Any, pooled: bool, lora: Any) -> bytes:
    import torch

    from skipstep.export.encoder import check_encoder, export_encoder
    from skipstep.pipelines import modules

    generator = torch.Generator().manual_seed(0)
    made: nn.Module
    if part == "text":
        length = max(text.num_tokens for text in spec.texts)
        made = modules.TextEncoder(module, penultimate=spec.family.startswith(_XL), pooled=pooled)
        inputs = {TOKENS: torch.randint(0, int(config["vocab_size"]), (2, length), generator=generator)}
        outputs = [EMBEDS, POOLED] if pooled else [EMBEDS]
    else:
        factor = 1 if part == "decoder" else spec.factor
        width = int(config.get("latent_channels", 4)) if part == "decoder" else spec.channels
        name, output = (LATENTS, PICTURES) if part == "decoder" else (PICTURES, MOMENTS)
        made = (modules.Decoder if part == "decoder" else modules.Encoder)(module, config)
        shape = (2, width, spec.tile[0] * factor, spec.tile[1] * factor)
        inputs, outputs = {name: torch.rand(shape, generator=generator) * 2 - 1}, [output]
    with torch.no_grad():
        given = made(*inputs.values())
    expected = dict(zip(outputs, given if pooled else [given], strict=True))
    if not all(bool(each.isfinite().all()) for each in expected.values()):
        raise NonFiniteError(
            got=f"NaN or infinity from the pipeline's {part}",
            expected="finite numbers: it runs in float32, whatever precision the network has",
            remedy=f"check the weights of the part: {DOWNLOAD}",
        )
    graph = export_encoder(made, inputs, outputs)
    inputs |= {name: torch.from_numpy(array) for name, array in lora.items()}
    check_encoder(graph, inputs, expected, f"pipeline's {part}")
    return graph

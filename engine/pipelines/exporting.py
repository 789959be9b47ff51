"""The parts of a pipeline's folder as graphs, kept in the user's cache. Needs torch, transformers and diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from safetensors.numpy import save

from skipstep.errors import ModelFormatError, NonFiniteError, SkipstepError, optional_package
from skipstep.networks.spec import NetworkSpec
from skipstep.networks.weights import DOWNLOAD, find_weights, tensor_shapes
from skipstep.pipelines.building import CHECKER, DECODERS, SMALL, TEXT_CLASSES, XL, FoundParts
from skipstep.pipelines.conditions import EMBEDS, POOLED, pooled_name
from skipstep.pipelines.pipeline import LATENTS, MARGINS, MOMENTS, PICTURES, TOKENS, MakePart, Pipeline
from skipstep.pipelines.spec import FOLDER, GOLDEN_FILE, MASK, UPSCALER, PipelineSpec
from skipstep.storage.untrusted import read_json_object

if TYPE_CHECKING:
    from torch import nn

    from skipstep.networks.lora_layers import Loras

_FORMAT: Final = 1


def export_parts(
    found: FoundParts,
    network: NetworkSpec,
    make: MakePart,
    report: Callable[[str], None],
    loras: Loras | None = None,
) -> Pipeline:
    """Raises MissingDependencyError, ModelFormatError, ExportError; InputError for LoRAs that do not fit."""
    from skipstep.networks.lora_layers import Loras

    loras = loras or Loras()
    files = {name: text.encode() for name, text in zip(found.spec.tokenizer_names(), found.tokenizers, strict=True)}
    for i, (name, class_name) in enumerate(found.texts):
        report(f"export {name}")
        files[f"{FOLDER}/text-{i}.onnx"] = _graph(found, name, class_name, "text", loras, found.spec.texts[i].pooled)
    for part in [name for name in found.spec.graph_names() if name in ("decoder", "encoder")]:
        report(f"export the {part} of {found.decoder}")
        files[f"{FOLDER}/{part}.onnx"] = _graph(found, found.decoder, DECODERS[found.decoder], part)
    if found.spec.checks:
        report("export the safety checker")
        files[f"{FOLDER}/checker.onnx"] = _graph(found, "safety_checker", CHECKER, "checker")
    if found.preview is not None:
        report("export the decoder of previews")
        files[f"{FOLDER}/preview.onnx"] = _graph(found, found.preview, SMALL, "preview")
    inputs = {f"text-{i}": loras.inputs.get(name, {}) for i, (name, _) in enumerate(found.texts)}
    made = Pipeline(found.spec, files.__getitem__, make, inputs=inputs)
    _check_widths(found, made, network)
    latents = np.random.default_rng(0).standard_normal((1, *found.sample_shape), np.float32)
    files[GOLDEN_FILE] = save(made.golden(latents))
    return made


def _graph(
    found: FoundParts, name: str, class_name: str, part: str, loras: Loras | None = None, pooled: bool = False
) -> bytes:
    from skipstep.bundles.cache import ArtefactCache
    from skipstep.bundles.cache_key import cache_key
    from skipstep.export.onnx_model import exporter_versions

    config = read_json_object(found.folder / name / "config.json", remedy=DOWNLOAD)
    weights = find_weights(found.folder / name, *(["model"] if part in ("text", "checker") else []))
    if part == "checker":
        config |= read_json_object(found.folder / "feature_extractor" / "preprocessor_config.json", remedy=DOWNLOAD)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        tensor_shapes(path)  # Refuses what is no whole file.
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())

    @cache
    def module() -> nn.Module:
        made = _load(found.folder / name, class_name, "fp16" if ".fp16" in weights[0].name else None)
        if loras is not None:
            loras.apply(name, made, "encoder")
        return made

    factors: Mapping[str, Any] = {}
    if loras is not None:
        digest.update(loras.key(name))
        if loras.rank is not None:
            module()  # Its slots are needed even where the graph is known.
            factors = loras.inputs.get(name, {})

    def export() -> bytes:
        return _exported(module(), part, found.spec, config, pooled, factors)

    key = cache_key(
        kind=f"pipeline {part}",
        weights=digest.hexdigest(),
        shape=repr((_FORMAT, class_name, found.spec.tile_of(part), found.spec.texts)),
        exporter=exporter_versions(),
    )
    return ArtefactCache().get_or_build(key, export, f"{part} of {class_name}, exported to ONNX")


def _check_widths(found: FoundParts, made: Pipeline, network: NetworkSpec) -> None:
    if not found.texts:
        return
    found_of = made.embed([("",) * len(found.texts)])
    names = {EMBEDS: "encoder_hidden_states", POOLED: pooled_name(network), MASK: MASK}
    given = {names[name]: each.shape[1:] for name, each in found_of.items()}
    read = {name: each.shape for name, each in network.all_conditions.items() if name in given}
    if given != read:
        raise ModelFormatError(
            got=f"text encoders in {found.folder} that give {given}",
            expected=f"what the network reads, {read}",
            remedy="check that the parts belong together: download the whole folder again",
        )


def _load(folder: Path, class_name: str, variant: str | None) -> nn.Module:
    remedy = "pip install 'skipstep[torch,diffusers,prompts]'"
    torch, transformers, diffusers, safety_checker = (
        optional_package(package, use="builds the parts of a pipeline's folder", remedy=remedy)
        for package in ("torch", "transformers", "diffusers", "diffusers.pipelines.stable_diffusion.safety_checker")
    )
    home, dtype = (transformers, "dtype") if class_name in TEXT_CLASSES else (diffusers, "torch_dtype")
    home, dtype = (safety_checker, "dtype") if class_name == CHECKER else (home, dtype)
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


def _exported(
    module: nn.Module, part: str, spec: PipelineSpec, config: Any, pooled: bool, factors: Mapping[str, Any]
) -> bytes:
    import torch

    from skipstep.export.encoder import check_encoder, export_encoder
    from skipstep.pipelines import modules

    generator = torch.Generator().manual_seed(0)
    made: nn.Module
    if part == "text":
        length = max(text.num_tokens for text in spec.texts)
        layer = -2 if spec.family.startswith(XL) else -1 if spec.family == UPSCALER else None
        made = modules.TextEncoder(module, layer=layer, pooled=pooled)
        inputs = {TOKENS: torch.randint(0, int(config["vocab_size"]), (2, length), generator=generator)}
        outputs = [EMBEDS, POOLED] if pooled else [EMBEDS]
    elif part == "checker":
        made = modules.SafetyChecker(module, config)
        inputs, outputs = {PICTURES: torch.rand((2, 3, spec.checks, spec.checks), generator=generator)}, [MARGINS]
    else:
        decodes = part != "encoder"
        factor = 1 if decodes else spec.factor
        width = int(config.get("latent_channels", 4)) if decodes else spec.channels
        name, output = (LATENTS, PICTURES) if decodes else (PICTURES, MOMENTS)
        made = (modules.Decoder if decodes else modules.Encoder)(module, config)
        shape = (2, width, *(side * factor for side in spec.tile_of(part)))
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
    inputs |= {name: torch.from_numpy(array) for name, array in factors.items()}
    check_encoder(graph, inputs, expected, f"pipeline's {part}")
    return graph

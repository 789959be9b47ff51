"""The safety checker of a folder: run unless it is said otherwise, with diffusers' verdicts."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tolerances
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny_pipelines import tiny_pipeline

from skipstep import Engine
from skipstep.errors import InputError, ModelFormatError

transformers = pytest.importorskip("transformers")

SEEDS = [1, 2, 3, 4]


def checked_pipeline() -> Any:
    """The tiny pipeline with a checker that refuses some of the pictures of SEEDS."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 12, "patch_size": 4}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    parts = {**tiny_pipeline("sd")[0].components, "safety_checker": checker, "feature_extractor": processor}
    pipeline = diffusers.StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    checker.concept_embeds.data = torch.randn(17, 8)
    checker.special_care_embeds.data = torch.randn(3, 8)
    with torch.no_grad():
        pixels = processor(draw(tiny_pipeline("sd")[0]).images, return_tensors="pt").pixel_values
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        near = torch.nn.functional.cosine_similarity(embeds[:, None], checker.concept_embeds[None], dim=2)
    # The middle of what they come to: one concept alone decides.
    concept = int(near.std(dim=0).argmax())
    ordered = near[:, concept].sort().values
    checker.concept_embeds_weights.data[concept] = (ordered[1] + ordered[2]) / 2
    return pipeline


def draw(pipeline: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline(["a cat"] * len(SEEDS), num_inference_steps=2, guidance_scale=1.0, generator=generators)


@pytest.mark.slow
def test_pictures_are_black_where_diffusers_finds_them_so(tmp_path, caplog):
    pipeline = checked_pipeline()
    pipeline.save_pretrained(tmp_path)
    expected = draw(pipeline)
    refused = expected.nsfw_content_detected
    assert sorted(refused) == [False, False, True, True]
    call: dict[str, Any] = {"plans": [2], "backend": "torch", "device": "cpu", "compatibility": "diffusers"}
    drawn: dict[str, Any] = {"prompt": "a cat", "steps": 2, "seeds": SEEDS, "noise": "torch", "output_type": "pil"}
    with Engine.build(str(tmp_path), **call) as engine, caplog.at_level(logging.WARNING, "skipstep"):
        found = engine.sample(**drawn)
        engine.save(tmp_path / "bundle", license="none")
    assert str(np.flatnonzero(refused).tolist()) in caplog.text
    off = [np.abs(np.asarray(a, int) - np.asarray(b, int)) for a, b in zip(found, expected.images, strict=True)]
    assert np.mean(np.stack(off) <= 1) >= tolerances.PIPELINE_PIXELS
    assert [not np.asarray(each).any() for each in found] == refused
    assert (tmp_path / "bundle/pipeline/checker.onnx").exists()
    with Engine.build(str(tmp_path), safety_checker=False, **call) as engine:
        assert all(np.asarray(each).any() for each in engine.sample(**drawn))


def test_a_checker_is_never_left_out_silently(tmp_path):
    folder = Path(shutil.copytree(tiny_pipeline("sd")[1], tmp_path / "sd"))
    call: dict[str, Any] = {"plans": [2], "backend": "torch", "device": "cpu"}
    with pytest.raises(InputError, match="which has none"):
        Engine.build(str(folder), safety_checker=True, **call)
    index = json.loads((folder / "model_index.json").read_text())
    for kind in ("StableDiffusionSafetyChecker", "OtherChecker"):
        checker = {"safety_checker": ["stable_diffusion", kind]}
        (folder / "model_index.json").write_text(json.dumps(index | checker))
        with pytest.raises(ModelFormatError, match=r"safety.checker") as caught:
            Engine.build(str(folder), **call)
        assert "safety_checker=False" in caught.value.remedy

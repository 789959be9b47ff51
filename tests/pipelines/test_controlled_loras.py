"""LoRAs of a network that is exported together with ControlNets."""

from __future__ import annotations

import numpy as np
import pytest
from lora_files import factors_of, write_lora
from PIL import Image
from tiny_pipelines import controlnet, tiny_pipeline

from skipstep import Engine


@pytest.mark.slow
def test_loras_update_the_network_beside_its_controlnets(tmp_path):
    pipeline, folder = tiny_pipeline("sd")
    controlnet().save_pretrained(tmp_path / "net")
    lora = write_lora(tmp_path / "a.safetensors", {"unet": factors_of(pipeline.unet, 2, 0)})
    options = {"plans": [2], "device": "cpu", "backend": "torch", "controlnet": tmp_path / "net"}
    call = {"steps": 2, "seeds": [1], "prompt": "a cat", "output_type": "latent"}
    call["control_image"] = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    with Engine.build(folder, **options) as plain:
        without = plain.sample(**call)
    with Engine.build(folder, **options, loras=[(lora, 1.0)]) as fused:
        expected = fused.sample(**call)
    assert not np.allclose(expected, without, atol=1e-3)
    with Engine.build(folder, **options, lora_rank=2) as engine:
        np.testing.assert_allclose(engine.sample(**call), without, atol=1e-4)
        engine.swap_loras([(lora, 1.0)])
        np.testing.assert_allclose(engine.sample(**call), expected, atol=1e-4)

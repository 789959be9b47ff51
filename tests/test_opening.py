"""What people have: pipeline objects beside folders, files and modules."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_files import text_unet
from safetensors.torch import load_file
from tiny_networks import tiny_unet

from skipstep import Engine
from skipstep.errors import InputError, ModelFormatError, PlanError
from skipstep.opening import open_model

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def pipeline():
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return diffusers.DDIMPipeline(tiny_unet(), scheduler)


def test_a_pipeline_samples_as_its_folder_does(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    options = {"plans": [4], "backend": "torch", "device": "cpu"}
    with Engine.build(pipeline, **options) as engine, Engine.build(tmp_path, **options) as same:
        assert engine.plans.keys() == same.plans.keys()
        np.testing.assert_array_equal(engine.sample(steps=4, seeds=1), same.sample(steps=4, seeds=1))


def test_a_pipelines_prompts(pipeline):
    unet, words = text_unet(), SimpleNamespace(model_max_length=5)
    whole = SimpleNamespace(unet=unet, scheduler=diffusers.DDIMScheduler(), tokenizer=words)
    assert open_model(whole).network.prompt_shape == (5, 6)
    assert open_model(whole, prompt_shape=(7, 6)).network.prompt_shape == (7, 6)
    whole.tokenizer.model_max_length = 10**30  # What transformers says where no limit is known.
    with pytest.raises(InputError, match=r"prompt_shape=\(77, 6\)"):
        open_model(whole)
    unet.register_to_config(addition_embed_type="text_time")
    with pytest.raises(InputError, match="projection_class_embeddings_input_dim"):
        open_model(whole)


def test_a_schedule_replaces_the_pipelines(pipeline):
    schedule = open_model(pipeline).scheduler.schedule
    with pytest.raises(PlanError):
        Engine.build(SimpleNamespace(unet=tiny_unet()), plans=[4], backend="torch", device="cpu")
    build = {"plans": [4], "backend": "torch", "device": "cpu", "schedule": schedule}
    with Engine.build(SimpleNamespace(unet=tiny_unet()), **build) as engine:
        assert next(iter(engine.plans.values())).prediction_type == "epsilon"


def test_what_is_no_model(pipeline):
    for wrong in (SimpleNamespace(vae=tiny_unet()), 3, None, {"unet": tiny_unet()}):
        with pytest.raises(InputError, match=r"pipeline\.unet"):
            open_model(wrong)
    with pytest.raises(InputError, match="leave config out"):
        open_model(pipeline, config="folder")


def test_sharded_half_precision_weights(tmp_path):
    unet = tiny_unet().half()
    unet.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="20KB")
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = open_model(tmp_path, with_scheduler=False).read().module().network.state_dict()
    assert all(torch.equal(loaded[name], each.float()) for name, each in unet.state_dict().items())
    shard = next((tmp_path / "unet").glob("*.safetensors"))
    assert load_file(shard)
    shard.unlink()
    with pytest.raises(ModelFormatError, match="shard"):
        open_model(tmp_path)


def test_a_scheduler_stands_for_the_one_that_came_with_the_model(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    other = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False)
    other.save_pretrained(tmp_path / "other")
    expected = open_model(tmp_path, scheduler=tmp_path / "other").scheduler
    assert (expected.prediction_type, expected.clip) == ("sample", None)
    for model in (pipeline, tmp_path, pipeline.unet):
        for scheduler in (other, tmp_path / "other/scheduler_config.json", dict(other.config)):
            assert open_model(model, scheduler=scheduler).scheduler == expected
    with pytest.raises(InputError, match="leave schedule out"):
        Engine.build(pipeline, plans=[4], scheduler=other, schedule=expected.schedule)
    with pytest.raises(ModelFormatError):
        open_model(pipeline, scheduler=tmp_path / "missing.json")

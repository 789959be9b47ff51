import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import tiny_unet

from skipstep import Engine, NoiseSchedule
from skipstep.errors import ModelFormatError, ScheduleError, UnsafeCheckpointError
from skipstep.networks.checkpoint import load_unet, read_checkpoint

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A pipeline folder as diffusers writes it, unconditional."""
    pipeline = diffusers.DDIMPipeline(tiny_unet(), diffusers.DDIMScheduler(prediction_type="v_prediction"))
    pipeline.save_pretrained(tmp_path)
    return tmp_path


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_reads_a_pipeline_folder(folder):
    checkpoint = read_checkpoint(folder)
    assert checkpoint.class_name == "UNet2DModel"
    assert checkpoint.sample_shape == (1, 8, 8)
    assert (checkpoint.num_classes, checkpoint.null_label, checkpoint.class_names) == (None, None, None)
    assert checkpoint.scheduler.prediction_type == "v_prediction"
    network = load_unet(checkpoint)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.inference_mode():
        torch.testing.assert_close(network(x, t).sample, tiny_unet()(x, t).sample, rtol=0, atol=0)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_reads_a_flat_folder(folder, tmp_path):
    """The network's and the scheduler's files side by side."""
    flat = tmp_path / "flat"
    shutil.copytree(folder / "unet", flat)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", flat)
    assert read_checkpoint(flat).scheduler.prediction_type == "v_prediction"
    with (
        Engine.build(flat, plans=[3], backend="torch") as engine,
        Engine.build(folder, plans=[3], backend="torch") as same,
    ):
        np.testing.assert_array_equal(engine.sample(steps=3, seeds=1), same.sample(steps=3, seeds=1))


def test_with_a_schedule_the_schedulers_file_is_not_read(folder):
    (folder / "scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(ModelFormatError, match=r"scheduler_config\.json"):
        Engine.build(folder, plans=[3], backend="torch")
    schedule = NoiseSchedule.linear(1000)
    with Engine.build(folder, plans=[3], backend="torch", schedule=schedule, prediction_type="v_prediction") as engine:
        (plan,) = engine.plans.values()
    assert (plan.schedule, plan.prediction_type, plan.clip) == (schedule, "v_prediction", 1.0)


def test_reads_a_bare_unet_folder(folder):
    checkpoint = read_checkpoint(folder / "unet")
    assert checkpoint.scheduler is None
    assert checkpoint.sample_shape == (1, 8, 8)
    load_unet(checkpoint)


def test_half_precision_weights_become_float32(folder):
    save_file({name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert {p.dtype for p in load_unet(read_checkpoint(folder)).parameters()} == {torch.float32}


def test_the_fp16_variant_is_found(folder):
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    load_unet(read_checkpoint(folder))


def test_shards(folder):
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / "unet" / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / WEIGHTS).unlink()
    index_file = folder / f"{WEIGHTS}.index.json"
    index_file.write_text(json.dumps(index))
    loaded = load_unet(read_checkpoint(folder)).state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in names)

    (folder / "unet/b.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(ModelFormatError, match=r"no shard .*b\.safetensors"):
        read_checkpoint(folder)
    index["weight_map"] = dict.fromkeys(names, "../b.safetensors")
    index_file.write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=r"\.\./b\.safetensors"):
        read_checkpoint(folder)
    index_file.write_text("{}")
    with pytest.raises(ModelFormatError, match="weight_map"):
        read_checkpoint(folder)


def test_classes(tmp_path):
    tiny_unet(num_class_embeds=4).save_pretrained(tmp_path / "unet")
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.num_classes, checkpoint.null_label) == (4, None)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"id2label": {"2": "c", "0": "a", "1": "b"}}))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.num_classes, checkpoint.null_label, checkpoint.class_names) == (3, 3, ("a", "b", "c"))
    for wrong in ({"0": "a"}, {"1": "a"}, ["a"], {}):
        index.write_text(json.dumps({"id2label": wrong}))
        with pytest.raises(ModelFormatError, match="id2label"):
            read_checkpoint(tmp_path)


def test_digest_is_of_configuration_and_weights(folder):
    digest = read_checkpoint(folder).digest()
    assert digest == read_checkpoint(folder / "unet").digest()
    edit_json(folder / "unet/config.json", sample_size=16)
    changed = read_checkpoint(folder).digest()
    assert changed != digest
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, folder / WEIGHTS)
    assert read_checkpoint(folder).digest() not in (digest, changed)


def with_config(**changes):
    return lambda folder: edit_json(folder / "unet/config.json", **changes)


def with_bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def with_header(header):
    return with_bytes(WEIGHTS, struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (shutil.rmtree, "no folder"),
        (lambda folder: shutil.rmtree(folder / "unet"), r"config\.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no weights"),
        (with_config(_class_name="os.system"), r"os\.system"),
        *((with_config(sample_size=size), "sample_size") for size in (None, "8", [8], [8, "8"])),
        *(
            (with_bytes("unet/config.json", content), r"config\.json")
            for content in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000)
        ),
        *(
            (with_header(header), "safetensors")
            for header in (b"{", b"[]", b'{"x": 3}', b'{"x": {"data_offsets": "no"}}', b"[" * 100_000)
        ),
        (lambda folder: edit_json(folder / "scheduler/scheduler_config.json", beta_schedule="quadratic"), "quadratic"),
    ],
)
def test_a_damaged_folder_is_refused(folder, harm, said):
    harm(folder)
    with pytest.raises(ScheduleError if said == "quadratic" else ModelFormatError, match=said):
        read_checkpoint(folder)


def test_arguments_that_the_class_does_not_have(folder):
    edit_json(folder / "unet/config.json", layers_per_block=None)
    with pytest.raises(ModelFormatError, match="UNet2DModel"):
        load_unet(read_checkpoint(folder))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_a_pickle_is_refused_unread_and_the_remedy_converts_it(folder, name):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(folder / "harm"),)

    pickled = folder / "unet" / name
    torch.save({"x": Harm()}, pickled)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_checkpoint(folder)
    assert not (folder / "harm").exists()
    assert name in caught.value.got

    torch.save(tiny_unet().state_dict(), pickled)
    command = caught.value.remedy.split("python -c ", 1)[1].strip('"')
    exec(command)
    load_unet(read_checkpoint(folder))


def test_truncated_weights(folder):
    weights = folder / WEIGHTS
    whole = weights.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError, match=r"diffusion_pytorch_model\.safetensors"):
            read_checkpoint(folder)
    weights.write_bytes(whole + b"\0")
    with pytest.raises(ModelFormatError, match="whole safetensors"):
        read_checkpoint(folder)


def test_weights_of_another_network(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["extra.weight"] = torch.zeros(1)
    tensors["conv_in.bias"] = torch.zeros(3)
    del tensors["conv_out.bias"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelFormatError) as caught:
        load_unet(read_checkpoint(folder))
    for name in ("extra.weight", "conv_in.bias", "conv_out.bias"):
        assert name in caught.value.got

"""Engines of other people's .onnx files draw what engines of the same modules draw."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx_files import batch_axes, text_unet, write_onnx
from tiny_networks import LearnedVariance, Running, Wide, tiny_unet

import skipstep
from skipstep import Engine, NoiseSchedule, Plan
from skipstep.errors import ExportError, InputError, ModelFormatError
from skipstep.export.onnx_file import read_onnx
from skipstep.networks.graphs import Binding

SCHEDULE = NoiseSchedule.linear(1000)
# A network of random weights that predicts noise has its rounding magnified a hundred times where there is most noise.
PREDICTS = {"schedule": SCHEDULE, "prediction_type": "v_prediction"}
PLAN = Plan(steps=4, **PREDICTS)
OPTIONS = {"plans": [PLAN], "device": "cpu", "batch_sizes": [1, 3], "compile_on_miss": True, **PREDICTS}
STATE = torch.zeros(2, 1, 8, 8)
INTEGERS = torch.zeros(2, dtype=torch.int64)
TEXT = {"latent": torch.zeros(2, 2, 8, 8), "timestep": INTEGERS, "encoder_hidden_states": torch.zeros(2, 5, 6)}


def compare(engine: Engine, same: Engine, **call: object) -> None:
    """Equal within 1e-5 of the largest value."""
    for seeds in ([1], [1, 2, 3], [1, 2, 3, 4, 5]):
        found, expected = (each.sample(plan=PLAN, seeds=seeds, **call) for each in (engine, same))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.fixture(scope="module")
def expected():
    with Engine.build(tiny_unet(), backend="torch", **OPTIONS) as engine:
        yield engine


# How exporters write the same network: the state's batch, the timestep, what is dynamic, which exporter.
FORMS = {
    "graph, dynamic": (2, INTEGERS, ["noisy", "sigma"], True),
    "graph, one number": (2, torch.tensor(3), ["noisy"], True),
    "graph, batch of 2": (2, INTEGERS, [], True),
    "graph, batch of 1": (1, torch.zeros(1), [], True),
    "script, dynamic": (2, INTEGERS, ["noisy", "sigma"], False),
    "script, one number": (2, torch.tensor(3), ["noisy"], False),
    "script, a vector of one": (2, torch.zeros(1), ["noisy"], False),
    "script, batch of 2": (2, INTEGERS, [], False),
    "script, batch of 3, one number": (3, torch.tensor(3.0), [], False),
}


QUICK = ("graph, dynamic", "script, batch of 3, one number")


@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_samples_are_those_of_the_module(form, tmp_path, expected):
    batch, timestep, dynamic, graph_exporter = FORMS[form]
    file = write_onnx(
        tmp_path / "unet.onnx",
        tiny_unet(),
        {"noisy": torch.zeros(batch, 1, 8, 8), "sigma": timestep},
        dynamic=batch_axes(dynamic),
        graph_exporter=graph_exporter,
        opset=20 if graph_exporter else 17,
        external=graph_exporter,
    )
    assert (tmp_path / "unet.onnx.data").exists() == graph_exporter
    with Engine.build(file, inputs={"sample": "noisy", "timestep": "sigma"}, **OPTIONS) as engine:
        assert engine.backend == "onnxruntime"
        assert engine.network.fractional_timesteps == timestep.is_floating_point()
        compare(engine, expected)
        # The timestep's part has left the loop: it has a row for each sample.
        assert len(engine.source.partition().nodes[Binding.PLAN]) > 20
        # Samples of one call with timesteps of their own.
        plans = [PLAN, Plan(steps=4, **PREDICTS, spacing="leading")]
        found, same = (each.sample(plan=plans, seeds=[1, 2]) for each in (engine, expected))
        np.testing.assert_allclose(found, same, rtol=0, atol=1e-5 * float(np.abs(same).max()))


@pytest.mark.parametrize("graph_exporter", [pytest.param(True, marks=pytest.mark.slow), False])
def test_prompts_and_names_as_optimum_writes_them(graph_exporter, tmp_path):
    dynamic = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "timestep": {0: "batch"},
        "encoder_hidden_states": {0: "batch", 1: "tokens"},
    }
    inputs = dict(zip(dynamic, TEXT.values(), strict=True))
    if graph_exporter:  # It proves what is dynamic, and attention over any height is not.
        dynamic = batch_axes(dynamic)
    folder = tmp_path / "unet"
    folder.mkdir()
    file = write_onnx(
        folder / "model.onnx",
        text_unet(),
        inputs,
        dynamic=dynamic,
        graph_exporter=graph_exporter,
        output="out_sample",
        opset=20 if graph_exporter else 17,
    )
    shape = {} if graph_exporter else {"prompt_shape": (5, 6), "sample_shape": (2, 8, 8)}
    with (
        Engine.build(file, **OPTIONS, **shape) as engine,
        Engine.build(text_unet(), backend="torch", prompt_shape=(5, 6), **OPTIONS) as same,
    ):
        assert engine.network == replace(same.network, fractional_timesteps=False)
        rng = np.random.default_rng(0)
        prompt, negative = rng.standard_normal((2, 1, 5, 6)).astype(np.float32)
        compare(engine, same, prompt_embeds=prompt)
        compare(engine, same, prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=2.0)
    if not graph_exporter:  # What lies beside the file says the rest.
        text_unet().save_config(folder)
        diffusers = pytest.importorskip("diffusers")
        diffusers.DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
        with Engine.build(file, plans=[4], device="cpu", prompt_shape=(5, 6)) as engine:
            assert engine.network.sample_shape == (2, 8, 8)
            assert next(iter(engine.plans.values())).prediction_type == "v_prediction"


def test_class_labels_and_how_many_there_are(tmp_path):
    unet = tiny_unet(num_class_embeds=4)
    inputs = {"x": STATE, "t": INTEGERS, "y": INTEGERS}
    file = write_onnx(tmp_path / "unet.onnx", unet, inputs, dynamic=batch_axes(list(inputs)))
    said: list[str] = []
    with (
        Engine.build(file, null_label=3, progress=said.append, **OPTIONS) as engine,
        Engine.build(unet, null_label=3, backend="torch", **OPTIONS) as same,
    ):
        assert engine.network == replace(same.network, fractional_timesteps=False)
        compare(engine, same, class_labels=2)
        compare(engine, same, class_labels=1, guidance_scale=3.0)
    assert "sample is 'x', by its name; timestep is 't', by its name; class_labels is 'y', by its name" in said[0]
    assert "4 labels, the rows of the table" in said[0]


def test_half_precision_files_are_float32_outside(tmp_path):
    file = write_onnx(tmp_path / "unet.onnx", tiny_unet(), {"noisy": STATE, "sigma": torch.zeros(2)})
    model = onnx.load(file)
    ours = onnx.load_from_string(read_onnx(file).graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            halved = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(halved, tensor.name))
    for node in model.graph.node:
        if "upsamplers" in node.output[0]:  # Scales of a size are float32 always.
            continue
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.FLOAT:
                halved = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(halved, attribute.t.name))
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    halves = onnx.load_from_string(read_onnx(tmp_path / "half.onnx").graph)
    for graph in (ours.graph, halves.graph):
        assert [each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)] == [1, 1, 1]
    with Engine.build(tmp_path / "half.onnx", **OPTIONS) as engine, Engine.build(file, **OPTIONS) as same:
        found, expected = (each.sample(steps=4, seeds=[1, 2, 3]) for each in (engine, same))
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert 0 < error < 0.05


def test_a_learned_variance_is_seen(tmp_path):
    file = write_onnx(tmp_path / "net.onnx", LearnedVariance(), {"x": STATE, "t": INTEGERS})
    assert read_onnx(file).spec.learns_variance


def test_a_bundle_of_a_file(tmp_path, expected):
    file = write_onnx(tmp_path / "unet.onnx", tiny_unet(), {"noisy": STATE, "sigma": INTEGERS})
    with Engine.build(file, **OPTIONS) as engine:
        engine.save(tmp_path / "bundle", license="none", targets=["cpu", "tensorrt", "onnx-loop"], precision="float16")
        drawn = engine.sample(steps=4, seeds=[1, 2, 3])
    with skipstep.load(tmp_path / "bundle") as loaded:
        np.testing.assert_array_equal(loaded.sample(steps=4, seeds=[1, 2, 3]), drawn)
        compare(loaded, expected)
        assert loaded.source.bundle.manifest.model == "unet"


def test_without_torch(tmp_path):
    file = write_onnx(tmp_path / "unet.onnx", tiny_unet(), {"noisy": STATE, "sigma": INTEGERS})
    program = """
import sys
for name in ("torch", "diffusers", "triton"):
    sys.modules[name] = None
from skipstep import Engine, NoiseSchedule
engine = Engine.build(sys.argv[1], plans=[4], schedule=NoiseSchedule.linear(1000))
print(engine.sample(steps=4, seeds=[1, 2]).shape, engine.backend, engine.device)
engine.save(sys.argv[2], license="none")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, file, tmp_path / "bundle"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(2, 1, 8, 8) onnxruntime cpu", done.stderr
    assert (tmp_path / "bundle/manifest.json").exists()


def test_a_graph_that_mixes_samples_is_refused(tmp_path):
    """The timestep's mean over the batch: no row of a batch has it for itself."""
    for network in (Wide(), Running()):
        file = write_onnx(tmp_path / "net.onnx", network, {"x": STATE, "t": INTEGERS}, dynamic=batch_axes(["x", "t"]))
        with pytest.raises((ModelFormatError, ExportError)) as caught:
            Engine.build(file, **OPTIONS)
        assert "torch" not in caught.value.remedy


class Mixing(torch.nn.Module):
    """Puts the batch where rows are not: behind the channels."""

    def forward(self, x, t):
        flat = x.permute(1, 0, 2, 3).reshape(1, x.shape[0] * 64)
        return torch.cumsum(flat, 1).reshape(1, x.shape[0], 8, 8).permute(1, 0, 2, 3) * t.view(-1, 1, 1, 1)


def test_a_fixed_batch_that_does_not_come_out_and_its_remedy(tmp_path):
    file = write_onnx(tmp_path / "net.onnx", Mixing(), {"noisy": STATE, "sigma": torch.ones(2)})
    with pytest.raises(ModelFormatError, match="batch of 2") as caught:
        Engine.build(file, **OPTIONS)
    axes = eval(caught.value.remedy.split("dynamic_axes=")[1])
    assert axes == {"noisy": {0: "batch"}, "sigma": {0: "batch"}}
    again = write_onnx(tmp_path / "net.onnx", tiny_unet(), {"noisy": STATE, "sigma": torch.ones(2)}, dynamic=axes)
    Engine.build(again, **OPTIONS).close()


class OneNumber(torch.nn.Module):
    """Needs the timestep as one number: as a length."""

    def forward(self, x, t):
        return x * torch.arange(64, device=x.device).view(1, 1, 8, 8).lt(t.to(torch.int64)).to(x.dtype).softmax(-1)


def test_one_timestep_for_all_samples(tmp_path):
    file = write_onnx(tmp_path / "net.onnx", OneNumber(), {"x": STATE, "t": torch.tensor(3)}, dynamic=batch_axes(["x"]))
    with pytest.raises(ModelFormatError, match="one number for all samples") as caught:
        Engine.build(file, **OPTIONS)
    assert "[batch]" in caught.value.remedy


def test_torch_does_not_run_it_and_the_remedy_does(tmp_path):
    file = write_onnx(tmp_path / "unet.onnx", tiny_unet(), {"x": STATE, "t": INTEGERS})
    with pytest.raises(InputError, match="backend='onnxruntime'"):
        Engine.build(file, backend="torch", **OPTIONS)
    with Engine.build(file, backend="onnxruntime", **OPTIONS) as engine, pytest.raises(InputError, match="runs graphs"):
        engine.source.module()


def test_sizes_that_the_file_leaves_open(tmp_path):
    dynamic = {"sample": {0: "n", 2: "h", 3: "w"}, "timestep": {0: "n"}, "encoder_hidden_states": {0: "n", 1: "l"}}
    inputs = dict(zip(dynamic, TEXT.values(), strict=True))
    file = write_onnx(tmp_path / "unet.onnx", text_unet(), inputs, dynamic=dynamic)
    with pytest.raises(ModelFormatError, match="sample_shape") as caught:
        Engine.build(file, **OPTIONS)
    assert caught.value.remedy == "pass sample_shape, e.g. sample_shape=(4, 64, 64)"
    shape = {"sample_shape": (2, 8, 8)}
    with pytest.raises(ModelFormatError, match=r"prompt_shape=\(77, 6\)"):
        Engine.build(file, **OPTIONS, **shape)
    assert read_onnx(file, **shape, prompt_shape=(77, 6)).spec.prompt_shape == (77, 6)
    with pytest.raises(InputError, match=r"sample_shape \(4, 8, 8\)"):
        read_onnx(file, sample_shape=(4, 8, 8), prompt_shape=(77, 6))
    (tmp_path / "config.json").write_text(json.dumps({"in_channels": 4, "sample_size": 8}))
    with pytest.raises(InputError, match=r"config\.json"):
        Engine.build(file, **OPTIONS, prompt_shape=(77, 6))


def test_options_that_the_file_does_not_have(tmp_path):
    file = write_onnx(tmp_path / "unet.onnx", tiny_unet(), {"x": STATE, "t": INTEGERS})
    for option, value in {"prompt_shape": (77, 6), "num_classes": 3, "fractional_timesteps": True}.items():
        with pytest.raises(InputError, match=f"leave {option} out"):
            Engine.build(file, **OPTIONS, **{option: value})
    with pytest.raises(InputError, match="leave config out"):
        Engine.build(file, **OPTIONS, config=tmp_path)
    with pytest.raises(InputError, match="leave inputs out"):
        Engine.build(tiny_unet(), **OPTIONS, inputs={"sample": "x"})

"""Model repositories, read with the server's own schema.

The schema is in the package tritonclient[grpc] (pip install 'tritonclient[grpc]'); without it only refusals are tested.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from engines import SCHEDULE, labelled_engine, parts_of
from google.protobuf import text_format
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from tiny_networks import Labelled

from skipstep import Plan
from skipstep.bundles.bundle import open_bundle
from skipstep.errors import ExportError, InputError
from skipstep.export.onnx_sampler import build_sampler
from skipstep.export.triton_server import batcher_repository, model_config, model_repository
from skipstep.networks.condition import Condition
from skipstep.networks.spec import NetworkSpec

QUIET, NOISY = Plan(schedule=SCHEDULE, steps=3), Plan(schedule=SCHEDULE, steps=3, eta=1.0)


@pytest.fixture(scope="module")
def graphs():
    """Samplers of a labelled network by what the server has to know of them."""
    network = NetworkSpec((1, 4, 4), num_classes=9, null_label=9)
    parts = parts_of(Labelled(), network)
    return {
        "open": build_sampler(parts, network, QUIET, batch_size=None, guided=True),
        "fixed": build_sampler(parts, network, QUIET, batch_size=2),
        "noisy": build_sampler(parts, network, NOISY, batch_size=None),
        "seeded": build_sampler(parts, network, NOISY, batch_size=None, noise="seeds"),
        "seen": build_sampler(parts, network, QUIET, batch_size=None, trajectory=True),
    }


def parsed(text):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="pip install 'tritonclient[grpc]'")
    return text_format.Parse(text, schema.ModelConfig()), schema


def shapes(tensors):
    """By name what the server's requests look like, and what reaches the graph."""
    return {
        each.name: (list(each.dims), list(each.reshape.shape) if each.HasField("reshape") else list(each.dims))
        for each in tensors
    }


def test_an_open_batch_is_the_servers_to_fill(graphs):
    config, schema = parsed(model_config("fashion-3", graphs["open"], max_batch_size=16))
    assert config.name == "fashion-3"
    assert (config.platform, config.backend) == ("onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 16
    assert config.HasField("dynamic_batching")
    # A request's dims cannot be empty: one number a sample is a dim of 1, which is taken away again.
    assert shapes(config.input) == {
        "x_T": ([1, 4, 4], [1, 4, 4]),
        "class_labels": ([1], []),
        "guidance_scale": ([1], []),
    }
    assert shapes(config.output) == {"x_0": ([1, 4, 4], [1, 4, 4])}
    types = {each.name: each.data_type for each in config.input}
    assert types == {
        "x_T": schema.TYPE_FP32,
        "class_labels": schema.TYPE_INT64,
        "guidance_scale": schema.TYPE_FP32,
    }


def test_seeds_are_numbers_of_64_bits(graphs):
    config, schema = parsed(model_config("fashion-3", graphs["seeded"]))
    assert config.max_batch_size == 8
    assert {each.name: each.data_type for each in config.input} == {
        "seeds": schema.TYPE_UINT64,
        "class_labels": schema.TYPE_INT64,
    }


def test_no_batching_where_a_first_dimension_is_not_the_batch(graphs):
    for name, tensor, dims in (
        ("fixed", "class_labels", [2]),
        ("fixed", "x_T", [2, 1, 4, 4]),
        ("fixed", "x_0", [2, 1, 4, 4]),
        ("noisy", "noise", [3, -1, 1, 4, 4]),
        ("noisy", "x_T", [-1, 1, 4, 4]),
        ("seen", "x_t", [3, -1, 1, 4, 4]),
    ):
        config, _ = parsed(model_config(name, graphs[name]))
        assert config.max_batch_size == 0
        assert not config.HasField("dynamic_batching")
        assert shapes([*config.input, *config.output])[tensor] == (dims, dims)


def test_a_config_says_what_the_runtime_says(graphs):
    """The server compares the two when it loads a model: names, ranks and every dimension that is not open."""
    for name, graph in graphs.items():
        config, _ = parsed(model_config(name, graph))
        session = InferenceSession(graph, providers=["CPUExecutionProvider"])
        for here, there in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [each.name for each in here] == [each.name for each in there]
            for declared, actual in zip(shapes(here).values(), there, strict=True):
                batch = [-1] if config.max_batch_size else []
                assert [*batch, *declared[1]] == [n if isinstance(n, int) else -1 for n in actual.shape]


def test_instances_run_where_they_are_told(graphs):
    for device, kind in (("cpu", "KIND_CPU"), ("gpu", "KIND_GPU")):
        config, schema = parsed(model_config("model", graphs["open"], device=device, instances=3))
        (group,) = config.instance_group
        assert (group.count, group.kind) == (3, getattr(schema.ModelInstanceGroup, kind))
    # Batches of one are nothing to wait for.
    config, _ = parsed(model_config("model", graphs["open"], max_batch_size=1))
    assert not config.HasField("dynamic_batching")


def test_a_repository_is_one_folder_a_model(graphs):
    files = model_repository(graphs)
    assert files.keys() == {f"{name}/{file}" for name in graphs for file in ("config.pbtxt", "1/model.onnx")}
    session = InferenceSession(files["open/1/model.onnx"], providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    given = {
        "x_T": rng.standard_normal((2, 1, 4, 4), dtype=np.float32),
        "class_labels": np.array([1, 2]),
        "guidance_scale": np.ones(2, np.float32),
    }
    assert np.isfinite(session.run(["x_0"], given)[0]).all()
    with pytest.raises(InputError, match="no ONNX model"):
        model_repository({"good": graphs["fixed"], "bad": b"\xff\xff\xff"})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "-a", "a\n", "ä", "x" * 201, 'a"b'])
def test_names_are_file_names(graphs, name):
    with pytest.raises(InputError, match="model name"):
        model_config(name, graphs["fixed"])


def test_what_no_server_takes_is_refused(graphs):
    with pytest.raises(InputError, match="differ in more than case"):
        model_repository({"a": graphs["fixed"], "A": graphs["fixed"]})
    with pytest.raises(InputError, match="no graphs"):
        model_repository({})
    for option in ({"max_batch_size": 0}, {"instances": True}, {"device": "tpu"}):
        with pytest.raises(InputError, match=f"got {next(iter(option))}="):
            model_config("a", graphs["fixed"], **option)
    text = helper.make_tensor_value_info("text", TensorProto.STRING, [1])
    node = helper.make_node("Identity", ["text"], ["same"])
    same = helper.make_tensor_value_info("same", TensorProto.STRING, [1])
    model = helper.make_model(helper.make_graph([node], "words", [text], [same]))
    with pytest.raises(ExportError, match="text of "):
        model_config("a", model.SerializeToString())


def test_tensor_names_are_quoted():
    name = 'a "name"\\'
    tensor = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph([helper.make_node("Abs", [name], ["out"])], "g", [tensor], [out])
    config, _ = parsed(model_config("a", onnx.ModelProto(graph=graph).SerializeToString()))
    assert config.input[0].name == name


def test_a_batcher_takes_what_the_network_does(graphs):
    conditions = {"style": Condition((5,)), "strength": Condition((), null=0.0)}
    network = NetworkSpec((1, 4, 4), num_classes=9, null_label=9, conditions=conditions)
    files = batcher_repository("a", network, instances=2, decoupled=True, num_threads="3")
    assert files.keys() == {"a/config.pbtxt", "a/1/model.py"}
    compile(files["a/1/model.py"], "model.py", "exec")
    config, schema = parsed(files["a/config.pbtxt"].decode())
    assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == ("python", 16, True)
    assert {key: each.string_value for key, each in config.parameters.items()} == {
        "bundle": "../../..",
        "num_threads": "3",
    }
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, schema.ModelInstanceGroup.KIND_CPU)
    assert [each.name for each in config.input if not each.optional] == ["seeds"]
    found = shapes(config.input)
    assert found["seeds"] == found["plan"] == found["class_labels"] == found["strength"] == ([1], [])
    assert found["style"] == found["negative_style"] == ([5], [5])
    assert "negative_strength" not in found
    assert shapes(config.output) == {"samples": ([1, 4, 4], [1, 4, 4])}
    with pytest.raises(InputError, match="max_batch_size"):
        batcher_repository("a", network, max_batch_size=0)


def test_an_export_holds_the_graphs_and_the_bundle_behind_a_batcher(tmp_path):
    with labelled_engine() as engine:
        engine.save(tmp_path / "a.bundle", license="none", targets=["server"])
    opened = open_bundle(tmp_path / "a.bundle")
    opened.refuse_other_files()
    for name, decoupled in (("Labelled-batcher", False), ("Labelled-stream", True)):
        config, _ = parsed(opened.read(f"server/{name}/config.pbtxt").decode())
        assert (config.name, config.model_transaction_policy.decoupled) == (name, decoupled)
        version = opened.path / f"server/{name}/1"
        assert (version / config.parameters["bundle"].string_value).resolve() == opened.path.resolve()

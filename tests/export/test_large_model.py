"""A small network through the path of networks above 2 GiB, whose limit is lowered: every stage, with the same bits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import engines
import numpy as np
import onnx
import pytest
import tolerances
import torch
from bundle_cases import make
from engine_builds import model
from hostile_json import rewrite
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save

from skipstep import load
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.cache import ArtefactCache
from skipstep.errors import BundleError, ExportError, InputError, IntegrityError
from skipstep.export import bundle_files, large_model, onnx_model
from skipstep.export.bundle_rewriter import rewrite_bundle
from skipstep.export.large_model import outside
from skipstep.export.weight_storage import compress_weights, expand_weights
from skipstep.networks.large_graph import LargeGraph, weights_of

SHARD = "network/step.onnx.0.safetensors"


@pytest.fixture
def lowered(monkeypatch):
    lower(monkeypatch)


def lower(patch: pytest.MonkeyPatch) -> None:
    """Weights from 4 KiB on leave every graph, in files of 64 KiB; exports are made anew."""
    patch.setattr(large_model, "LARGE_BYTES", 1)
    patch.setattr(large_model, "WEIGHT_BYTES", 1 << 12)
    patch.setattr(bundle_files, "PART_BYTES", 1 << 16)
    patch.setattr(onnx_model, "export_onnx", engines._export)


class Weighted(torch.nn.Module):
    """Most of its weights are large, some follow from the timestep alone, and float16 holds all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.film = torch.nn.Linear(1, 64), torch.nn.Linear(64, 256)
        self.inner, self.outer = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        for weight in self.parameters():
            weight.data = weight.data.half().float()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = self.film(torch.tanh(self.time(timestep.float().unsqueeze(-1) / 1000)))
        return self.outer(torch.tanh(self.inner(sample.flatten(1)) * scale)).reshape(sample.shape)


def saved_to(folder: Path, **options: Any) -> Path:
    with make(Weighted(), plans=[2], batch_sizes=[1], sample_shape=(1, 8, 8)) as engine:
        engine.save(folder, license="MIT", **options)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved_to(tmp_path_factory.mktemp("whole") / "bundle", targets=["tensorrt"], precision="float16")


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        lower(patch)
        return saved_to(tmp_path_factory.mktemp("apart") / "bundle", targets=["tensorrt"], precision="float16")


@pytest.fixture
def copy(apart, tmp_path):
    return Path(shutil.copytree(apart, tmp_path / "bundle"))


def drawn(folder: Path, backend: str = "onnxruntime") -> np.ndarray:
    with load(folder, backend=backend) as engine:
        return engine.sample(steps=2, seeds=3)


def arrays(graph: bytes) -> dict[str, bytes]:
    tensors = onnx.load_from_string(graph).graph.initializer
    return {each.name: large_model.array_of(each, weights_of(graph)).tobytes() for each in tensors}


def test_the_same_bits_as_from_one_file(whole, apart):
    np.testing.assert_array_equal(drawn(apart), drawn(whole))


@pytest.mark.parametrize("part", ["plan", "step", "step-float16"])
def test_every_part_has_the_same_weights_and_other_tools_find_them(whole, apart, part):
    name = f"network/{part}.onnx"
    graph = open_bundle(apart).read_graph(name)
    assert weights_of(graph)
    expected = arrays(open_bundle(whole).read_graph(name))
    assert arrays(graph) == expected
    onnx.checker.check_model(str(apart / name))
    found = onnx.load(apart / name).graph.initializer
    assert {each.name: numpy_helper.to_array(each).tobytes() for each in found} == expected
    for file in (apart / "network").glob(f"{part}.onnx.*"):
        assert len(load_file(file)) == 1 or file.stat().st_size <= (1 << 16) + 4096


def test_what_is_halved_for_storage_is_widened_for_builders():
    weights = {"w": np.arange(6.0, dtype=np.float32), "v": np.array([1e-9], np.float32)}
    tensors = [outside(name, each) for name, each in weights.items()]
    nodes = [helper.make_node("Sum", ["x", *weights], ["y"], name="sum")]
    graph = LargeGraph(model(*nodes, weights=tensors), weights)
    stored = compress_weights(graph)
    assert {name: each.dtype for name, each in weights_of(stored).items()} == {"w/stored": "float16", "v": "float32"}
    again = expand_weights(stored)
    assert again == graph
    np.testing.assert_array_equal(weights_of(again)["w"], weights["w"])


HARM = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "missing": lambda path: path.unlink(),
    "a link": lambda path: path.symlink_to(path.rename(path.parents[2] / "moved")),
    "a hard link": lambda path: os.link(path, path.parents[2] / "second"),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_weights_that_are_not_as_promised_are_refused(copy, harm):
    harm(copy / SHARD)
    with pytest.raises(IntegrityError, match=r"step\.onnx\.0\.safetensors"):
        drawn(copy)


def test_paths_in_a_graph_lead_nowhere(copy, apart):
    """The graph's own places of its weights are for other tools: here the verified arrays take their place by name."""
    changed = onnx.load(copy / "network/step.onnx", load_external_data=False)
    for each in changed.graph.initializer:
        for entry in each.external_data:
            entry.value = "/etc/passwd" if entry.key == "location" else "0"
    rewrite(copy, "network/step.onnx", changed.SerializeToString())
    np.testing.assert_array_equal(drawn(copy), drawn(apart))


def in_a_node(folder: Path) -> None:
    changed = onnx.load(folder / "network/step.onnx", load_external_data=False)
    value = helper.make_attribute("value", next(t for t in changed.graph.initializer if large_model.is_outside(t)))
    changed.graph.node.append(helper.make_node("Constant", [], ["unread"]))
    changed.graph.node[-1].attribute.append(value)
    rewrite(folder, "network/step.onnx", changed.SerializeToString())


def of_no_shard(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"] = {name: each for name, each in manifest["files"].items() if "step.onnx." not in name}
    (folder / "manifest.json").write_text(json.dumps(manifest))


REFUSED = {
    "a file in a node": (in_a_node, "refers to other files"),
    "files that the manifest lacks": (of_no_shard, "refers to other files"),
    "no graph": (lambda f: rewrite(f, "network/step.onnx", b"\x3a\xff"), "has a number without an end"),
    "another dtype": (lambda f: rewrite(f, SHARD, save({"w": np.zeros(1, np.uint64)})), "of dtype uint64"),
    "no tensors": (lambda f: rewrite(f, SHARD, b"\0" * 64), "no safetensors file"),
}


@pytest.mark.parametrize(("harm", "said"), REFUSED.values(), ids=REFUSED)
def test_a_graph_that_leads_elsewhere_is_refused(copy, harm, said):
    harm(copy)
    with pytest.raises(BundleError, match=said):
        drawn(copy)


def test_weights_of_another_graph_are_refused_by_the_runtime(copy):
    rewrite(copy, SHARD, save({"w": np.zeros((2, 2), np.float32)}))
    with pytest.raises(ExportError, match="does not take"):
        drawn(copy)


def test_a_bundle_that_is_rewritten_keeps_its_weights(copy, apart):
    bundle = open_bundle(copy)
    rewrite_bundle(bundle, bundle.manifest, {"note.txt": b"more"})
    np.testing.assert_array_equal(drawn(copy), drawn(apart))


def test_what_needs_one_graph_is_refused_with_a_remedy(lowered, tmp_path):
    with pytest.raises(InputError, match=r"whole loops.*leave onnx-loop, onnx-unrolled, server and trtexec out"):
        saved_to(tmp_path / "bundle", targets=["onnx-loop"])
    assert not (tmp_path / "bundle").exists()
    saved_to(tmp_path / "bundle", targets=[])


def test_the_cache_keeps_no_part_of_it(tmp_path):
    cache, graph = ArtefactCache(tmp_path), LargeGraph(b"model", {"w": np.zeros(1)})
    assert cache.get_or_build("0" * 64, lambda: graph, "large") is graph
    assert cache.get("0" * 64) is None


def test_tensorrt_builds_the_same_engine():
    pytest.importorskip("tensorrt_rtx")
    from skipstep.export.tensorrt_engine import build_engine

    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    inside = model(node, dtype=TensorProto.FLOAT, weights=[numpy_helper.from_array(weight, "w")])
    beside = LargeGraph(model(node, dtype=TensorProto.FLOAT, weights=[outside("w", weight)]), {"w": weight})
    options: dict[str, Any] = {"library": "tensorrt_rtx", "compute_capability": 89, "batch_sizes": [1]}
    one, other = (build_engine(graph, **options) for graph in (inside, beside))
    assert one.engine == other.engine
    assert one.onnx_sha256 != other.onnx_sha256
    with pytest.raises(ExportError, match="stored in a file"):
        build_engine(bytes(beside), **options)


def test_openvino_draws_the_same_from_weights_in_memory(whole, apart, copy):
    pytest.importorskip("openvino")
    expected = drawn(whole, "openvino")
    for _ in range(2):
        np.testing.assert_array_equal(drawn(apart, "openvino"), expected)
    np.testing.assert_allclose(expected, drawn(whole), atol=tolerances.BACKENDS_AGREE)
    rewrite(copy, SHARD, save({"w": np.zeros((2, 2), np.float32)}))
    with pytest.raises(ExportError, match="does not take"):
        drawn(copy, "openvino")


def test_weights_are_no_inputs_of_what_openvino_reads():
    pytest.importorskip("openvino")
    from skipstep.backends.openvino_library import read_model

    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    weight = np.ones((4, 4), np.float16)
    graph = LargeGraph(model(node, dtype=TensorProto.FLOAT16, weights=[outside("w", weight)]), {"w": weight})
    assert [each.get_friendly_name() for each in read_model(graph).get_parameters()] == ["x"]

"""Engines from the cache, and when they are built again."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from faults import modules_after

from skipstep.backends.tensorrt_options import TensorRTOptions
from skipstep.bundles.manifest import EngineEntry
from skipstep.cuda.probe import DeviceFacts
from skipstep.export import engines
from skipstep.export.engines import build_engine_cached, built_engines
from skipstep.export.tensorrt_engine import EngineTarget
from skipstep.networks.spec import NetworkSpec

GPU = DeviceFacts("Orin", 87, 16, 64 << 30, 12060)
NETWORK = NetworkSpec((1, 4, 4))
NANO = dataclasses.replace(GPU, num_multiprocessors=8, memory_bytes=8 << 30)


def test_building_on_a_device_takes_no_torch():
    """A Jetson has the bundle, onnx and TensorRT; what exported the network is elsewhere."""
    loaded = modules_after("import skipstep.export.engines, skipstep.commands.build")
    assert "skipstep.export.tensorrt_engine" in loaded
    assert not loaded & {"torch", "onnxscript", "onnxruntime", "triton", "diffusers"}


@dataclasses.dataclass
class Manifest:
    """What is used of a bundle's."""

    engines: tuple[EngineEntry, ...]
    graphs: dict[str, str] = dataclasses.field(default_factory=lambda: {"step": "step.onnx"})
    network: NetworkSpec = NETWORK
    batch_sizes: tuple[int, ...] = (1, 2)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose device and library a test may change; what its builder was asked for."""
    machine = SimpleNamespace(gpu=GPU, version="10.13.0", packages=["tensorrt-cu12"], built=[])

    def build(step, **options):
        machine.built.append(options)
        facts = {"device": machine.gpu.name, "num_multiprocessors": machine.gpu.num_multiprocessors}
        described = {**facts, "compute_capability": machine.gpu.compute_capability}
        return SimpleNamespace(engine=b"an engine", timing_cache=b"timings", describe=lambda: described)

    packages = lambda: [SimpleNamespace(metadata={"Name": name}) for name in machine.packages]  # noqa: E731
    monkeypatch.setenv("SKIPSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "build_engine", build)
    monkeypatch.setattr(engines, "cuda_device", lambda index: machine.gpu)
    monkeypatch.setattr(engines, "import_library", lambda library: SimpleNamespace(__version__=machine.version))
    monkeypatch.setattr(engines.metadata, "distributions", packages)
    return machine


CHANGES = {
    "the library": {"version": "10.14.0"},
    "its CUDA release": {"packages": ["tensorrt-cu13"]},
    "a smaller device of the same name": {"gpu": NANO},
    "the driver": {"gpu": dataclasses.replace(GPU, cuda_version=13000)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_engine_is_kept_for_the_conditions_that_it_was_built_under(machine, change):
    target = EngineTarget("tensorrt")
    for _ in range(2):
        build_engine_cached(b"a graph", target, [1])
    assert len(machine.built) == 1
    build_engine_cached(b"another graph", target, [1])
    assert machine.built[-1]["timing_cache"] == b"timings"
    vars(machine).update(CHANGES[change])
    build_engine_cached(b"a graph", target, [1])
    assert len(machine.built) == 3
    assert machine.built[-1]["timing_cache"] is None, "timings of other conditions"


def test_options_make_another_engine_and_timings_are_kept_in_a_file(machine, tmp_path):
    target, file = EngineTarget("tensorrt"), tmp_path / "timings"
    changed = {"optimization_level": 4, "aux_streams": 1, "workspace_bytes": 9, "weight_streaming": True}
    for count, (name, value) in enumerate({**changed, "refit": True, "strip": True}.items(), 1):
        for _ in range(2):
            build_engine_cached(b"a graph", target, [1], options=TensorRTOptions(**{name: value}))
        assert len(machine.built) == count
        assert getattr(machine.built[-1]["options"], name) == value
    kept = TensorRTOptions(timing_cache=file)
    build_engine_cached(b"a graph", target, [1], options=kept)
    assert file.read_bytes() == b"timings"
    file.write_bytes(b"of an earlier machine")
    build_engine_cached(b"another graph", target, [1], options=kept)
    assert machine.built[-1]["timing_cache"] == b"of an earlier machine"
    # Where the engine is there already, its timings are, too.
    file.unlink()
    build_engine_cached(b"another graph", target, [1], options=kept)
    assert file.read_bytes() == b"timings"
    assert len(machine.built) == count + 2


def test_one_that_is_refused_is_built_again(machine):
    for again in (False, True):
        build_engine_cached(b"a graph", EngineTarget("tensorrt"), [1], again=again)
    assert len(machine.built) == 2


def test_what_an_architecture_runs_does_not_depend_on_the_machines_device(machine):
    for gpu in (GPU, NANO):
        machine.gpu = gpu
        build_engine_cached(b"a graph", EngineTarget("tensorrt_rtx", 87), [1])
    assert len(machine.built) == 1


def test_new_engines_take_the_place_of_those_of_the_same_target(machine, monkeypatch):
    """Also of what an earlier version made: an engine for each batch size."""

    def entry(target, *sizes, precision="float16", **facts):
        return EngineEntry(f"{target} {precision} {sizes} {facts}", target, precision, {"profiles": sizes, **facts})

    earlier = entry("rtx:sm87", 1), entry("rtx:sm87", 2)
    others = entry("rtx:sm89", 1), entry("rtx:sm87", 1, precision="float32"), entry("tensorrt", 1, device="Orin")
    new, written = entry("rtx:sm87", 1, 2), []
    manifest = Manifest(engines=(*earlier, *others))
    bundle = SimpleNamespace(manifest=manifest, read_graph=lambda name: b"")
    monkeypatch.setattr(engines, "open_bundle", lambda path, **options: bundle)
    monkeypatch.setattr(engines, "expand_weights", lambda graph: graph)
    monkeypatch.setattr(engines, "built_engines", lambda *given, **options: [(new, b"an engine")])
    monkeypatch.setattr(engines, "rewrite_bundle", lambda bundle, changed, files: written.append((changed, files)))
    assert engines.add_engines("a bundle", [EngineTarget("tensorrt_rtx", 87)]) == [new.file]
    [(changed, files)] = written
    assert changed.engines == (*others, new)
    assert files == {new.file: b"an engine"}


def test_what_does_not_fuse_is_a_fact_of_an_engine_of_rtx(machine, monkeypatch):
    """Of full TensorRT it is not known."""
    monkeypatch.setattr(engines, "not_fused", lambda step: [f"1 × {step.decode()}"])
    network, facts = NetworkSpec((1, 4, 4)), {}
    for target in (EngineTarget("tensorrt_rtx", 87), EngineTarget("tensorrt")):
        [(entry, _)] = built_engines(b"a norm", target, network, [1, 4], "float16", lambda message: None)
        facts[target.library] = entry.facts.get("not_fused")
        assert machine.built[-1]["batch_sizes"] == (1, 4)
    assert facts == {"tensorrt_rtx": ["1 × a norm"], "tensorrt": None}


def test_files_of_two_devices_stand_side_by_side(machine):
    names = set()
    for gpu in (GPU, NANO):
        machine.gpu = gpu
        built = built_engines(
            b"a graph", EngineTarget("tensorrt"), NetworkSpec((1, 4, 4)), [1], "float16", lambda message: None
        )
        names |= {entry.file for entry, _ in built}
    assert names == {f"engines/tensorrt-orin-sm87-{n}mp-float16-batch1.engine" for n in (16, 8)}

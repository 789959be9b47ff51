"""Whole calls on a GPU without torch, on a driver that executes: the same bits as the host loop draws."""

from __future__ import annotations

import itertools
import shutil
import sys
import threading

import fake_tensorrt
import numpy as np
import pytest
from edge_bundles import edge_bundle
from edge_bundles import load_edge as load
from executing_cuda import CUresult
from faults import run_python

import skipstep
from skipstep.bundles.bundle import open_bundle
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import (
    BundleError,
    DeviceMemoryError,
    DeviceUnavailableError,
    EngineStateError,
    InputError,
    MissingDependencyError,
    NonFiniteError,
)
from skipstep.export.bundle_rewriter import add_plans


def shipped():
    return skipstep.load(
        SHIPPED_BUNDLE, backend="onnxruntime", num_threads=1, allow_hard_links=True, compile_on_miss=True
    )


@pytest.fixture(scope="module")
def host():
    with shipped() as engine:
        yield engine


def variant(host, **options):
    """A plan like that of ten steps, but for the options."""
    plan = host.select_plan(steps=10)
    return skipstep.Plan(schedule=plan.schedule, **{**plan.options(), "steps": 4, **options})


@pytest.fixture(scope="module")
def plans(host):
    return {
        "noise": variant(host, eta=1.0),
        "multistep": variant(host, solver="dpm_solver_pp_2m"),
        "clipped": variant(host, clip=0.5),
        "guided in part": variant(host, guidance_interval=(0.2, 5.0)),
        "thresholded": variant(host, clip="dynamic", dynamic_quantile=0.9, dynamic_maximum=1.5),
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, plans):
    return edge_bundle(tmp_path_factory.mktemp("edge") / "bundle", also=plans.values())


@pytest.fixture
def engine(cuda, bundle):
    with load(bundle) as engine:
        yield engine
    assert not any(cuda.left.values()), cuda.left


CALLS = {
    "one": {"steps": 10, "seeds": 7, "class_labels": 3},
    "guided, split and padded": {"steps": 10, "seeds": [1, 2, 3], "class_labels": [0, 1, 2], "guidance_scale": 3.0},
    "a scale for each": {"steps": 10, "seeds": [1, 2], "class_labels": 4, "guidance_scale": [1.5, 4.0]},
    "the largest seed": {"steps": 10, "seeds": 2**64 - 1, "class_labels": 1},
}


@pytest.mark.parametrize("form", ["captured", "stepwise"])
def test_a_call_draws_the_host_s_bits(cuda, bundle, host, form):
    with load(bundle, loop=form) as engine:
        for name, call in CALLS.items():
            assert np.array_equal(engine.sample(**call), host.sample(**call)), name
        assert bool(cuda.launched_graphs) == (form == "captured")


def test_every_kind_of_plan_draws_the_host_s_bits(engine, host, plans):
    for name, guidance in itertools.product(plans, ({}, {"guidance_scale": 4.0, "guidance_rescale": [0.3, 1.0]})):
        call = {"plan": plans[name], "seeds": [5, 6], "class_labels": [1, 2], **guidance}
        assert np.array_equal(engine.sample(**call), host.sample(**call)), (name, guidance)


def test_all_that_changes_between_calls_is_data(engine, host, cuda):
    """One graph, recorded before the first call: seeds, labels, plans and x_T reach it through memory."""
    recorded = engine.captures
    x_T = np.random.default_rng(0).standard_normal((1, 1, 28, 28), np.float32)
    for call in (
        {"steps": 10, "seeds": 1, "class_labels": 0},
        {"steps": 10, "seeds": 1, "class_labels": 5},
        {"steps": 10, "x_T": x_T, "class_labels": 5},
        {"steps": 10, "seeds": 2, "class_labels": 5},
        {"steps": 20, "seeds": 2, "class_labels": 5},
        {"steps": 10, "seeds": 1, "class_labels": 0},
    ):
        assert np.array_equal(engine.sample(**call), host.sample(**call)), call
    assert set(engine.captures) == set(recorded)
    # x_T, then two launches a stage: one graph a call.
    assert cuda.launched_graphs == [21, 21, 21, 21, 41, 21]


def test_results_of_many_calls_are_apart(engine, host):
    call = {"steps": 10, "class_labels": 2}
    expected = [host.sample(seeds=seed, **call) for seed in range(6)]
    pending = [engine.sample_async(seeds=seed, **call) for seed in range(6)]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: engine.sample(seeds=seed, **call)}))
        for seed in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, each in enumerate(expected):
        assert np.array_equal(pending[seed].result(), each)
        assert np.array_equal(found[seed], each)


def test_a_trajectory_is_the_host_s(engine, host, plans):
    for guidance in ({}, {"guidance_scale": 2.0, "guidance_rescale": 0.7}):
        call = {"plan": plans["thresholded"], "seeds": [3, 4], "class_labels": 1, "trajectory": True, **guidance}
        (samples, kept), (expected, wanted) = engine.sample(**call), host.sample(**call)
        assert np.array_equal(samples, expected), guidance
        assert np.array_equal(kept.x_t, wanted.x_t), guidance
        assert np.array_equal(kept.x0, wanted.x0), guidance


def test_the_caller_s_memory_is_filled(engine, host):
    out = np.full((2, 1, 28, 28), np.nan, np.float32)
    call = {"steps": 10, "seeds": [1, 2], "class_labels": 0}
    assert engine.sample(out=out, **call) is out
    assert np.array_equal(out, host.sample(**call))
    with pytest.raises(InputError, match="output_type='pt'"):
        engine.sample(output_type="pt", **call)


def test_editing_is_the_host_s(engine, host):
    images = host.sample(steps=10, seeds=[1], class_labels=0)
    call = {"steps": 10, "strength": 0.5, "seeds": [3], "class_labels": 2}
    assert np.array_equal(engine.edit(images, **call), host.edit(images, **call))


def test_a_deadline_is_met_by_what_was_measured(engine):
    engine.calibrate(repeats=3, max_seconds=0.1, batch_sizes=[1], plans=[10])
    assert engine.sample(deadline_ms=60_000.0, seeds=1, class_labels=0).shape == (1, 1, 28, 28)


def test_a_plan_that_was_added_brings_its_values(cuda, bundle, host, plans, tmp_path, monkeypatch):
    added, call = tmp_path / "bundle", {"plan": plans["clipped"], "seeds": 5, "class_labels": 9, "guidance_scale": 2.0}
    shutil.copytree(bundle, added)
    add_plans(added, [plans["clipped"]], digest=open_bundle(added).manifest.digest)
    expected = host.sample(**call)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with load(added) as engine:
        assert np.array_equal(engine.sample(**call), expected)


def test_closing_gives_everything_back(cuda, bundle):
    engine = load(bundle)
    pending = engine.sample_async(steps=10, seeds=1, class_labels=0)
    engine.close()
    assert pending.result().shape == (1, 1, 28, 28)
    assert not any(cuda.left.values()), cuda.left
    with pytest.raises(EngineStateError, match="closed"):
        engine.sample(steps=10, seeds=1, class_labels=0)
    engine.close()


# What is refused

REFUSED = {
    "statistics that are not there": (
        {"clip": "dynamic", "dynamic_quantile": 0.9, "eta": 0.5},
        {},
        r"need threshold.*kernels of the bundle",
    ),
    "a kernel that is not there": ({"eta": 0.5, "clip": 0.25}, {}, r"need clip\+.*add_noise.*kernels of the bundle"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_does_is_refused_by_name(engine, host, case):
    options, call, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        engine.sample(plan=variant(host, **options), seeds=1, class_labels=0, **call)


def test_plans_of_their_own_are_refused(engine, host):
    pair = [
        variant(host, timesteps=(900, 500, 100), steps=None, spacing=None),
        variant(host, timesteps=(800, 400, 10), steps=None, spacing=None),
    ]
    with pytest.raises(InputError, match="one plan for all samples"):
        engine.sample(plan=pair, seeds=[1, 2], class_labels=0)


ELSEWHERE = {
    "another architecture": ({}, {"capability": 86}, r"8\.6; expected .*sm_87.*--target sm_86"),
    "an older driver": ({}, {"version": 11080}, "CUDA 11; expected CUDA 12.9"),
    "a newer library": (
        {},
        {"version": 12090},
        "for CUDA 13 on a driver for CUDA 12.*install tensorrt-rtx-cu12, or up",
    ),
    "no kernels": ({"without": ("kernels",)}, {}, "no kernels at all.*--target sm_87"),
    "no engines": ({"without": ("engines",)}, {}, "without engines.*skipstep build"),
    "the other library": ({"library": "tensorrt"}, {}, "tensorrt_rtx 1.7.0.0 for sm_87.*tensorrt 1.7"),
    "another version": ({"library_version": "1.6.0.0"}, {}, "rtx 1.7.0.0 .*expected .*_rtx 1.6.0.0 .*skipstep build"),
    "another platform": ({"platform": "linux-riscv64"}, {}, "expected .* on linux-riscv64.*skipstep build"),
    "another batch size": ({"profiles": [4]}, {}, "at batch 1 .*expected .*at batch 4"),
    "another dtype": (
        {"network_dtype": "float16"},
        {},
        "float32 network .*expected one of float16.*export the kernels",
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_bundle_for_another_machine(cuda, tmp_path, case):
    made, machine, message = ELSEWHERE[case]
    vars(cuda).update(machine)
    errors = {"another dtype": InputError, "a newer library": MissingDependencyError}
    with pytest.raises(errors.get(case, DeviceUnavailableError), match=message):
        load(edge_bundle(tmp_path / "bundle", batch_sizes=(1,), **made))
    assert not any(cuda.left.values()), cuda.left


def test_a_harmed_cubin_never_reaches_the_driver(cuda, bundle, tmp_path):
    harmed = tmp_path / "bundle"
    shutil.copytree(bundle, harmed)
    file = next((harmed / "kernels").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="kernels/"):
        load(harmed)
    assert not any(cuda.left.values()), cuda.left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "runtime='edge' on 'cpu'"),
        ({"runtime": "cuda"}, "runtime='cuda'"),
        ({"loop": "step_graph"}, "captured, stepwise"),
        ({"precision": "float16"}, "tensorrt in float32"),
        ({"backend": "onnxruntime"}, "tensorrt in float32"),
    ],
)
def test_options_that_do_not_fit(cuda, bundle, options, message):
    with pytest.raises(InputError, match=message):
        skipstep.load(bundle, **{"device": "cuda", "runtime": "edge", **options})


def test_what_is_missing_is_named(cuda, bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with load(bundle) as engine, pytest.raises(MissingDependencyError, match=r"onnxruntime.*'plan'.*skipstep\[cpu\]"):
        engine.sample(steps=3, seeds=1, class_labels=0)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"skipstep\[rtx\]"):
        load(bundle)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"skipstep\[edge\]"):
        load(bundle)
    assert not any(cuda.left.values()), cuda.left


# What goes wrong on the device


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("place", ["cuMemAlloc", "cuGraphInstantiate", "cuLaunchKernel", "cuModuleLoadData"])
def test_too_little_memory_leaves_nothing_behind(cuda, bundle, place, passes):
    cuda.faults[place] = passes, CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceMemoryError, match="smaller batch sizes"):
        load(bundle)
    assert not any(cuda.left.values()), cuda.left


def test_a_lost_device_ends_the_engine(cuda, bundle):
    engine = load(bundle)
    cuda.faults["cuEventSynchronize"] = 0, CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    for _ in range(2):
        with pytest.raises(EngineStateError, match=r"lost.*CUDA_ERROR_ILLEGAL_ADDRESS"):
            engine.sample(steps=10, seeds=1, class_labels=0)
    engine.close()


def test_a_network_that_overflows_is_said(engine):
    x_T = np.full((2, 1, 28, 28), 1.0, np.float32)
    x_T[1] = 3e38
    with pytest.raises(NonFiniteError, match=r"samples \[1\] of 2"):
        engine.sample(steps=10, x_T=x_T, class_labels=0)


def test_an_engine_that_does_not_launch(cuda, bundle):
    fake_tensorrt.PRETENCES["no launch"] = True
    with pytest.raises(skipstep.errors.ExportError, match="no launch today"):
        load(bundle)
    assert not any(cuda.left.values()), cuda.left


# The start of a process

START = """
import sys
sys.path[:0] = {tests!r}
from executing_cuda import ExecutingCuda
from executing_library import install
install(ExecutingCuda())
sys.modules.update(dict.fromkeys(("torch", "triton", "onnx", "onnxruntime", "safetensors.torch")))
import time
before, started = set(sys.modules), time.process_time()
import skipstep
engine = skipstep.load({bundle!r}, device="cuda", library="tensorrt_rtx")
drawn = engine.sample(steps=10, seeds=[1, 2], class_labels=[0, 1], guidance_scale=2.0)
seconds = time.process_time() - started
drawn.tofile({out!r})
engine.close()
ours = [name for name in sys.modules if name.split(".")[0] == "skipstep"]
print(len(sys.modules), len(ours), seconds)
print(*sys.modules)
"""


def test_neither_torch_nor_triton_is_needed(bundle, host, tmp_path):
    out = tmp_path / "samples"
    tests = [folder for folder in sys.path if folder.rstrip("/").endswith(("tests", "tests/ptx"))]
    told = run_python(START.format(tests=tests, bundle=str(bundle), out=str(out))).splitlines()
    expected = host.sample(steps=10, seeds=[1, 2], class_labels=[0, 1], guidance_scale=2.0)
    assert np.array_equal(np.fromfile(out, np.float32).reshape(expected.shape), expected)
    loaded = set(told[1].split())
    assert int(told[0].split()[1]) < 100, "modules of ours, each of which a start pays for"
    unused = ("skipstep.editing", "skipstep.fitting", "skipstep.latency", "skipstep.export", "skipstep.building")
    # The stand-in itself takes a few of ours that a driver does not.
    assert not [name for name in loaded if name.startswith(unused)]
    assert not {"PIL", "tqdm", "openvino", "skipstep.cuda.device", "skipstep.loops.captured"} & loaded

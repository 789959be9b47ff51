"""The same walk over the functions that the pages of `kernels/` and `export/` tell users to call."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from argument_walk import walk
from engines import labelled_engine

import skipstep
from skipstep import NoiseSchedule, Plan
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.golden import draw_golden, replay_golden
from skipstep.export.precision import lower_precision
from skipstep.export.precision_check import check_precision
from skipstep.export.weight_storage import expand_weights
from skipstep.kernels.autotune import LaunchCase, candidates
from skipstep.kernels.group_norm import launch_group_norm
from skipstep.kernels.group_norm_launch import norm_launch
from skipstep.kernels.launch import StepLaunch, choose_launch, least_elements_per_thread, step_constants
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.statistics import Thresholding
from skipstep.kernels.step import ddim_step, initial_noise
from skipstep.kernels.step_numpy import NumpyStep
from skipstep.networks.checkpoint import read_checkpoint
from skipstep.plans.update_weights import SolverOptions

SHAPE = (2, 1, 4, 4)
# Every operand is used.
FLAGS = StepFlags(threshold=True, read_h0=True, write_h0=True, add_noise=True, guided=True, rescale=True)
TABLE = Plan(schedule=NoiseSchedule.linear(1000), steps=3).coefficients.astype(np.float32).reshape(3, 1, -1)
BUNDLE = open_bundle(skipstep.__path__[0] + "/demo/fashion-mnist.bundle", allow_hard_links=True)
GRAPH = BUNDLE.read_graph(BUNDLE.manifest.graphs["plan"])
BUFFERS = ("state", "model_output", "network_input", "history", "x0", "broken")


def _step(filled: Callable[..., Any], array: Callable[[Any], Any]) -> dict[str, Any]:
    both = (2 * SHAPE[0], *SHAPE[1:])
    return {
        "state": filled(SHAPE),
        "model_output": filled(both),
        "network_input": filled(both),
        "table": array(TABLE),
        "guidance": filled(SHAPE[:1]),
        "rescale": filled(SHAPE[:1]),
    }


def _kernel() -> dict[str, Any]:
    seeds, history = torch.arange(2), torch.zeros(1, *SHAPE)
    given = {"stage": 0, "flags": FLAGS, "seeds": seeds, "history": history, "bound": torch.ones(2)}
    return {**_step(torch.ones, lambda array: torch.from_numpy(array.copy())), **given}


def _numpy() -> dict[str, Any]:
    noise = {"noise": lambda stage: np.zeros((2, 16), np.float32)}
    ones = functools.partial(np.ones, dtype=np.float32)
    return {**_step(ones, np.copy), **noise, "flags": [FLAGS] * 3, "thresholding": Thresholding(0.9)}


CALLS: dict[Any, Callable[[], dict[str, Any]]] = {
    ddim_step: _kernel,
    initial_noise: lambda: {
        "state": torch.ones(SHAPE),
        "network_input": torch.ones(SHAPE),
        "seeds": torch.arange(2),
    },
    NumpyStep: _numpy,
    launch_group_norm: lambda: {
        "x": torch.ones(2, 4, 3, 3),
        "num_groups": 2,
        "weight": torch.ones(4),
        "bias": torch.ones(4),
        "vector": torch.ones(2, 4),
        "image": torch.ones(2, 4, 3, 3),
    },
    norm_launch: lambda: {"channels": 4, "positions": 9, "channels_last": True},
    Thresholding: lambda: {"quantile": 0.9},
    StepLaunch: lambda: {"block_size": 1024, "num_warps": 4},
    step_constants: lambda: {"flags": FLAGS, "per_sample": False, "store_x0": False, "channels": 3},
    least_elements_per_thread: lambda: {"network_item_size": 2},
    choose_launch: lambda: {
        "num_elements": 16,
        "batch_size": 2,
        "num_multiprocessors": 8,
        "compute_capability": 90,
        "network_item_size": 2,
    },
    LaunchCase: lambda: {"num_elements": 16, "batch_size": 2, "network_dtype": "float16"},
    candidates: lambda: {
        "case": LaunchCase(16, 2, "float16"),
        "num_multiprocessors": 8,
        "compute_capability": 90,
    },
    SolverOptions: dict,
    open_bundle: lambda: {"path": BUNDLE.path, "allow_hard_links": True},
    BUNDLE.read: lambda: {"name": BUNDLE.manifest.graphs["plan"]},
    BUNDLE.read_graph: lambda: {"name": BUNDLE.manifest.graphs["plan"]},
    BUNDLE.read_arrays: lambda: {"name": "tables.safetensors"},
    read_checkpoint: lambda: {"folder": "missing"},
    lower_precision: lambda: {"step_graph": GRAPH, "dtype": "bfloat16"},
    check_precision: lambda: {"lowered": GRAPH, "exact": GRAPH, "dtype": "bfloat16"},
    expand_weights: lambda: {"model": GRAPH},
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
@pytest.mark.timeout(600)
def test_a_result_or_an_error_of_ours(function: Callable[..., Any], tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    walk(function.__name__, function, CALLS[function], SHAPE, written=BUFFERS)


def test_the_calls_succeed_as_they_stand():
    for function, arguments in CALLS.items():
        if function is not read_checkpoint:
            function(**arguments())


def test_golden_samples_are_replayed_or_refused():
    with labelled_engine() as engine:
        golden, arrays = draw_golden(engine)
        assert replay_golden(engine, golden, arrays) == 0.0

        def replay(golden: Any, arrays: Any) -> float:
            return replay_golden(engine, golden, arrays)

        walk("replay_golden", replay, lambda: {"golden": golden, "arrays": arrays}, SHAPE)


def test_progress_of_edits_is_that_of_the_whole_call():
    images = np.zeros((3, 1, 4, 4), np.float32)
    with labelled_engine() as engine:
        calls: dict[str, Callable[..., Any]] = {
            "invert": lambda **progress: engine.invert(images, steps=3, refinements=2, **progress).latents,
            "reconstruct": lambda **progress: engine.reconstruct(images, steps=3, refinements=1, **progress),
            "edit": lambda **progress: engine.edit(images, steps=3, strength=0.6, method="invert", **progress),
            "noise": lambda **progress: engine.edit(images, steps=3, strength=0.6, seeds=1, **progress),
            "interpolate": lambda **progress: engine.interpolate(1, 2, 3, steps=3, **progress),
        }
        for name, call in calls.items():
            seen: list[tuple[int, int]] = []
            with_progress = call(progress=lambda done, total, seen=seen: seen.append((done, total)))
            assert np.array_equal(with_progress, call()), name
            done, totals = zip(*seen, strict=True)
            assert list(done) == sorted(set(done)), name
            assert set(totals) == {done[-1]}, name

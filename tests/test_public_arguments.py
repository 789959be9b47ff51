"""Every public parameter of every public function, with values that belong nowhere.

The outcome is a result or an error of skipstep.errors; no argument is changed, and no result shares memory with one.
What is public is found by introspection: a function or parameter that is added is walked, or this module fails.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from argument_walk import walk
from engines import labelled_engine
from tiny_networks import Labelled
from tiny_policy import Config, TinyPolicy, random_observations

import skipstep
from skipstep import Engine, NoiseSchedule, Plan
from skipstep.calls.images import to_pil
from skipstep.editing.interpolation import slerp, slerp_grid
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.scheduler_config import read_scheduler_config
from skipstep.robotics import PolicyEngine, PolicyRunner, from_policy, load_policy
from skipstep.serving import Batcher
from skipstep.serving.ray import Sampler, deployment, workers
from skipstep.storage.signature import generate_key, sign, verify

SHAPE = (2, 1, 4, 4)
SCHEDULE = NoiseSchedule.linear(1000)
PLAN = Plan(schedule=SCHEDULE, steps=3)
BUNDLE = skipstep.__path__[0] + "/demo/fashion-mnist.bundle"
IMAGES = np.full(SHAPE, 0.25, np.float32)
NOISE = np.random.default_rng(0).standard_normal(SHAPE, np.float32)

OBSERVATION = random_observations(Config(), np.random.default_rng(0))
OBSERVATIONS = random_observations(Config(), np.random.default_rng(0), 1, 2)
CHUNKS = np.zeros((1, 8, 2), np.float32)

# Functions beside those of the package itself that its pages tell users to call.
FURTHER = (
    *(Batcher, NetworkSpec, slerp, slerp_grid, to_pil, read_scheduler_config, generate_key, sign, verify),
    *(PolicyEngine, PolicyRunner, from_policy, load_policy, Sampler, workers, deployment),
)
# Arguments with which a call succeeds, for each function that is walked. What is missing has its default.
CALLS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Engine": lambda path: {"compiled": None},
    "Engine.build": lambda path: {
        "model": Labelled(),
        "plans": [3],
        "schedule": SCHEDULE,
        "sample_shape": (1, 4, 4),
        "num_classes": 4,
        "null_label": 3,
        "backend": "torch",
        "device": "cpu",
    },
    "Engine.sample": lambda path: {"steps": 3, "seeds": [1, 2], "class_labels": 1},
    "Engine.sample_async": lambda path: {"steps": 3, "seeds": [1, 2], "class_labels": 1},
    "Engine.edit": lambda path: {"images": IMAGES, "steps": 3, "strength": 0.6, "seeds": [1, 2], "class_labels": 1},
    "Engine.invert": lambda path: {"images": IMAGES, "steps": 3, "class_labels": 1},
    "Engine.reconstruct": lambda path: {"images": IMAGES, "steps": 3, "class_labels": 1},
    "Engine.interpolate": lambda path: {"a": 1, "b": 2, "n": 3, "steps": 3, "class_labels": 1},
    "Engine.interpolate_grid": lambda path: {
        "corners": [1, 2, 3, 4],
        "rows": 2,
        "columns": 2,
        "steps": 3,
        "class_labels": 1,
    },
    "Engine.calibrate": lambda path: {"repeats": 3, "max_seconds": 0.01},
    "Engine.autotune": lambda path: {},
    "Engine.describe": lambda path: {},
    "Engine.pareto": lambda path: {},
    "Engine.tune": lambda path: {"steps": [2], "noises": 8, "held_out": 8, "nodes": 8, "rounds": 0},
    "Engine.save": lambda path: {"path": path, "license": "none"},  # The folder is there already: nothing is written.
    "Engine.swap_loras": lambda path: {"loras": []},  # With room for them: tests/test_loras.py.
    "Engine.add_plan": lambda path: {"plan": 5},
    "Engine.select_plan": lambda path: {"steps": 3},
    "Engine.split": lambda path: {"num_samples": 3},
    "Engine.prepare": lambda path: {},
    "Engine.identity": lambda path: {},
    "Batcher": lambda path: {},
    "Batcher.submit": lambda path: {"steps": 3, "seeds": [1, 2], "class_labels": 1},
    "Batcher.close": lambda path: {},
    "Sampler": lambda path: {"bundle": BUNDLE, "allow_hard_links": True, "num_threads": 1},
    "workers": lambda path: {"bundle": BUNDLE, "num": 2},  # Here without Ray, as the next one.
    "deployment": lambda path: {"bundle": BUNDLE},
    "PolicyEngine": lambda path: {"engine": None, "spec": None, "graph": b""},
    "PolicyEngine.save": lambda path: {"path": path, "license": "none"},  # As for Engine.save.
    "PolicyEngine.encode": lambda path: {"observations": OBSERVATIONS},
    "PolicyEngine.sample": lambda path: {"observations": OBSERVATIONS, "steps": 2, "seeds": [1]},
    "PolicyEngine.predict": lambda path: {"observations": OBSERVATIONS, "steps": 2, "seeds": [1]},
    "PolicyEngine.actions": lambda path: {"chunks": CHUNKS},
    "PolicyRunner": lambda path: {"policy": policy()},
    "PolicyRunner.reset": lambda path: {},
    "PolicyRunner.select_action": lambda path: {"observation": OBSERVATION},
    # The folder is none of LeRobot's: what else is wrong is found before it is read, or it is.
    "from_policy": lambda path: {"policy": path, "plans": [2]},
    "load_policy": lambda path: {"path": path},
    "TensorRTOptions": lambda path: {},
    "NoiseSchedule": lambda path: {"alpha_bar": [0.9, 0.5]},
    "NoiseSchedule.linear": lambda path: {},
    "NoiseSchedule.scaled_linear": lambda path: {},
    "NoiseSchedule.cosine": lambda path: {},
    "NoiseSchedule.sigmoid": lambda path: {},
    "NoiseSchedule.from_betas": lambda path: {"betas": [0.1, 0.2]},
    "NoiseSchedule.from_alphas_cumprod": lambda path: {"alphas_cumprod": [0.9, 0.5]},
    "NoiseSchedule.from_sigmas": lambda path: {"sigmas": [2.0, 1.0]},
    "NoiseSchedule.karras": lambda path: {},
    "NoiseSchedule.flow": lambda path: {},
    "NoiseSchedule.from_diffusers": lambda path: {"config": {}},
    "NoiseSchedule.timestep_at": lambda path: {"alpha_bar": 0.5},
    "NoiseSchedule.rescaled_to_zero_terminal_snr": lambda path: {},
    "Plan": lambda path: {"schedule": SCHEDULE, "steps": 3},
    "Plan.inverted": lambda path: {},
    "Plan.started_at": lambda path: {"step": 1},
    "Plan.options": lambda path: {},
    "load": lambda path: {"path": BUNDLE, "allow_hard_links": True, "num_threads": 1},
    "Condition": lambda path: {"shape": (1, 4)},
    "NetworkSpec": lambda path: {"sample_shape": (1, 4, 4)},
    "NetworkSpec.of_module": lambda path: {"module": Labelled(), "sample_shape": (1, 4, 4)},
    "slerp": lambda path: {"a": NOISE[0], "b": NOISE[1], "weights": [0.0, 1.0]},
    "slerp_grid": lambda path: {"corners": [*NOISE, *NOISE[::-1]], "rows": 2, "columns": 2},
    "to_pil": lambda path: {"samples": IMAGES},
    "read_scheduler_config": lambda path: {"source": {}},
    "generate_key": lambda path: {"private_path": path / "private.pem", "public_path": path / "public.pem"},
    "sign": lambda path: {"data": b"data", "private_key_path": path / "missing.pem"},
    "verify": lambda path: {"data": b"data", "signature": bytes(64), "public_key_path": path / "missing.pem"},
}
# Called with an engine or a plan; those that end the engine are not walked, and have no parameters.
BOUND: dict[str, Any] = {"Plan": PLAN, "NoiseSchedule": SCHEDULE}
# A loop runs as many steps as it is told: tests/robotics/test_runner.py has its arguments. Pictures and latents need a
# pipeline, as accelerate does: tests/pipelines/test_walk.py.
OF_PIPELINES = {"accelerate", "Engine.encode", "Engine.decode", "Engine.preview"}
NOT_WALKED = {"Engine.close", *OF_PIPELINES, "PolicyEngine.close", "PolicyRunner.run"}


def _functions() -> Iterator[tuple[str, Any]]:
    homes = [getattr(skipstep, name) for name in skipstep.__all__ if not name.startswith("__")]
    for each in (*homes, *FURTHER):
        yield each.__name__, each
        if inspect.isclass(each):
            for name, member in vars(each).items():
                if not name.startswith("_") and callable(getattr(each, name)) and not inspect.isclass(member):
                    yield f"{each.__name__}.{name}", getattr(each, name)


FUNCTIONS = dict(_functions())


@functools.cache
def policy() -> PolicyEngine:
    return from_policy(TinyPolicy(steps=2), device="cpu", backend="torch")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with labelled_engine() as made:
        yield made


def test_all_that_is_public_is_walked():
    assert FUNCTIONS.keys() == CALLS.keys() | NOT_WALKED


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.timeout(600)
def test_a_result_or_an_error_of_ours(
    name: str, engine: Engine, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function = FUNCTIONS[name]
    first = next(iter(inspect.signature(function).parameters), None)
    owner = Batcher(engine) if name.startswith("Batcher.") else BOUND.get(name.split(".")[0], engine)
    if name.startswith("Policy"):
        owner = PolicyRunner(policy()) if name.startswith("PolicyRunner.") else policy()
    firsts = {"engine": engine, "self": owner, "policy": owner}
    bound = None if name in ("PolicyEngine", "PolicyRunner", "from_policy") else firsts.get(str(first))
    walk(name, function if bound is None else functools.partial(function, bound), lambda: CALLS[name](tmp_path), SHAPE)

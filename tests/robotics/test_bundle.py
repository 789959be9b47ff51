"""A policy on disk: the same actions in a process without torch, and nothing that was changed is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robotics_cases import STATISTICS
from tiny_policy import Config, TinyPolicy, random_observations

from skipstep.errors import BundleError, InputError, IntegrityError, StorageError
from skipstep.robotics import from_policy, load_policy

_WITHOUT_TORCH = """
import sys
import numpy as np
sys.modules["torch"] = None
from skipstep.robotics import PolicyRunner, load_policy
folder, given, result = sys.argv[1:]
with load_policy(folder, num_threads=1) as policy:
    observations = dict(np.load(given))
    x_T = observations.pop("x_T")
    actions = policy.predict(observations, steps=10, x_T=x_T)
    runner = PolicyRunner(policy)
    first = runner.select_action({name: array[0, -1] for name, array in observations.items()})
np.savez(result, actions=actions, first=first)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Any:
    """The folder, and the policy that it was made of."""
    folder = tmp_path_factory.mktemp("policies") / "tiny.policy"
    with from_policy(TinyPolicy(), device="cpu", backend="onnxruntime", statistics=STATISTICS) as made:
        made.save(folder, license="Apache-2.0", name="tiny")
        yield folder, made


@pytest.fixture
def copied(saved: Any, tmp_path: Path) -> Path:
    """A copy to spoil."""
    import shutil

    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def test_a_saved_policy_draws_the_same_actions_without_torch(saved, tmp_path):
    folder, made = saved
    rng = np.random.default_rng(0)
    observations = random_observations(Config(), rng, 1, 2)
    x_T = rng.standard_normal((1, 8, 2), np.float32)
    np.savez(tmp_path / "given.npz", x_T=x_T, **observations)
    command = [
        sys.executable,
        "-c",
        _WITHOUT_TORCH,
        str(folder),
        *(str(tmp_path / f"{n}.npz") for n in ("given", "made")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "made.npz")
    np.testing.assert_allclose(found["actions"], made.predict(observations, steps=10, x_T=x_T), rtol=1e-5, atol=1e-3)
    assert found["first"].shape == (2,)


def test_times_features_and_statistics_travel_with_it(saved):
    folder, made = saved
    with load_policy(folder) as loaded:
        assert loaded.spec == made.spec
        assert loaded.graph == made.graph
        assert loaded.engine.plans.keys() == made.engine.plans.keys()
    assert sorted(each.name for each in folder.iterdir()) == ["engine", "observations.onnx", "policy.json"]


@pytest.mark.parametrize("name", ["observations.onnx", "engine/manifest.json", "engine/tables.safetensors"])
def test_a_file_that_was_changed_is_refused(copied, name):
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(IntegrityError), load_policy(copied) as loaded:
        loaded.predict(random_observations(Config(), np.random.default_rng(0), 1, 2), steps=10, seeds=[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("spec"),
        lambda value: value.update(schema=2),
        lambda value: value.update(further=1),
        lambda value: value["spec"].update(horizon=16),
        lambda value: value["spec"].update(n_action_steps=8),
        lambda value: value["spec"]["action"].update(shape=[3]),
        lambda value: value["spec"]["action"]["normalisation"].update(mode="other"),
        lambda value: value["spec"]["action"]["normalisation"].update(first=[0.0]),
        lambda value: value["spec"]["observations"].reverse() or value["spec"]["observations"].pop(),
        lambda value: value["observations"].update(size=-1),
    ],
)
def test_a_description_that_was_changed_is_refused(copied, change):
    value = json.loads((copied / "policy.json").read_bytes())
    change(value)
    (copied / "policy.json").write_text(json.dumps(value))
    with pytest.raises(BundleError):
        load_policy(copied)


def test_what_is_no_saved_policy_is_refused(saved, tmp_path):
    with pytest.raises(BundleError, match=r"no policy\.json"):
        load_policy(tmp_path)
    with pytest.raises(InputError):
        load_policy(3)
    (tmp_path / "policy.json").write_bytes(b"{")
    with pytest.raises(BundleError):
        load_policy(tmp_path)


def test_a_folder_is_replaced_only_when_asked(saved, copied):
    _, made = saved
    with pytest.raises(StorageError):
        made.save(copied, license="none")
    (copied / "policy.json").unlink()
    made.save(copied, license="none", overwrite=True)
    load_policy(copied).close()


def test_a_loaded_policy_is_not_saved_again(saved, tmp_path):
    with load_policy(saved[0]) as loaded, pytest.raises(InputError):
        loaded.save(tmp_path / "again", license="none")
    assert not list(tmp_path.iterdir())

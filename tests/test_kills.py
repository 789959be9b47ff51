"""Writers that are killed at random moments: what is there is what was there before, or all of what was to be."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from attack_count import tried
from engines import build
from tiny_networks import Labelled

from skipstep.bench.record import write_whole
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.cache import ArtefactCache
from skipstep.errors import EngineStateError
from skipstep.export.bundle_rewriter import rewrite_bundle

KILLS = 50
LICENCES = ("before", "after")
NETWORK = {"sample_shape": (1, 4, 4), "num_classes": 3, "null_label": 3, "plans": [2], "backend": "onnxruntime"}

pytestmark = pytest.mark.slow


def save(path: Path) -> None:
    engine = build(Labelled(), batch_sizes=[1], num_threads=1, **NETWORK)
    engine.save(path, license="after", overwrite=True)


def rewrite(path: Path) -> None:
    import dataclasses

    bundle = open_bundle(path)
    rewrite_bundle(bundle, dataclasses.replace(bundle.manifest, license="after"), {})


def check_bundle(path: Path) -> str:
    bundle = open_bundle(path)
    for name in bundle.manifest.files:
        bundle.read(name)
    bundle.refuse_other_files()
    assert bundle.manifest.license in LICENCES
    return bundle.manifest.license


def write_result(path: Path) -> None:
    write_whole(path / "result.json", {"licence": "after", "data": list(range(200_000))})


def check_result(path: Path) -> str:
    licence = json.loads((path / "result.json").read_text())["licence"]
    assert licence in LICENCES
    return str(licence)


def build_artefact(path: Path) -> None:
    data = np.random.default_rng(0).bytes(4 << 20)
    ArtefactCache(path).get_or_build("0" * 64, lambda: data, "an artefact for a test")


def check_cache(path: Path) -> str:
    def missing() -> bytes:
        raise EngineStateError(got="nothing", expected="an entry", remedy="build it")

    try:
        return "after" if ArtefactCache(path).get_or_build("0" * 64, missing, "") else "empty"
    except EngineStateError:
        return "before"


WRITERS = {
    "save": (save, check_bundle),
    "a rewrite": (rewrite, check_bundle),
    "a result": (write_result, check_result),
    "the cache": (build_artefact, check_cache),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("kills") / "bundle"
    with build(Labelled(), batch_sizes=[1], **NETWORK) as engine:
        engine.save(path, license="before")
    return path


def fork(work, path: Path) -> int:
    """A child that does the work and ends, as a process of its own that is quick to start."""
    child = os.fork()
    if child == 0:
        try:
            work(path)
        finally:
            os._exit(0)
    return child


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_any_moment(name, bundle, tmp_path):
    write, check = WRITERS[name]
    path = tmp_path / "place"

    def before() -> None:
        shutil.rmtree(path, ignore_errors=True)
        if check is check_bundle:
            shutil.copytree(bundle, path)
        else:
            path.mkdir()
            if check is check_result:
                write_whole(path / "result.json", {"licence": "before", "data": []})

    before()
    started = time.perf_counter()
    assert os.waitpid(fork(write, path), 0)[1] == 0
    whole = time.perf_counter() - started
    assert check(path) == "after"

    rng, seen = random.Random(0), {"before": 0, "after": 0}
    before()
    for _ in range(KILLS):
        child = fork(write, path)
        time.sleep(rng.uniform(0.0, 1.05 * whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tried(f"writers killed at a random moment: {name}")
        found = check(path)
        seen[found] += 1
        # The first may have been slower than the others, or the machine is busier now: kills stay where both are seen.
        whole *= 0.95 if found == "after" else 1.05
        if found == "after":
            before()
    assert min(seen.values()) > KILLS // 10, seen
    assert os.waitpid(fork(write, path), 0)[1] == 0
    assert check(path) == "after"
    leftovers = [each for each in (*tmp_path.rglob("*"),) if "partial" in each.name or "skipstep-" in each.name]
    assert not leftovers

"""Adding to a bundle: what is there stays and is verified, and latencies find the device that they were measured on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from engines import build
from tiny_networks import tiny_unet

from skipstep import load
from skipstep.bundles.bundle import open_bundle
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import BundleError, IntegrityError
from skipstep.export.bundle_rewriter import add_calibration
from skipstep.export.bundle_writer import write_bundle
from skipstep.export.request import BundleRequest
from skipstep.export.targets import Targets
from skipstep.latency.calibration import FILE_NAME, Calibration, Latency, RunKind, read_calibrations
from skipstep.latency.identity import device_identity

HERE = device_identity(backend="onnxruntime", loop="stepwise", device="cpu")
LATENCY = Latency(1.0, 2.0, 3.0, 100)
SLOWER = dataclasses.replace(LATENCY, p99_ms=9.0)


@pytest.fixture(scope="module")
def engine():
    return build(tiny_unet(), plans=[2, 3], backend="onnxruntime")


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    engine.save(folder, license="MIT", name="tiny")
    return folder


@pytest.fixture
def bundle(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def digest(bundle: Path) -> str:
    return open_bundle(bundle).manifest.digest


def measured(bundle: Path, *, batch_size: int = 1, identity=HERE) -> Calibration:
    keys = [plan.key for plan in open_bundle(bundle).manifest.plans]
    return Calibration(identity, {RunKind(key, batch_size, False): LATENCY for key in keys})


def files(folder: Path) -> dict[str, bytes]:
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_a_loaded_engine_has_what_was_measured_here(bundle):
    before = files(bundle)
    assert load(bundle).calibration is None
    add_calibration(bundle, measured(bundle), digest=digest(bundle))
    assert load(bundle).calibration == measured(bundle)
    after = files(bundle)
    assert after.keys() == before.keys() | {FILE_NAME}
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    assert open_bundle(bundle).manifest.calibration == FILE_NAME


def test_another_devices_latencies_do_not_count(bundle):
    elsewhere = dataclasses.replace(HERE, name="another processor")
    add_calibration(bundle, measured(bundle, identity=elsewhere), digest=digest(bundle))
    assert load(bundle).calibration is None
    add_calibration(bundle, measured(bundle), digest=digest(bundle))
    assert load(bundle).calibration.identity == HERE
    more_threads = dataclasses.replace(HERE, threads=HERE.threads + 1)
    add_calibration(bundle, measured(bundle, identity=more_threads), digest=digest(bundle))
    assert load(bundle, num_threads=more_threads.threads).calibration.identity == more_threads
    held = read_calibrations((bundle / FILE_NAME).read_bytes())
    assert [each.identity for each in held] == [elsewhere, HERE, more_threads]


def test_measuring_again_replaces_and_adds(bundle):
    first = add_calibration(bundle, measured(bundle), digest=digest(bundle))
    again = Calibration(HERE, {**measured(bundle, batch_size=2).latencies, next(iter(first.latencies)): SLOWER})
    whole = add_calibration(bundle, again, digest=digest(bundle))
    assert load(bundle).calibration == whole == first.updated_by(again)
    assert len(read_calibrations((bundle / FILE_NAME).read_bytes())) == 1


def test_plans_that_the_bundle_lacks_are_left_out(bundle):
    more = Calibration(HERE, {**measured(bundle).latencies, RunKind("f" * 16, 1, False): LATENCY})
    assert add_calibration(bundle, more, digest=digest(bundle)) == measured(bundle)


def test_another_network_is_not_given_these_latencies(bundle):
    before = files(bundle)
    with pytest.raises(BundleError, match="replaced meanwhile"):
        add_calibration(bundle, measured(bundle), digest="0" * 64)
    assert files(bundle) == before


@pytest.mark.parametrize("name", ["network/step.onnx", "golden.safetensors", FILE_NAME])
def test_what_is_damaged_is_not_carried_over(bundle, name):
    add_calibration(bundle, measured(bundle), digest=digest(bundle))
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    before = files(bundle)
    with pytest.raises(IntegrityError, match=name):
        add_calibration(bundle, measured(bundle), digest=digest(bundle))
    assert files(bundle) == before
    assert [each.name for each in bundle.parent.iterdir()] == ["bundle"]


def test_damaged_latencies_are_not_loaded(bundle):
    add_calibration(bundle, measured(bundle), digest=digest(bundle))
    (bundle / FILE_NAME).write_bytes((bundle / FILE_NAME).read_bytes().replace(b'"p99_ms": 3.0', b'"p99_ms": 2.5'))
    with pytest.raises(IntegrityError, match=FILE_NAME):
        load(bundle)


def test_an_engine_is_saved_with_what_was_measured_of_it(engine, saved, tmp_path):
    extra = Calibration(HERE, {**measured(saved).latencies, RunKind("f" * 16, 1, False): LATENCY})
    request = BundleRequest(name="tiny", license="MIT", calibration=extra)
    write_bundle(engine, engine.source.partition(), tmp_path / "bundle", request, Targets(), open_again=load)
    loaded = load(tmp_path / "bundle")
    assert loaded.calibration == measured(saved)
    np.testing.assert_array_equal(loaded.sample(steps=2, seeds=1), engine.sample(steps=2, seeds=1))


def test_a_manifest_without_calibration_keeps_its_bytes():
    """The shipped bundle: its manifest is written as it was read."""
    bundle = open_bundle(SHIPPED_BUNDLE, allow_hard_links=True)
    assert bundle.manifest.calibration is None
    assert bundle.manifest.to_json() == bundle.signed_bytes

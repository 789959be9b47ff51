"""Which latencies count where: identities find this machine, survive JSON, and say what differs."""

from __future__ import annotations

import dataclasses
import os

import pytest
from identities import GPU

from skipstep.errors import BundleError, DeviceUnavailableError, InputError
from skipstep.latency.identity import DeviceIdentity, device_identity
from skipstep.storage.untrusted import read_dataclass


def test_this_machine_is_found():
    import torch

    onnx = device_identity(backend="onnxruntime", loop="stepwise", device="cpu")
    assert onnx.cores == onnx.threads == len(os.sched_getaffinity(0))
    assert onnx.name
    assert device_identity(backend="onnxruntime", loop="stepwise", device="cpu") == onnx
    assert device_identity(backend="onnxruntime", loop="stepwise", device="cpu", num_threads=1).threads == 1
    by_torch = device_identity(backend="torch", loop="stepwise", device="cpu", num_threads=77)
    assert by_torch.threads == torch.get_num_threads()
    assert torch.__version__ in by_torch.library


def test_a_gpu_without_one_is_refused(monkeypatch):
    monkeypatch.setattr("skipstep.cuda.probe.ctypes.CDLL", _no_library)
    with pytest.raises(DeviceUnavailableError):
        device_identity(backend="torch", loop="captured", device="cuda:0")


def _no_library(name: str) -> None:
    raise OSError(name)


def test_a_gpu_has_the_drivers_version(monkeypatch, tmp_path):
    import skipstep.latency.identity as module

    (tmp_path / "version").write_text("580.65.06\n")
    monkeypatch.setattr(module, "_DRIVER_FILE", str(tmp_path / "version"))
    module._driver_version.cache_clear()
    try:
        found = device_identity(
            backend="torch", loop="captured", device="cuda:1", precision="bfloat16", gpu_name="NVIDIA L4"
        )
    finally:
        module._driver_version.cache_clear()
    assert (found.device, found.name, found.driver, found.precision) == ("cuda", "NVIDIA L4", "580.65.06", "bfloat16")
    assert found.cores is found.threads is None


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(DeviceIdentity)])
def test_every_fact_counts_and_is_named(field):
    other = dataclasses.replace(GPU)
    object.__setattr__(other, field, "other")
    assert other != GPU
    (difference,) = GPU.differences(other)
    assert difference.startswith(field)
    assert "instead of other" in difference


def test_facts_of_the_wrong_kind_of_device_are_refused():
    for changes in ({"driver": None}, {"cores": 2}, {"threads": 2}, {"device": "tpu"}, {"device": "cpu"}):
        with pytest.raises(InputError, match="cores"):
            dataclasses.replace(GPU, **changes)


def test_json_round_trip():
    here = device_identity(backend="onnxruntime", loop="stepwise", device="cpu")
    for identity in (GPU, here):
        assert read_dataclass(DeviceIdentity, identity.to_json(), "x") == identity
    for changes in ({"cores": 0}, {"cores": None}, {"driver": "7"}):
        with pytest.raises(BundleError):
            read_dataclass(DeviceIdentity, {**here.to_json(), **changes}, "x")
    for name in here.to_json():
        without = {key: value for key, value in here.to_json().items() if key != name}
        with pytest.raises(BundleError, match=name):
            read_dataclass(DeviceIdentity, without, "x")

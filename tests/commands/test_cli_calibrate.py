"""skipstep calibrate, as a user types it."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from skipstep import load
from skipstep.bundles.bundle import open_bundle
from skipstep.commands.main import main
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.latency.measure import calibrate

QUICK = ("--steps", "10", "--batch", "1", "--repeats", "3", "--seconds", "1")


@pytest.fixture
def bundle(tmp_path):
    return Path(shutil.copytree(SHIPPED_BUNDLE, tmp_path / "clothes"))


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_latencies_are_measured_printed_and_kept(bundle, capsys):
    status, out, err = run(capsys, "calibrate", bundle, *QUICK, "--threads", 1)
    assert status == 0
    assert "1 threads; onnxruntime" in out
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] == ["ddim"]]
    assert [(row[0], row[3], row[4], row[-1]) for row in rows] == [("10", "1", "no", "3"), ("10", "1", "yes", "3")]
    assert all(0 < float(row[5]) <= float(row[6]) <= float(row[7]) for row in rows)
    assert "stored in" in out
    assert "6 of 6 calls" in err
    assert "sign" not in err
    latencies = load(bundle, num_threads=1).calibration.latencies
    assert [f"{each.p99_ms:.2f}" for _, each in sorted(latencies.items())] == [row[7] for row in rows]
    assert load(bundle, num_threads=2).calibration is None
    assert run(capsys, "verify", bundle)[0] == 0


def test_a_dry_run_changes_nothing(bundle, capsys):
    before = {each: each.read_bytes() for each in bundle.rglob("*") if each.is_file()}
    status, out, _ = run(capsys, "calibrate", bundle, *QUICK, "--dry-run")
    assert status == 0
    assert "p99 ms" in out
    assert "stored" not in out
    assert {each: each.read_bytes() for each in bundle.rglob("*") if each.is_file()} == before


def test_it_needs_no_torch(bundle):
    code = (
        "import sys; from skipstep.commands.main import main\n"
        f"status = main(['calibrate', {str(bundle)!r}, *{QUICK!r}])\n"
        "assert status == 0 and not {'torch', 'diffusers', 'onnx', 'triton'} & set(sys.modules), 'heavy'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0, result.stderr


def test_a_signature_no_longer_fits_and_that_is_said(bundle, capsys, tmp_path):
    pytest.importorskip("cryptography")
    run(capsys, "keygen", tmp_path / "key")
    run(capsys, "keygen", tmp_path / "other")
    run(capsys, "sign", bundle, "--key", tmp_path / "key")
    signed = ("--require-signature", tmp_path / "other.pub")
    status, _, err = run(capsys, "calibrate", bundle, *QUICK, *signed)
    assert (status, "SignatureError" in err) == (2, True)
    status, _, err = run(capsys, "calibrate", bundle, *QUICK, "--require-signature", tmp_path / "key.pub")
    assert status == 0
    assert "sign the bundle again" in err
    assert not open_bundle(bundle).signed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "7"), "PlanNotFoundError"),
        (("--batch", "1000"), "batch_sizes=1000"),
        (("--repeats", "1"), "repeats=1"),
        (("--seconds", "0"), "max_seconds=0.0"),
    ],
)
def test_what_cannot_be_measured_is_said(bundle, capsys, arguments, said):
    status, _, err = run(capsys, "calibrate", bundle, *arguments)
    assert status == 2
    assert said in err
    assert open_bundle(bundle).manifest.calibration is None


def test_help_has_the_defaults_of_the_engine(capsys):
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    defaults = {name: each.default for name, each in inspect.signature(calibrate).parameters.items()}
    assert f"calls of each (default: {defaults['repeats']})" in out
    assert f"how long to measure (default: {defaults['max_seconds']:g})" in out
    assert "skipstep calibrate my-bundle --dry-run" in out

"""The manifest's reader: what was written comes back, and nothing else is taken or crashes it."""

from __future__ import annotations

import json

import pytest
from attack_count import tried
from hostile_json import FUZZ, KEY, changed, check_read_or_refused, fuzz, random_changes
from hypothesis import given
from hypothesis import strategies as st

from skipstep.bundles.manifest import (
    EngineEntry,
    FileEntry,
    GoldenEntry,
    KernelEntry,
    Manifest,
    PlanEntry,
    SamplerEntry,
)
from skipstep.bundles.reader import parse_manifest
from skipstep.errors import BundleError, IntegrityError
from skipstep.networks.spec import NetworkSpec


def a_manifest() -> Manifest:
    names = ["tables", "call", "step", "sampler", "golden", "engine", "cubin", "calibration.json"]
    return Manifest(
        model="clothes",
        digest="a" * 64,
        license="MIT",
        network=NetworkSpec((1, 8, 8), 3, 3, ("a", "b", "c"), prompt_shape=(4, 8)),
        batch_sizes=(1, 4),
        plans=(PlanEntry(KEY, 0, {"solver": "ddim", "eta": 0.3, "timesteps": [9, 5, 0], "clip": None}),),
        graphs={"call": "call", "step": "step"},
        tables="tables",
        golden=GoldenEntry("golden", KEY, (0, 2**64 - 1), (1, 2), 2.0, 1e-3),
        files={name: FileEntry(7, "b" * 64) for name in names},
        tools={"onnx": "1.20"},
        partition={"step": {"nodes": 3, "flops": 5}},
        defaults={"clip": 1.0},
        default_schedule=0,
        engines=(EngineEntry("engine", "rtx:sm86", "float16", {"flags": ["A"]}),),
        kernels=(KernelEntry("cubin", {"architecture": 87}),),
        samplers=(SamplerEntry("sampler", KEY, "loop", True),),
        calibration="calibration.json",
    )


def contents() -> dict:
    return json.loads(a_manifest().to_json())


def test_what_was_written_is_read():
    manifest = a_manifest()
    assert parse_manifest(manifest.to_json()) == manifest
    assert manifest.to_json() == a_manifest().to_json()


def test_a_manifest_from_before_there_were_calibrations_is_read():
    without = contents()
    del without["calibration"]
    manifest = parse_manifest(json.dumps(without).encode())
    assert manifest.calibration is None
    assert json.loads(manifest.to_json()) == without
    assert parse_manifest(json.dumps(without | {"calibration": None}).encode()) == manifest


@pytest.mark.parametrize(("schema", "remedy"), [(1, "skipstep export"), (3, "upgrade skipstep")])
def test_another_schema_is_named(schema, remedy):
    with pytest.raises(BundleError, match=f"schema {schema}") as caught:
        parse_manifest(changed(contents(), ("schema",), schema))
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("model",), None, "model"),
        (("digest",), "xyz", "hexadecimal"),
        (("network", "sample_shape"), [], "sample_shape"),
        (("network", "sample_shape"), [65536, 65536, 65536], "sample_shape"),
        (("network", "num_classes"), 0, "num_classes"),
        (("network", "null_label"), -1, "null_label"),
        (("batch_sizes",), [0], "batch_sizes"),
        (("batch_sizes",), [], "batch_sizes"),
        (("plans",), [], "plans"),
        (("plans", 0, "key"), "no", "hexadecimal"),
        (("plans", 0, "schedule"), -1, "schedule"),
        (("graphs",), {"call": "call"}, "no step network"),
        (("samplers", 0, "guided"), 1, "true or false"),
        (("samplers", 0, "magic"), True, "magic"),
        (("samplers", 0, "file"), "absent", "absent"),
        (("samplers", 0, "plan"), "f" * 16, "samplers"),
        (("golden", "plan"), "f" * 16, "golden"),
        (("golden", "seeds"), [], "seeds"),
        (("golden", "tolerance"), 2, "tolerance"),
        (("files", "step", "size"), -1, "size"),
        (("files", "step", "size"), 1 << 60, "size"),
        (("files", "step", "sha256"), "b" * 63, "sha256"),
        (("files", "step", "more"), 1, "more"),
        (("calibration",), "absent", "absent"),
        (("more",), 1, "more"),
    ],
)
def test_what_is_wrong_is_named(path, value, said):
    with pytest.raises(BundleError, match=said):
        parse_manifest(changed(contents(), path, value))


@pytest.mark.parametrize("name", ["/etc/passwd", "../step", "a/../../b", "a//b", "C:/x", "a\\b", "a\0b", "", "."])
def test_names_that_lead_out_are_refused(name):
    hostile = contents()
    hostile["files"][name] = hostile["files"]["call"]
    with pytest.raises(IntegrityError, match="file name"):
        parse_manifest(changed(hostile, ("graphs", "call"), name))
    with pytest.raises(IntegrityError, match="file name"):
        parse_manifest(json.dumps(contents() | {"files": hostile["files"]}).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema": NaN}',
        b'{"schema": 1e400}',
        b"[" * 100_000,
        b'{"schema": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_other_bytes_are_no_manifest(data):
    with pytest.raises(BundleError):
        parse_manifest(data)


@given(random_changes(contents()))
@fuzz(FUZZ)
def test_any_change_is_read_or_refused(data):
    """Random values anywhere in a good manifest: a manifest is returned, or a BundleError raised."""
    tried("manifests with up to three values replaced, removed or added")
    check_read_or_refused(data, parse_manifest, Manifest.to_json)


@given(st.lists(st.tuples(st.integers(0, len(a_manifest().to_json()) - 1), st.binary(max_size=3)), max_size=4))
@fuzz(FUZZ)
def test_any_bytes_are_read_or_refused(edits):
    tried("manifests with up to four runs of bytes replaced")
    data = bytearray(a_manifest().to_json())
    for at, piece in edits:
        data[at : at + len(piece) or 1] = piece
    check_read_or_refused(bytes(data), parse_manifest, Manifest.to_json)

"""The step kernel's machine code as the committed evidence has it, and how it is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

RESULTS = Path(__file__).parents[2] / "bench" / "results"

COUNT = """
import json
from kernel_inspection import inspect_small, least_bytes, operand_bytes, VARIANTS
assert operand_bytes({"ld.v4.b32": 3, "ld.v2.b32": 1, "st.v1.b32": 2, "ld.v1.b64": 1}) == 56
assert least_bytes(VARIANTS["learned_variance"], "fp16") == 4 + 4 + 2 + 2 + 2
assert least_bytes(VARIANTS["ring"], "fp32") == 6 * 4 + 4 + 4
cases = [(variant, dtype) for variant in ("plain", "everything") for dtype in ("fp16", "fp32")]
print(json.dumps([inspect_small(90, *case) for case in cases]))
"""


def test_programs_for_small_samples_move_the_least_and_never_wait():
    """Compiled in a process of its own: this one may have loaded Triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-c", COUNT]
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    for kernel in json.loads(output):
        assert kernel["bytes_per_element"] == kernel["least_bytes_per_element"]
        assert kernel["widest_access_bits"] == 128
        assert kernel["machine_accesses"]["LDG.128"] == kernel["global_accesses"]["ld.v4.b32"]
        assert kernel["machine_accesses"]["STG.128"] == kernel["global_accesses"]["st.v4.b32"]
        assert kernel["shared_accesses"] == kernel["barriers"] == kernel["spill_instructions"] == 0
        assert kernel["registers"] <= 64


def test_the_committed_evidence_covers_every_architecture():
    result = json.loads((RESULTS / "findings" / "kernel.json").read_text())
    architectures = [f"sm_{arch}" for arch in (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)]
    assert [row[0] for row in result["rows"]] == architectures
    assert all(row[-2:] == ["128 bit", "0"] for row in result["rows"])
    cases = {(each["variant"], each["dtype"]) for each in result["bytes_per_element"]}
    assert cases == {(variant, dtype) for variant in ("plain", "everything") for dtype in ("fp16", "fp32")}
    assert all(each["bytes_per_element"] == [each["least_bytes_per_element"]] for each in result["bytes_per_element"])

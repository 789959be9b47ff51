"""The step compiled for every architecture, without a GPU: what the compiler made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton")

# The architectures by hand and not from the module: dropping one there must fail here.
ARCHITECTURES = [75, 80, 86, 87, 89, 90, 100, 110, 120]
ELEMENTS_PER_THREAD = 8


@dataclass(frozen=True)
class Traffic:
    """Operands of the sample's size that a variant moves, by width, and what it reads once per program."""

    float32_in: int
    float32_out: int
    network_in: int
    network_out: int
    scalars: int
    seeds: int = 0


# The state is always read and written; a row of coefficients, the guidance scale and the seed are the scalars.
TRAFFIC = {
    "plain": Traffic(1, 1, 1, 1, scalars=6),
    "clip": Traffic(1, 1, 1, 1, scalars=7),
    "everything": Traffic(1, 1, 2, 2, scalars=9, seeds=1),
    "multistep": Traffic(2, 2, 1, 1, scalars=12),
    "runge_kutta": Traffic(3, 2, 1, 1, scalars=12),
    "learned_variance": Traffic(1, 1, 2, 1, scalars=11, seeds=1),
}


def run_without_interpreter(*command: str) -> str:
    """A process of its own: this one may have loaded Triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Facts by (arch, variant, dtype)."""
    out = tmp_path_factory.mktemp("aot") / "evidence.json"
    arguments = ["--out", str(out), "--arch", *map(str, ARCHITECTURES)]
    run_without_interpreter(str(Path(__file__).parent / "step_code.py"), *arguments)
    return {(k["arch"], k["variant"], k["dtype"]): k for k in json.loads(out.read_text())["kernels"]}


@pytest.fixture(scope="session")
def bare_kernels():
    script = str(Path(__file__).parent / "bare_step.py")
    facts = json.loads(run_without_interpreter(script, *map(str, ARCHITECTURES)))
    return {(k["arch"], k["dtype"]): k for k in facts}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_plain_ddim_pays_nothing_for_generality(kernels, bare_kernels, arch, dtype):
    """Registers, loads, stores and everything else are those of a kernel that can do no more."""
    assert kernels[arch, "plain", dtype] == bare_kernels[arch, dtype]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", TRAFFIC)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_generated_code(kernels, arch, variant, dtype):
    kernel, traffic = kernels[arch, variant, dtype], TRAFFIC[variant]
    accesses = kernel["global_accesses"]
    size = {"fp16": 2, "fp32": 4}[dtype]

    # Whole operands move 16 bytes at a time, each once.
    read = ELEMENTS_PER_THREAD * (4 * traffic.float32_in + size * traffic.network_in)
    written = ELEMENTS_PER_THREAD * (4 * traffic.float32_out + size * traffic.network_out)
    assert 16 * accesses["ld.v4.b32"] == read
    assert 16 * accesses["st.v4.b32"] == written
    assert accesses["ld.v1.b32"] == traffic.scalars
    assert accesses.get("ld.v1.b64", 0) == traffic.seeds
    assert set(accesses) <= {"ld.v4.b32", "st.v4.b32", "ld.v1.b32", "ld.v1.b64"}

    assert kernel["spill_instructions"] == 0
    assert kernel["local_bytes"] == 0
    assert kernel["stack_bytes"] == 0
    # By 128 threads: with 64 registers eight blocks fit on every one of these architectures, with 72 seven.
    assert kernel["registers"] <= (72 if variant == "learned_variance" else 64)
    assert kernel["fused_multiply_adds"] == 0

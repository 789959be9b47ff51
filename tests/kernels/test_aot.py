"""The step compiled for every architecture, without a GPU: what the compiler made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# The architectures by hand and not from the module: dropping one there must fail here.
ARCHITECTURES = [75, 80, 86, 87, 89, 90, 100, 110, 120]
ELEMENTS_PER_THREAD = 8


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Facts by (arch, variant, dtype), from a process of its own: this one may have loaded Triton's interpreter."""
    out = tmp_path_factory.mktemp("aot") / "evidence.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "skipstep.bench.step_codegen",
        "--out",
        str(out),
        "--arch",
        *map(str, ARCHITECTURES),
    ]
    subprocess.run(command, check=True, env=environment)
    return {(k["arch"], k["variant"], k["dtype"]): k for k in json.loads(out.read_text())["kernels"]}


def bytes_per_thread(kernel, operation):
    widths = {"v1.b32": 4, "v1.b64": 8, "v4.b32": 16, "v1.b16": 2, "v2.b32": 8}
    return sum(
        count * widths[form.split(".", 1)[1]]
        for form, count in kernel["global_accesses"].items()
        if form.startswith(operation)
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["plain", "clip", "everything"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_generated_code(kernels, arch, variant, dtype):
    kernel = kernels[arch, variant, dtype]
    guided = variant == "everything"
    size = {"fp16": 2, "fp32": 4}[dtype]
    state = 4 * ELEMENTS_PER_THREAD
    network = size * ELEMENTS_PER_THREAD * (2 if guided else 1)
    accesses = kernel["global_accesses"]

    # Whole operands move 16 bytes at a time, each once: x and the prediction in, x and the network's input out.
    assert 16 * accesses["ld.v4.b32"] == state + network
    assert bytes_per_thread(kernel, "st") == 16 * accesses["st.v4.b32"] == state + network
    # Beside them only the row of coefficients is read, and with it the scale and the seed.
    scalars = {"plain": 6, "clip": 7, "everything": 9}[variant]
    assert accesses["ld.v1.b32"] == scalars
    assert accesses.get("ld.v1.b64", 0) == (1 if guided else 0)
    assert set(accesses) <= {"ld.v4.b32", "st.v4.b32", "ld.v1.b32", "ld.v1.b64"}

    assert kernel["spill_instructions"] == 0
    assert kernel["local_bytes"] == 0
    assert kernel["stack_bytes"] == 0
    # 64 registers by 128 threads: eight blocks fit on every one of these architectures.
    assert kernel["registers"] <= 64
    assert kernel["fused_multiply_adds"] == 0


def test_what_a_plan_does_not_use_costs_nothing(kernels):
    for arch in ARCHITECTURES:
        for dtype in ("fp16", "fp32"):
            plain, everything = kernels[arch, "plain", dtype], kernels[arch, "everything", dtype]
            assert plain["registers"] <= everything["registers"]
            assert sum(plain["global_accesses"].values()) < sum(everything["global_accesses"].values())

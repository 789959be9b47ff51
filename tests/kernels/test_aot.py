"""The step and GroupNorm compiled for every architecture, without a GPU: what the compiler made of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Written here and not taken from the module: dropping one there must fail here. A machine with a GPU compiles for that
# one (`-m gpu`).
EVERY = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def architectures(*always):
    """Every one, those but `always` only where everything is tested."""
    rest = [pytest.param(arch, marks=pytest.mark.slow) for arch in EVERY if arch not in always]
    return [*always, *rest, pytest.param("device", marks=pytest.mark.gpu)]


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
    "ring": Traffic(4, 2, 1, 1, scalars=14),
    "learned_variance": Traffic(1, 1, 2, 1, scalars=11, seeds=1),
}


# What a row that is contiguous in memory is a multiple of, in elements: by positions or, channels-last, by channels.
MULTIPLES = {
    (1024, False): 1024, (4096, False): 4096, (35, False): 1,
    (4, True): 4, (12, True): 4, (10, True): 2, (3, True): 1,
}  # fmt: skip


def assembled(arch: int) -> bool:
    """Whether the assembler that comes with this Triton knows the architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    known = subprocess.run([get_ptxas(arch).path, "--help"], check=True, capture_output=True, text=True).stdout
    return re.search(rf"\bsm_{arch}\b", known) is not None


def test_the_assembler_is_asked_what_it_knows():
    # The oldest supported Triton's assembler lacks 110.
    assert all(map(assembled, (75, 90, 120)))
    assert not assembled(999)


def compiled(script, arch, *further):
    """What a script prints of an architecture."""
    if arch == "device":
        import torch

        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    if not assembled(arch):
        pytest.skip(f"this Triton's ptxas does not know sm_{arch}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / script), str(arch), *further]
    return json.loads(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout)


def by_case(found):
    return {(each["variant"], each["dtype"]): each for each in found}


# The oldest, the one of data centres and the one of desktops.
@pytest.mark.parametrize("arch", architectures(75, 90, 120))
def test_generated_code(arch):
    facts = compiled("compile_steps.py", arch)
    steps, bare = by_case(facts["steps"]), by_case(facts["bare"])
    assert steps.keys() == {(variant, dtype) for variant in TRAFFIC for dtype in ("fp16", "fp32")}

    # Plain DDIM pays nothing for generality: registers, loads, stores and all else are as in the hand-written kernel.
    assert bare.keys() == {("plain", "fp16"), ("plain", "fp32")}
    for case, kernel in bare.items():
        assert steps[case] == kernel
    check_accesses(steps, own=False)


@pytest.mark.parametrize("arch", architectures())
def test_generated_code_of_samples_at_their_own_stages_and_in_other_orders(arch):
    facts = compiled("compile_steps.py", arch, "forms")
    steps, placed = by_case(facts["steps"]), by_case(facts["placed"])
    assert placed.keys() == steps.keys()
    check_accesses(placed, own=True)

    # Channels-last samples are read and written as plain ones; where noise is drawn, each element draws its own block.
    for kernel in facts["channels_last"]:
        plain = steps[kernel["variant"], kernel["dtype"]]
        if not TRAFFIC[kernel["variant"]].seeds:
            assert kernel == plain
        elif kernel["variant"] == "everything":
            assert kernel["global_accesses"] == plain["global_accesses"]
        # The assembler keeps one register of this kernel in memory on sm_103.
        spills = 2 if (arch, kernel["variant"], kernel["dtype"]) == (103, "learned_variance", "fp16") else 0
        assert (kernel["spill_instructions"], kernel["local_bytes"], kernel["fused_multiply_adds"]) == (spills, 0, 0)
        assert kernel["registers"] <= 96


def check_accesses(kernels, *, own):
    """Of steps of the batch, or of samples that each have their `own` stage."""
    for (variant, dtype), kernel in kernels.items():
        case, traffic, size = (variant, dtype), TRAFFIC[variant], {"fp16": 2, "fp32": 4}[dtype]
        accesses = kernel["global_accesses"]
        # Whole operands move 16 bytes at a time, each once.
        read = ELEMENTS_PER_THREAD * (4 * traffic.float32_in + size * traffic.network_in)
        # A sample with a stage of its own reads its place and row, for noise its stage; it leaves the network no input.
        network_out = 0 if own else traffic.network_out
        written = ELEMENTS_PER_THREAD * (4 * traffic.float32_out + size * network_out)
        expected = {
            "ld.v4.b32": read // 16,
            "st.v4.b32": written // 16,
            "ld.v1.b32": traffic.scalars + own * (2 + traffic.seeds),
        }
        assert accesses == expected | ({"ld.v1.b64": traffic.seeds} if traffic.seeds else {}), case
        assert (read % 16, written % 16) == (0, 0), case

        for absent in ("spill_instructions", "local_bytes", "stack_bytes", "fused_multiply_adds"):
            assert kernel[absent] == 0, (case, absent)
        # By 128 threads: with 64 registers eight blocks fit on every one of these architectures, with 72 seven.
        assert kernel["registers"] <= (72 if variant in ("learned_variance", "ring") else 64), case


@pytest.mark.parametrize("arch", architectures())
def test_generated_code_of_norms(arch):
    facts = compiled("compile_norms.py", arch)
    # Four norms, two dtypes, two orders in memory, two added operands; the one of latents takes two launches.
    assert len(facts) == 4 * 8 + 8
    for each in facts:
        check_norm(each)


def check_norm(facts):
    case = tuple(facts[key] for key in ("first", "variant", "dtype", "channels_last", "added"))
    for absent in ("spill_instructions", "local_bytes", "stack_bytes", "fused_multiply_adds"):
        assert facts[absent] == 0, (case, absent)
    assert facts["registers"] <= 64, case
    last, size = facts["channels_last"], {"fp16": 2, "fp32": 4}[facts["dtype"]]
    elements = facts["block_c"] * facts["block_p"] // (32 * facts["num_warps"])
    multiple = MULTIPLES[facts["channels" if last else "positions"], last]
    width = size * min(16 // size, multiple, elements)
    form = {2: "v1.b16", 4: "v1.b32", 8: "v2.b32", 16: "v4.b32"}[width]
    accesses = elements * size // width
    images = 2 if facts["added"] == "image" else 1

    loads, stores = (
        {key.removeprefix(kind): n for key, n in facts["global_accesses"].items() if key.startswith(kind)}
        for kind in ("ld.", "st.")
    )
    # Each whole operand is read and written once, as wide as its rows allow; the rest are the partial results.
    if facts["first"]:
        assert stores == {"v1.b32": 2}, case
    else:
        assert stores == {form: images * accesses}, case
    if facts["added"] == "image":
        combined = 2 if facts["tiles"] > 1 and not facts["first"] else 0
        loads["v1.b32"] = loads.get("v1.b32", 0) - combined
        assert {key: n for key, n in loads.items() if n} == {form: images * accesses}, case
    # Two sums over a program, or two over the tiles: threads of several warps meet in shared memory.
    assert facts["barriers"] <= 4, case


@pytest.mark.slow
def test_every_kernel_compiles_as_it_is_launched():
    """The same script runs under the oldest supported Triton (`make triton`)."""
    script = str(Path(__file__).parent / "compile_launches.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = subprocess.run([sys.executable, script], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert "launches compile for sm_90" in output.stdout

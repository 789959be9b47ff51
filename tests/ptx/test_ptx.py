"""The PTX of every kernel, executed: the bits of the NumPy twin, no access out of bounds, no race, nothing fused.

The kernels are compiled in a process of their own (run_ptx.py). Here is what shows that its machine would notice.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx_machine import SHARED_BYTES, Machine
from ptx_memory import Memory
from ptx_parser import parse

from skipstep.export.cubins import ARCHITECTURES

FOLDER = Path(__file__).parent
HEAD = """.target sm_90a
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	ld.param.b32 %r1, [kernel_param_1];
	mov.u32 %r2, %tid.x;
	mul.wide.u32 %rd2, %r2, 4;
	add.s64 %rd3, %rd1, %rd2;
"""


def launched(body: str, number: int = 0) -> np.ndarray:
    """64 floats, 0 to 63, after a block of 64 threads has run; %rd3 is a thread's own, %r1 the number."""
    memory, data = Memory(), np.arange(64, dtype=np.float32)
    memory.add("shared memory", np.zeros(SHARED_BYTES, np.uint8))
    Machine(parse(f"{HEAD}{body}\tret;\n}}\n"), memory, (1, 1), [memory.add("data", data.view(np.uint8)), number]).run()
    return data


DOUBLED = "\tld.global.b32 %r3, [%rd3];\n\tadd.rn.f32 %r4, %r3, %r3;\n\tst.global.b32 [%rd3], %r4;\n"


def run(*arguments: str, script: str = "run_ptx.py") -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / script), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_kernels_have_the_bits_of_the_twin():
    assert re.search(r"\d{2,} launches for sm_90 have the twin's bits", run("--architectures", "90"))


def test_norms_are_their_definition():
    assert re.search(r"36 norms for sm_90 are their definition's", run("--architectures", "90", script="run_norms.py"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_on_every_architecture(arch):
    assert "are their definition's" in run("--architectures", str(arch), script="run_norms.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_set_of_flags_that_plans_make(arch):
    assert "have the twin's bits" in run("--all", "--architectures", str(arch))


def test_the_machine_computes():
    np.testing.assert_array_equal(launched(DOUBLED), 2 * np.arange(64))
    # Threads part at a branch and meet again.
    parted = "\tsetp.lt.u32 %p1, %r2, 9;\n\t@%p1 bra $L__BB0_1;\n" + DOUBLED + "$L__BB0_1:\n" + DOUBLED
    expected = np.arange(64) * np.where(np.arange(64) < 9, 2, 4)
    np.testing.assert_array_equal(launched(parted), expected)


FAULTS = {
    "behind the buffer": ("\tld.global.b32 %r3, [%rd3+4];\n", "offset 256 of 256 bytes"),
    "before the buffer": ("\tadd.s64 %rd4, %rd3, -4;\n\tst.global.b32 [%rd4], %r2;\n", "no address of a buffer"),
    "not aligned": ("\tld.global.v2.b32 {%r3, %r4}, [%rd3];\n", "not aligned"),
    "another's element": (
        DOUBLED + "\txor.b32 %r5, %r2, 1;\n\tmad.wide.u32 %rd4, %r5, 4, %rd1;\n\tld.global.b32 %r6, [%rd4];\n",
        "read what another wrote, without a barrier",
    ),
    "one place for all": ("\tst.global.b32 [%rd1], %r2;\n", "wrote different values at once"),
    "a number as a pointer": ("\tcvt.u64.u32 %rd4, %r1;\n\tld.global.b32 %r3, [%rd4];\n", "no address of a buffer"),
    "some at a barrier": (
        "\tsetp.lt.u32 %p1, %r2, 9;\n\t@%p1 bra $L__BB0_1;\n\tbar.sync 0;\n$L__BB0_1:\n",
        "a barrier that some threads do not reach",
    ),
    "fused": ("\tfma.rn.f32 %r3, %r2, %r2, %r2;\n", "fma.rn.f32 for sm_90a"),
    "flushed": ("\tadd.rn.ftz.f32 %r3, %r2, %r2;\n", "add.rn.ftz.f32 for sm_90a"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_refuses(fault):
    body, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        launched(body)


def test_a_barrier_orders():
    other = "\txor.b32 %r5, %r2, 1;\n\tmad.wide.u32 %rd4, %r5, 4, %rd1;\n\tld.global.b32 %r6, [%rd4];\n"
    done = launched(DOUBLED + "\tbar.sync 0;\n" + other + "\tbar.sync 0;\n\tst.global.b32 [%rd3], %r6;\n")
    np.testing.assert_array_equal(done, 2.0 * (np.arange(64) ^ 1))


CHANGES = [
    ("add.rn.f32", "sub.rn.f32"),
    ("mul.rn.f32 ", "add.rn.f32 "),
    ("min.NaN.f32", "min.f32"),
    ("max.NaN.f32", "min.NaN.f32"),
    ("mul.hi.u32", "mul.lo.s32"),
    ("xor.b32", "or.b32"),
    ("setp.gtu.f32", "setp.gt.f32"),
    ("bar.sync", "//"),
]


@pytest.mark.slow
def test_single_changes_of_a_kernel_are_noticed():
    """Each change of one instruction, in a kernel that uses every part of the step, must leave other bits or be an
    access that the memory refuses."""
    assert re.search(r"(\d+) of \1 changes noticed", run("--changes", *(f"{a}={b}" for a, b in CHANGES)))


NORM_CHANGES = [
    ("add.rn.f32 ", "sub.rn.f32 "),
    ("sub.rn.f32 ", "add.rn.f32 "),
    ("mul.rn.f32 ", "add.rn.f32 "),
    ("div.rn.f32", "mul.rn.f32"),
    ("sqrt.rn.f32", "mov.b32"),
    (", 16, 31, -1", ", 8, 31, -1"),
    ("bar.sync", "//"),
    ("min.s32", "max.s32"),
    ("selp.f32", "//"),
    ("and.pred", "or.pred"),
]


@pytest.mark.slow
def test_single_changes_of_norms_are_noticed():
    """In a norm of one launch and in both kernels of one of two."""
    found = run("--changes", *(f"{a}={b}" for a, b in NORM_CHANGES), script="run_norms.py")
    counts = re.findall(r"(\d+) of (\d+) changes noticed", found)
    assert [noticed for noticed, _ in counts] == [planted for _, planted in counts], found
    assert len(counts) == 2
    assert all(int(planted) >= 15 for _, planted in counts), found

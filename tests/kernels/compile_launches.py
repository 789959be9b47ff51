"""Compiles every kernel for sm_90 as a launch does, without a GPU: `python compile_launches.py`.

Triton's own launch path decides what is specialised: an integer 1 becomes a constant, and so does the fact that 16
divides a pointer or a size. Only the driver is a stand-in. It needs Triton, NumPy and skipstep, but not torch, so it
also runs in an environment of the oldest supported Triton. In a process of its own: the suite has loaded Triton's
interpreter.
"""

import itertools
import re

import triton
from norm_inspection import NORMS, NormCase
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from skipstep.kernels.launch import StepLaunch, step_constants
from skipstep.kernels.layout import StepFlags
from skipstep.kernels.philox_kernel import philox_normal_kernel
from skipstep.kernels.step_kernel import ddim_step_kernel

# One element, an odd number, one that 16 divides.
SIZES = (1, 3 * 5 * 7, 3 * 32 * 32)
# 0 and 1 are specialised where another stage is not.
STAGES = (0, 1, 7)
FLAGS = (
    StepFlags(),
    StepFlags(clip=True, rederive_eps=True, add_noise=True, guided=True, rescale=True),
    StepFlags(threshold=True, add_state=True, read_h0=True, write_h0=True),
    StepFlags(read_h0=True, read_h1=True, read_h2=True, write_h1=True),
    StepFlags(add_state=True, read_h1=True, write_h2=True),
    StepFlags(clip=True, scale_guidance=True, guided=True),
    StepFlags(doubled=True),
    StepFlags(clip=True, add_state=True, add_noise=True, learned_variance=True, wide_output=True, guided=True),
)
TARGET = GPUTarget("cuda", 90, 32)
LAUNCHES = (StepLaunch(256, 1), StepLaunch(1024, 4))


class StandInDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Pointer:
    """A tensor, as far as specialisation looks at one."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 256

    def ptr_range(self) -> int:
        return 1 << 40


def launches():
    f32, i32, i64 = Pointer("float32"), Pointer("int32"), Pointer("int64")
    for dtype, size, launch in itertools.product(("float16", "bfloat16", "float32"), SIZES, LAUNCHES):
        network = Pointer(dtype)
        for copies, chooses in ((1, False), (2, True)):
            options = {"STREAM": 0, "COPIES": copies, "CHOOSES": chooses, "CHANNELS": 0, "BLOCK": launch.block_size}
            yield philox_normal_kernel, (f32, network, i64, i32, size, 0), options, launch.num_warps
    # Every set of flags meets every size and stage, and each dtype and launch meets every set.
    for flags, (index, (size, stage)) in itertools.product(FLAGS, enumerate(itertools.product(SIZES, STAGES))):
        network, launch = Pointer(("float16", "bfloat16", "float32")[index % 3]), LAUNCHES[index % 2]
        options = step_constants(
            flags,
            per_sample=index % 2 == 1,
            store_x0=index % 3 == 1,
            counted=index == 4,
            checked=index % 4 != 3,
            placed=index == 6,
            channels=3 if index % 4 == 2 and size > 1 else 0,
        )
        state = (f32, f32, network, network, f32, f32, f32, i64, f32, f32, f32, i32, i32, size, stage)
        yield ddim_step_kernel, state, {**options, "BLOCK": launch.block_size}, launch.num_warps
    # Each norm in both orders meets each dtype or each added operand.
    for index, (norm, last) in enumerate(itertools.product(NORMS.values(), (False, True))):
        dtypes, added = (("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")), ("", "vector", "image")
        for turn in range(3):
            (short, name), what = dtypes[turn], added[(index + turn) % 3]
            case = NormCase(*norm, short, last, what, silu=turn != 2, affine=index % 2 == 0)
            for kernel, pointers, constants in case.kernels():
                tensors = tuple(f32 if each == "*fp32" else Pointer(name) for each in pointers.values())
                yield kernel, tensors, constants, case.launch.num_warps


def main() -> None:
    driver.set_active(StandInDriver())
    count = 0
    for kernel, arguments, options, num_warps in launches():
        compiled = kernel.warmup(
            *arguments,
            **options,
            num_warps=num_warps,
            enable_fp_fusion=False,
            grid=(1, 1),
        )
        ptx = compiled.asm["ptx"]
        # With either, a GPU's bits would differ from the NumPy twin's.
        assert not re.search(r"\bfma\.|\.ftz\b", ptx), (kernel, options)
        assert f"sm_{TARGET.arch}" in ptx
        assert compiled.asm["cubin"]
        count += 1
    print(f"Triton {triton.__version__}: {count} launches compile for sm_{TARGET.arch}")


if __name__ == "__main__":
    main()

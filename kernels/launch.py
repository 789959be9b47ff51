"""How the step is launched: the launch configuration, and the rule that chooses it.

    a program   block_size elements of one sample, processed by num_warps warps of 32 threads
    a thread    e = block_size / (32·num_warps) elements, 16 bytes an access: e is 8 for float16, at least 4 for float32

Results do not depend on the launch: the step is elementwise, and the noise counter counts elements, not programs.

A launch affects, little compared with the network's time,
  latency     of small samples. A 3×32×32 sample is 3 programs of 1024 elements; all other multiprocessors are idle.
              Programs of one warp also need neither shared memory nor a barrier to regroup elements between float32 and
              float16 accesses: they use shuffles.
  bandwidth   of large samples: enough warps on every multiprocessor to cover the memory's latency with bytes in flight
              (on an H200 4.8 TB/s · 0.7 µs / 132 = 25 kB), and few programs, because the scheduler starts each of them
              and each reads the row of coefficients again.
More than eight elements a thread do not help: noise then takes up to 105 registers, and only half as many warps fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from skipstep.errors import InputError, check_integer, check_type, shown
from skipstep.kernels.layout import StepFlags, check_slots

# A thread draws its noise four elements at a time, one Philox block; a program's blocks are counted by a 32-bit word.
MIN_ELEMENTS_PER_THREAD: Final = 4
MAX_BLOCK_SIZE: Final = 2**16  # As skipstep.edge.step_binary has it; far below 2^34, at which that word would end.
MAX_WARPS: Final = 32

_ACCESS_BYTES: Final = 16
_WIDE_ELEMENTS: Final = 8  # One access of float16, two of float32.


@dataclass(frozen=True, slots=True)
class StepLaunch:
    """`block_size` elements of one sample per program, `num_warps` warps of 32 threads.

    Both are powers of two, with at least four elements a thread. Raises InputError otherwise.
    """

    block_size: int
    num_warps: int

    def __post_init__(self) -> None:
        for name, most in (("block_size", MAX_BLOCK_SIZE), ("num_warps", MAX_WARPS)):
            value = getattr(self, name)
            # A bool is an int, and 1 is a power of two.
            if type(value) is not int or not 1 <= value <= most or value & (value - 1):
                raise InputError(
                    got=f"{name}={shown(value)}",
                    expected=f"a power of two, 1 to {most}",
                    remedy="use the launch that choose_launch returns",
                )
        if self.elements_per_thread < MIN_ELEMENTS_PER_THREAD:
            raise InputError(
                got=f"{self.block_size} elements by {self.num_warps} warps",
                expected=f"at least {MIN_ELEMENTS_PER_THREAD} elements for each of the {32 * self.num_warps} threads",
                remedy="use fewer warps, or a larger block",
            )

    @property
    def elements_per_thread(self) -> int:
        return self.block_size // (32 * self.num_warps)

    def grid(self, num_elements: int, batch_size: int) -> tuple[int, int]:
        """Programs along a sample, and samples."""
        return -(-num_elements // self.block_size), batch_size


# For an unknown device, and for kernels that are compiled ahead of time for any sample.
DEFAULT_LAUNCH = StepLaunch(block_size=1024, num_warps=4)


@dataclass(frozen=True, slots=True)
class _Multiprocessor:
    """The most resident warps and programs (CUDA C++ Programming Guide, "Compute Capabilities")."""

    warps: int
    programs: int

    @property
    def fewest_warps(self) -> int:
        """The fewest warps per program, a power of two, with which programs can fill the multiprocessor."""
        return 1 << (-(-self.warps // self.programs) - 1).bit_length()


# By compute capability. Each multiprocessor has four schedulers, on all of these.
_MULTIPROCESSORS: Final[Mapping[int, _Multiprocessor]] = {
    75: _Multiprocessor(warps=32, programs=16),
    80: _Multiprocessor(warps=64, programs=32),
    86: _Multiprocessor(warps=48, programs=16),
    87: _Multiprocessor(warps=48, programs=16),
    89: _Multiprocessor(warps=48, programs=24),
    90: _Multiprocessor(warps=64, programs=32),
    100: _Multiprocessor(warps=64, programs=32),
    103: _Multiprocessor(warps=64, programs=32),
    110: _Multiprocessor(warps=48, programs=24),
    120: _Multiprocessor(warps=48, programs=24),
    121: _Multiprocessor(warps=48, programs=24),
}
_SCHEDULERS: Final = 4


def choose_launch(
    *, num_elements: int, batch_size: int, num_multiprocessors: int, compute_capability: int, network_item_size: int
) -> StepLaunch:
    """The launch for `batch_size` samples of `num_elements` = C·H·W, by rule; skipstep.kernels.autotune measures.

    `compute_capability` is 90 for 9.0; an unknown one is treated as the newest known one below it. `network_item_size`
    is the size of the network's dtype in bytes, 2 or 4. Raises InputError.
    """
    num_elements = check_integer("num_elements", num_elements, low=1)
    batch_size = check_integer("batch_size", batch_size, low=1)
    num_multiprocessors = check_integer("num_multiprocessors", num_multiprocessors, low=1)
    compute_capability = check_integer("compute_capability", compute_capability, low=1)
    elements = least_elements_per_thread(network_item_size)
    multiprocessor = _multiprocessor(compute_capability)

    def programs(warps: int) -> int:
        return batch_size * -(-num_elements // (32 * warps * elements))

    # At most one warp for each scheduler: nothing is shared, so the smallest programs have the least latency.
    if programs(1) <= _SCHEDULERS * num_multiprocessors:
        return StepLaunch(32 * elements, 1)
    # All run at once, several on a scheduler: the smallest programs with which a multiprocessor holds them all.
    if programs(multiprocessor.fewest_warps) <= multiprocessor.programs * num_multiprocessors:
        return StepLaunch(32 * multiprocessor.fewest_warps * elements, multiprocessor.fewest_warps)
    # More than the device holds: throughput counts, so two accesses in flight per thread, for float32 too.
    warps = max(multiprocessor.fewest_warps, DEFAULT_LAUNCH.num_warps)
    return StepLaunch(32 * warps * _WIDE_ELEMENTS, warps)


def least_elements_per_thread(network_item_size: int) -> int:
    """The fewest elements a thread with which all accesses are 16 bytes wide. Raises InputError."""
    if type(network_item_size) is not int or network_item_size not in (2, 4):
        raise InputError(
            got=f"network_item_size={shown(network_item_size)}",
            expected="2 or 4 bytes: float16, bfloat16 or float32",
            remedy="pass the item size of the network's dtype",
        )
    return _ACCESS_BYTES // network_item_size


def _multiprocessor(compute_capability: int) -> _Multiprocessor:
    older = [known for known in _MULTIPROCESSORS if known <= compute_capability]
    if not older:
        raise InputError(
            got=f"compute_capability={compute_capability}",
            expected=f"{min(_MULTIPROCESSORS)} or more, 90 for 9.0",
            remedy="pass 10·major + minor of a GPU of the Turing generation or later",
        )
    return _MULTIPROCESSORS[max(older)]


def step_constants(
    flags: StepFlags,
    *,
    per_sample: bool,
    store_x0: bool,
    counted: bool = False,
    checked: bool = False,
    placed: bool = False,
    channels: int = 0,
) -> dict[str, int]:
    """The kernel's compile-time constants except BLOCK, for launching and for compiling ahead of time.

    `counted`: the stage is read on the device. `checked`: samples that are not finite are marked. `placed`: samples
    are some of those in memory, each at its own stage. `channels`: those of the state, if samples are in
    channels-last order.
    """
    check_type("flags", flags, StepFlags, remedy="pass the plan's, of one stage")
    check_slots(flags)
    return {
        "PER_SAMPLE": per_sample,
        "CLIPPED": flags.clip,
        "THRESHOLDED": flags.threshold,
        "REDERIVED": flags.rederive_eps,
        "ADD_STATE": flags.add_state,
        "READ_H0": flags.read_h0,
        "READ_H1": flags.read_h1,
        "READ_H2": flags.read_h2,
        "WRITTEN_SLOT": next(iter(flags.written_slots), -1),
        "NOISY": flags.add_noise,
        "LEARNED_VARIANCE": flags.learned_variance,
        "WIDE": flags.wide_output,
        "GUIDED": flags.guided,
        "DOUBLED": flags.input_copies == 2,
        "SCALED": flags.guided and flags.scale_guidance,
        "RESCALED": flags.rescale,
        "STORE_X0": store_x0,
        "COUNTED": counted,
        "CHECKED": checked,
        "PLACED": placed,
        "CHANNELS": channels,
    }

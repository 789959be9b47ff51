"""How the step is launched: a frozen choice, apart from what the kernel computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLaunch:
    """`block_size` elements of one sample per program, by `num_warps` warps of 32 threads."""

    block_size: int
    num_warps: int

    def grid(self, num_elements: int, batch_size: int) -> tuple[int, int]:
        """Programs along a sample, and samples."""
        return -(-num_elements // self.block_size), batch_size


# Eight elements a thread: one 128-bit access of float16, two of float32. Fewer would halve the width of the former;
# more would leave a 28×28 sample to too few threads.
DEFAULT_LAUNCH = StepLaunch(block_size=1024, num_warps=4)

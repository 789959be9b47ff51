"""How the step is launched: a frozen choice, apart from what the kernel computes."""

from __future__ import annotations

from dataclasses import dataclass

from skipstep.kernels.layout import StepFlags


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


def step_constants(flags: StepFlags, *, per_sample: bool, store_x0: bool) -> dict[str, bool]:
    """The kernel's compile-time constants but for BLOCK; launching and compiling ahead of time agree through this."""
    return {
        "PER_SAMPLE": per_sample,
        "CLIPPED": flags.clip,
        "THRESHOLDED": flags.threshold,
        "REDERIVED": flags.rederive_eps,
        "ADD_STATE": flags.add_state,
        "READ_BASE": flags.read_base,
        "WRITE_BASE": flags.write_base,
        "READ_MEMORY": flags.read_memory,
        "WRITE_MEMORY": flags.write_memory,
        "NOISY": flags.add_noise,
        "LEARNED_VARIANCE": flags.learned_variance,
        "WIDE": flags.wide_output,
        "GUIDED": flags.guided,
        "RESCALED": flags.rescale,
        "STORE_X0": store_x0,
    }

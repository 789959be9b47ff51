"""The kernels on small operands, for a memory checker to watch: `python -m skipstep.bench.gpu.checked_kernels`.

Sizes that fill their blocks and sizes that do not; all flags that read or write something of their own. At the end a
kernel writes out of bounds on purpose: a checker that does not report it has checked nothing.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import fields

import torch
import triton
import triton.language as tl

from skipstep.kernels.layout import NUM_COLUMNS, StepFlags
from skipstep.kernels.step import ddim_step, initial_noise

_SIZES = (1, 1024, 4097)
_FEW_SIZES = (1, 63)  # The interpreter takes its time.
_BATCH_SIZE = 3


@triton.jit
def planted_write_kernel(pointer, distance):  # type: ignore[no-untyped-def]
    tl.store(pointer + distance, 1.0)


def run_kernels(device: str) -> None:
    sizes = _SIZES if device == "cuda" else _FEW_SIZES
    everything = StepFlags(**{each.name: each.name != "clip" for each in fields(StepFlags)})
    for n, flags, dtype in itertools.product(sizes, (StepFlags(clip=True), everything), (torch.float16, torch.float32)):
        network_batch, channels = _BATCH_SIZE * (2 if flags.guided else 1), 2 if flags.wide_output else 1
        state = torch.randn(_BATCH_SIZE, 1, n, 1, device=device)
        network_input = torch.empty(network_batch, 1, n, 1, device=device, dtype=dtype)
        seeds = torch.arange(_BATCH_SIZE, device=device)
        initial_noise(state=state, network_input=network_input, seeds=seeds)
        ones = torch.ones(_BATCH_SIZE, device=device)
        ddim_step(
            state=state,
            model_output=torch.randn(network_batch, channels, n, 1, device=device).to(dtype),
            network_input=network_input,
            table=torch.rand(2, _BATCH_SIZE, NUM_COLUMNS, device=device),
            stage=1,
            flags=flags,
            seeds=seeds,
            guidance=ones,
            rescale=ones,
            bound=ones,
            base=torch.zeros_like(state),
            memory=torch.zeros_like(state),
            x0=torch.empty_like(state),
            broken=torch.full((_BATCH_SIZE,), 99, device=device, dtype=torch.int32),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    run_kernels(options.device)
    if options.device == "cuda":
        torch.cuda.synchronize()
        planted_write_kernel[(1,)](torch.zeros(256, device="cuda"), 1 << 20)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Samples as pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from skipstep.errors import InputError


def to_pil(samples: NDArray[np.float32]) -> list[Image.Image]:
    """Turn `[B, C, H, W]` in [-1, 1] into 8-bit pictures, C = 1 (grey) or 3 (RGB). Values outside are clamped.

    Raises InputError for another number of channels.
    """
    channels = samples.shape[1]
    if channels not in (1, 3):
        raise InputError(
            got=f"samples with {channels} channels",
            expected="1 (grey) or 3 (RGB)",
            remedy="ask for output_type='np' and decode the latents first",
        )
    pixels = np.rint((samples.clip(-1.0, 1.0) + 1.0) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image[..., 0] if channels == 1 else image) for image in pixels]

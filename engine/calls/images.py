"""Samples as pictures, alone or in a labelled grid: a row per step count, a column per sample, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from skipstep.arrays import host_floats
from skipstep.errors import InputError

MAX_COLUMNS = 10
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CELL = 96
_GAP = 6
_FONT_SIZE = 14
_INK, _PAPER = (32, 33, 36), (255, 255, 255)


def to_pil(samples: NDArray[np.float32]) -> list[Image.Image]:
    """Turn `[B, C, H, W]` in [-1, 1] into 8-bit pictures, C = 1 (grey) or 3 (RGB). Values outside are clamped.

    Raises InputError for another number of channels.
    """
    samples = host_floats("samples", samples)
    if samples.ndim != 4:
        raise InputError(
            got=f"samples of shape {list(samples.shape)}",
            expected="pictures, [B, C, H, W]",
            remedy="pass samples[None] for one picture; other states are arrays, output_type='np'",
        )
    if np.isnan(samples).any():
        raise InputError(got="NaN in samples", expected="numbers", remedy="check the network that drew them")
    channels = samples.shape[1]
    if channels not in (1, 3):
        raise InputError(
            got=f"samples with {channels} channels",
            expected="1 (grey) or 3 (RGB)",
            remedy="ask for output_type='np' and decode the latents first",
        )
    pixels = np.rint((samples.clip(-1.0, 1.0) + 1.0) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image[..., 0] if channels == 1 else image) for image in pixels]


def read_pictures(folder: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The pictures of a folder and those in it, `[N, *shape]` in [-1, 1], C = 1 or 3; none where there is none.

    Raises InputError for one of another size, or that cannot be read.
    """
    channels, height, width = shape if len(shape) == 3 and shape[0] in (1, 3) else (0, 0, 0)
    pictures = []
    for file in sorted(each for each in folder.rglob("*") if each.suffix.lower() in PICTURES):
        try:
            with Image.open(file) as image:
                size, pixels = image.size, np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
        except (OSError, ValueError) as error:
            size, reason = (-1, -1), f"which cannot be read ({error})"
        else:
            reason = f"a picture of {size[0]}x{size[1]} pixels"
        if size != (width, height):
            raise InputError(
                got=f"{file}, {reason}",
                expected=f"a picture like those that the network draws, {list(shape)}",
                remedy="convert the pictures first, or take this one out of the folder",
            )
        pictures.append(pixels.reshape(height, width, channels).transpose(2, 0, 1) / 127.5 - 1.0)
    return np.stack(pictures) if pictures else np.empty((0, *shape), np.float32)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], *, row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Arrange `rows[r][c]`, pictures of one size, under `column_labels[c]` and beside `row_labels[r]`.

    More than MAX_COLUMNS columns continue below, as further blocks of all rows.
    """
    font = ImageFont.load_default(size=_FONT_SIZE)
    num_samples = len(rows[0])
    columns = min(num_samples, MAX_COLUMNS)
    blocks = -(-num_samples // columns)
    width, height = _cell_size(rows[0][0])
    margin = 2 * _GAP + max(round(font.getlength(label)) for label in row_labels)
    header = _FONT_SIZE + 2 * _GAP
    block_height = header + len(rows) * (height + _GAP)
    canvas = Image.new("RGB", (margin + columns * (width + _GAP), blocks * block_height + _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for block in range(blocks):
        top = block * block_height
        for column, sample in enumerate(range(block * columns, min(num_samples, (block + 1) * columns))):
            left = margin + column * (width + _GAP)
            draw.text((left + width // 2, top + header // 2), column_labels[sample], _INK, font, anchor="mm")
            for r, row in enumerate(rows):
                # Whole pixels, not smoothed: the picture should show what the model drew.
                cell = row[sample].convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                canvas.paste(cell, (left, top + header + r * (height + _GAP)))
        for r, label in enumerate(row_labels):
            middle = top + header + r * (height + _GAP) + height // 2
            draw.text((margin - _GAP, middle), label, _INK, font, anchor="rm")
    return canvas


def _cell_size(picture: Image.Image) -> tuple[int, int]:
    factor = max(1, round(_CELL / picture.width))
    return picture.width * factor, picture.height * factor

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from skipstep.calls.images import MAX_COLUMNS, labelled_grid, to_pil
from skipstep.errors import InputError


def test_pixels_cover_the_range_and_are_rounded():
    values = np.array([-1.0, 0.0, 1.0, -3.0, 3.0, 1 / 127.5], np.float32).reshape(1, 1, 1, 6)
    (picture,) = to_pil(values)
    assert picture.mode == "L"
    assert np.asarray(picture).tolist() == [[0, 128, 255, 0, 255, 128]]


def test_three_channels_are_red_green_blue():
    values = np.full((2, 3, 4, 5), -1.0, np.float32)
    values[1, 2] = 1.0
    pictures = to_pil(values)
    assert [picture.size for picture in pictures] == [(5, 4), (5, 4)]
    assert pictures[1].getpixel((0, 0)) == (0, 0, 255)


def test_latents_are_no_pictures():
    with pytest.raises(InputError, match="4 channels"):
        to_pil(np.zeros((1, 4, 8, 8), np.float32))


def grey(value: int) -> Image.Image:
    return Image.new("L", (28, 28), value)


@pytest.mark.parametrize("num_samples", [1, 3, MAX_COLUMNS, MAX_COLUMNS + 1, 2 * MAX_COLUMNS + 3])
def test_a_grid_shows_every_picture_once(num_samples):
    # Colours that occur neither in the paper nor in the ink, nor between them: the letters' edges are greys.
    pictures = [[Image.new("RGB", (28, 28), (200 - r, 10 + i, 30)) for i in range(num_samples)] for r in range(2)]
    labels = [f"sample {i}" for i in range(num_samples)]
    pixels = np.asarray(labelled_grid(pictures, row_labels=["10 steps", "20 steps"], column_labels=labels))
    cell = pictures[0][0].width * 3
    for r in range(2):
        for i in range(num_samples):
            rows, columns = np.nonzero((pixels == (200 - r, 10 + i, 30)).all(axis=2))
            assert len(rows) == cell * cell
            assert (np.ptp(rows), np.ptp(columns)) == (cell - 1, cell - 1)


def test_a_column_lines_up_over_its_rows_and_has_a_label():
    pictures = [[grey(0), grey(255)], [grey(0), grey(255)]]
    labelled = np.asarray(labelled_grid(pictures, row_labels=["a", "b"], column_labels=["left", "right"]))
    blank = np.asarray(labelled_grid(pictures, row_labels=["a", "b"], column_labels=["", ""]))
    changed = np.argwhere((labelled != blank).any(axis=2))
    assert changed[:, 0].max() < 30, "column labels stand above the pictures"
    black = (blank == 0).all(axis=2)
    assert black.sum(axis=0).max() == 2 * 28 * 3

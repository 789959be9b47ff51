"""Between two initial noises: spherical interpolation, along which normals keep their length.

    slerp(a, b, w) = sin((1-w)·θ)/sin θ · a + sin(w·θ)/sin θ · b        cos θ = <a, b>/(|a||b|)

(DDIM's latents: arXiv 2010.02502, section 5.3, eq. 67 there.) One angle per sample, in float64. Where the two are
nearly parallel the weights become 1-w and w; where they are opposite, the shortest path is not unique and the request
is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skipstep.arrays import float32, host_floats, number_array
from skipstep.errors import InputError, check_integer, check_items, shown

# Below this angle sin θ is the difference of nearly equal numbers; above π minus it there is no direction to take.
SMALL_ANGLE = 1e-6
# On one path; more latents than this do not fit in memory for any network of use.
MAX_POINTS = 1 << 16


def slerp(a: NDArray[np.float32], b: NDArray[np.float32], weights: ArrayLike) -> NDArray[np.float32]:
    """The points at `weights` `[n]` on the path from a to b (each `[…]`), float32 `[n, …]`; 0 is a and 1 is b.

    Raises InputError for different shapes, and for noises that are zero, not finite or opposite.
    """
    a, b = host_floats("a", a), host_floats("b", b)
    if a.shape != b.shape:
        raise InputError(
            got=f"latents of shapes {list(a.shape)} and {list(b.shape)}",
            expected="two of one shape",
            remedy="interpolate between initial noises of one network",
        )
    w = number_array(weights)
    if w is None or w.ndim > 1 or not np.isfinite(w).all() or w.size > MAX_POINTS:
        raise InputError(
            got=f"weights={shown(weights)}",
            expected=f"at most {MAX_POINTS} finite numbers, 0 at a and 1 at b",
            remedy="pass np.linspace(0, 1, 8)",
        )
    w = w.astype(np.float64).reshape(-1, *[1] * a.ndim)
    start, end = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(start.ravel()), np.linalg.norm(end.ravel())
    if not all(np.isfinite(length) and length > 0.0 for length in lengths):
        raise InputError(
            got=f"latents of lengths {lengths[0]:g} and {lengths[1]:g}",
            expected="two finite directions",
            remedy="interpolate between samples of standard normal noise",
        )
    cosine = float(np.vdot(start, end) / (lengths[0] * lengths[1]))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    if np.pi - angle < SMALL_ANGLE:
        raise InputError(
            got="latents in opposite directions",
            expected="an angle below 180 degrees, so that the shortest path is unique",
            remedy="interpolate to a third noise, and from it",
        )
    if angle < SMALL_ANGLE:
        between = (1.0 - w) * start + w * end
    else:
        between = (np.sin((1.0 - w) * angle) * start + np.sin(w * angle) * end) / np.sin(angle)
    return float32(between)


def slerp_grid(corners: Sequence[NDArray[np.float32]], *, rows: int, columns: int) -> NDArray[np.float32]:
    """`[rows·columns, …]` row by row, between the corners top left, top right, bottom left and bottom right."""
    rows, columns = (
        check_integer(name, n, low=2, high=MAX_POINTS) for name, n in (("rows", rows), ("columns", columns))
    )
    remedy = "pass top left, top right, bottom left and bottom right"
    corners = check_items("corners", corners, expected="four corners", remedy=remedy)
    if len(corners) != 4:
        raise InputError(got=f"{len(corners)} corners", expected="four corners", remedy=remedy)
    down = np.linspace(0.0, 1.0, rows)
    left, right = slerp(corners[0], corners[2], down), slerp(corners[1], corners[3], down)
    across = np.linspace(0.0, 1.0, columns)
    return np.concatenate([slerp(start, end, across) for start, end in zip(left, right, strict=True)])

"""Pictures to arrays and back, and the autoencoder between pictures and latents: in tiles above a size.

Tiles are of the one size that the graphs were exported for; neighbours overlap by a quarter or more and are blended
linearly. What fits in one tile is computed as a whole, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import float32, from_dlpack, host_floats
from skipstep.errors import InputError, ModelFormatError, NonFiniteError

if TYPE_CHECKING:
    from PIL import Image

Array = NDArray[np.float32]
Graph = Callable[[Array], Array]
_OVERLAP: Final = 4  # The share of a tile, one in so many.


def decode_tiled(graph: Graph, latents: Array, *, tile: tuple[int, int], factor: int) -> Array:
    """Pictures `[B, C, H, W]` of latents; `graph` takes `[1, c, *tile]`. Raises NonFiniteError."""
    return _tiled(graph, latents, tile, (tile[0] * factor, tile[1] * factor), "decoder")


def encode_tiled(graph: Graph, pictures: Array, *, tile: tuple[int, int], factor: int) -> tuple[Array, Array]:
    """The mean and the deviation of the latents of pictures. Raises NonFiniteError."""
    moments = _tiled(graph, pictures, (tile[0] * factor, tile[1] * factor), tile, "encoder")
    mean, deviation = np.split(moments, 2, axis=1)
    return mean, deviation


def config_of_squares(network: Mapping[str, Any], *, remedy: str) -> dict[str, Any]:
    """What the configuration of an autoencoder would say of a network that has none. Raises ModelFormatError."""
    channels = network.get("in_channels")
    for halvings in range(4):
        if channels == 3 * 4**halvings:
            return {"block_out_channels": [1] * (halvings + 1), "latent_channels": channels}
    raise ModelFormatError(
        got=f"a network of {channels!r:.80} channels in a pipeline without a vae",
        expected="3, 12, 48 or 192 channels: the RGB pixels of squares of 1, 2, 4 or 8 a side",
        remedy=f"add the vae to the folder and its model_index.json, or {remedy}",
    )


def to_squares(pictures: Array, factor: int) -> Array:
    """`[B, C, H·f, W·f]` as `[B, C·f·f, H, W]`."""
    b, c, height, width = pictures.shape
    pixels = pictures.reshape(b, c, height // factor, factor, width // factor, factor).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(pixels).reshape(b, c * factor**2, height // factor, width // factor)


def from_squares(latents: Array, factor: int) -> Array:
    """The inverse of `to_squares`."""
    b, c, height, width = latents.shape
    pixels = latents.reshape(b, c // factor**2, factor, factor, height, width).transpose(0, 1, 4, 2, 5, 3)
    return np.ascontiguousarray(pixels).reshape(b, c // factor**2, height * factor, width * factor)


def _tiled(graph: Graph, inputs: Array, tile: tuple[int, int], made: tuple[int, int], part: str) -> Array:
    rows, columns = (_starts(size, side) for size, side in zip(inputs.shape[2:], tile, strict=True))
    whole = tuple(size * new // side for size, side, new in zip(inputs.shape[2:], tile, made, strict=True))
    weights = np.outer(*(_ramp(side) for side in made)).astype(np.float32)
    result: list[Array] = []
    for sample in inputs:
        if len(rows) == len(columns) == 1:
            result.append(graph(sample[None])[0])
            continue
        total, weight = None, np.zeros(whole, np.float32)
        for top in rows:
            for left in columns:
                piece = graph(np.ascontiguousarray(sample[None, :, top : top + tile[0], left : left + tile[1]]))[0]
                if total is None:
                    total = np.zeros((len(piece), *whole), np.float32)
                y, x = top * made[0] // tile[0], left * made[1] // tile[1]
                place = slice(y, y + made[0]), slice(x, x + made[1])
                total[:, *place] += piece * weights
                weight[place] += weights
        assert total is not None, "there is at least one tile"
        result.append((total / weight).astype(np.float32))
    stacked = np.stack(result)
    broken = np.flatnonzero(~np.isfinite(stacked.reshape(len(stacked), -1)).all(axis=1))
    if broken.size:
        raise NonFiniteError(
            got=f"NaN or infinity from the autoencoder's {part}, samples {broken[:8].tolist()} of {len(stacked)}",
            expected="finite numbers: it runs in float32, whatever precision the network has",
            remedy="check the weights in the vae folder, and the scaling factor in its config.json",
        )
    return stacked


def _starts(size: int, tile: int) -> list[int]:
    """Where tiles start, so that the last one ends with the picture. Multiples of what divides both."""
    if size <= tile:
        return [0]
    unit = int(np.gcd(size, tile))
    count = -(-(size - tile) // max(unit, tile - tile // _OVERLAP)) + 1
    # A latent pixel is a whole number of pixels: the starts are whole numbers of latent pixels in both.
    return [round(start / unit) * unit for start in np.linspace(0, size - tile, count)]


def _ramp(size: int) -> NDArray[np.float64]:
    places = np.arange(size) + 0.5
    ramp: NDArray[np.float64] = np.minimum(1.0, np.minimum(places, size - places) * _OVERLAP / size)
    return ramp


def fit_preview(graph: Graph, *, channels: int, tile: tuple[int, int], factor: int) -> Array:
    """The linear map `[channels + 1, C]` from a latent pixel, and 1, to the mean colour of its pixels: the nearest to
    what the decoder makes of noise of every coarseness, by least squares. Pictures have details of all sizes."""
    rng = np.random.default_rng(0)
    sides = [1 << power for power in range(max(tile).bit_length())]
    seen: list[Array] = []
    colours: list[Array] = []
    for _ in range(max(1, 1024 // (tile[0] * tile[1]))):
        latents = np.zeros((channels, *tile), np.float32)
        for side in sides:
            coarse = rng.standard_normal((channels, *(-(-whole // side) for whole in tile)), np.float32)
            latents += coarse.repeat(side, axis=1).repeat(side, axis=2)[:, : tile[0], : tile[1]]
        latents /= np.float32(np.sqrt(len(sides)))
        means = graph(latents[None])[0].reshape(-1, tile[0], factor, tile[1], factor).mean(axis=(2, 4))
        seen.append(np.append(latents, np.ones((1, *tile), np.float32), axis=0).reshape(channels + 1, -1).T)
        colours.append(means.reshape(len(means), -1).T)
    return float32(np.linalg.lstsq(np.concatenate(seen), np.concatenate(colours), rcond=None)[0])


def read_pictures(name: str, given: Any, *, channels: int, size: tuple[int, int], low: float = -1.0) -> Array:
    """Float32 `[B, C, H, W]` in [low, 1] from PIL pictures, resized where they are of another size, or from an array.

    Raises InputError.
    """
    pictures = [given] if _is_picture(given) else given
    if isinstance(pictures, Sequence) and pictures and all(map(_is_picture, pictures)):
        arrays = [_pixels(each, "L" if channels == 1 else "RGB", size) for each in pictures]
        return np.stack(arrays) * np.float32(1.0 - low) + np.float32(low)
    return _array(name, given, channels, size, low=low)


def read_masks(given: Any, *, size: tuple[int, int]) -> Array:
    """Float32 `[B, 1, H, W]`: 1 where it is drawn anew, 0 where the picture stays. From PIL pictures, white for 1, or
    an array in [0, 1]."""
    masks = read_pictures("mask", given, channels=1, size=size, low=0.0)
    return (masks >= np.float32(0.5)).astype(np.float32)


def _pixels(picture: Image.Image, mode: str, size: tuple[int, int]) -> Array:
    from PIL.Image import Resampling

    picture = picture.convert(mode)
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Resampling.LANCZOS)
    pixels = np.asarray(picture, np.float32) / np.float32(255.0)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def squares(pictures: Array, side: int) -> Array:
    """Float32 `[B, 3, side, side]` in [0, 1]: the middle of pictures in [-1, 1], as CLIP's processor cuts it out."""
    from PIL.Image import Resampling

    from skipstep.calls.images import to_pil

    made = []
    for picture in to_pil(pictures):
        width, height = (each * side // min(picture.size) for each in picture.size)
        left, top = (width - side) // 2, (height - side) // 2
        scaled = picture.convert("RGB").resize((width, height), Resampling.BICUBIC)
        made.append(_pixels(scaled.crop((left, top, left + side, top + side)), "RGB", (side, side)))
    return np.stack(made)


def _array(name: str, given: Any, channels: int, size: tuple[int, int], *, low: float) -> Array:
    array = float32(host_floats(name, from_dlpack(name, given)))
    shape = (channels, *size)
    if array.shape == shape:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != shape or not len(array):
        raise InputError(
            got=f"{name} of shape {list(array.shape)}",
            expected=f"[B, {', '.join(map(str, shape))}] in [{low:g}, 1], or PIL pictures of any size",
            remedy="resize it, or build the engine with its height= and width=",
        )
    if not ((array >= low) & (array <= 1.0)).all():
        raise InputError(
            got=f"{name} with values outside [{low:g}, 1]",
            expected="pixels in that range",
            remedy="scale them: 2·(pixel/255) - 1 for pictures, pixel/255 for masks",
        )
    return array


def _is_picture(given: object) -> bool:
    return hasattr(given, "convert") and hasattr(given, "resize")

"""A condition of a network: an input beside the state and the timestep, with a row for each sample.

Condition((1280,))                                  SDXL's text_embeds: guidance needs them for both halves
Condition((6,), null="same")                        time_ids, the same in both halves
Condition((1, 768), null=0.0)                       an image's embedding; "none" is zeros
Condition((5, 64, 64), null="same", concat_to_state=True)    mask and masked image of an inpainting network
Condition((256,), from_guidance="embedding")        computed from the guidance scale: no doubled batch
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError, check_flag, check_integer, shown
from skipstep.storage.untrusted import Length, Within

# Bounds of shapes, whether they are passed or read from a bundle. A sample of more elements fits in no memory that a
# batch of it would need.
MAX_SIDE: Final = 1 << 16
MAX_ELEMENTS: Final = 1 << 26
MAX_RANK: Final = 8
Side = Annotated[int, Within(1, MAX_SIDE)]
# The base of the frequencies of a guidance scale's embedding, and what the scale is multiplied by first.
_LONGEST_PERIOD, _EMBEDDED_UNIT = 10000.0, 1000.0

DTYPES: Final = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}
_REMEDY = "pass e.g. Condition((1280,)), Condition((6,), null='same') or Condition((77,), 'bool', null='same')"


@dataclass(frozen=True, slots=True)
class Condition:
    """`shape` is one sample's, () for a number each; `dtype` of its elements.

    `null` stands for "none" in the half of the batch that guidance predicts without conditions: "given", the caller
    passes both; "same", both halves share it; or a number that fills it, which also stands for one that is left out.
    `concat_to_state`: it is appended to the channels of the state before the network reads it.
    `from_guidance`: it is computed from the guidance scale, as its sinusoidal "embedding" or the "scale" itself; the
    caller does not pass it, and the network is evaluated once. Raises InputError where these contradict each other.
    """

    shape: Annotated[tuple[Side, ...], Length(0, MAX_RANK)] = ()
    dtype: Literal["float32", "int64", "bool"] = "float32"
    null: Any = "given"
    concat_to_state: bool = False
    from_guidance: Literal["embedding", "scale"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", check_shape("shape", self.shape, low=0, remedy=_REMEDY))
        if isinstance(self.null, np.generic):
            object.__setattr__(self, "null", self.null.item())
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise InputError(got=f"dtype={shown(self.dtype)}", expected=f"one of {', '.join(DTYPES)}", remedy=_REMEDY)
        check_flag("concat_to_state", self.concat_to_state)
        if not self._null_fits():
            raise InputError(
                got=f"null={shown(self.null)} for {self.dtype}",
                expected="'given', 'same', or a finite number of that type",
                remedy="pass null='same' where guidance does not change it, null=0 where zeros mean none",
            )
        if self.concat_to_state and (not self.shape or self.dtype != "float32"):
            raise InputError(
                got=f"concat_to_state=True for {self.dtype} {self.shape}",
                expected="float32 of the state's shape, but for the channels",
                remedy="pass Condition((channels, height, width), null='same', concat_to_state=True)",
            )
        if self.from_guidance is None:
            return
        known = isinstance(self.from_guidance, str) and self.from_guidance in ("embedding", "scale")
        embedded = len(self.shape) == 1 and self.shape[0] >= 4
        if (
            not known
            or not (embedded if self.from_guidance == "embedding" else self.shape == ())
            or self.dtype != "float32"
            or self.concat_to_state
        ):
            raise InputError(
                got=f"from_guidance={shown(self.from_guidance)} for {self.dtype} {self.shape}",
                expected="'embedding' of float32 (width,), at least 4, or 'scale' of float32 ()",
                remedy="pass Condition((256,), from_guidance='embedding')",
            )

    def _null_fits(self) -> bool:
        if isinstance(self.null, str):
            return self.null in ("given", "same")
        if isinstance(self.null, bool | np.bool_):
            return self.dtype == "bool"
        if not isinstance(self.null, int | float) or not abs(self.null) <= 1 << 31:
            return False
        return self.dtype == "float32" or (self.dtype == "int64" and float(self.null).is_integer())

    @property
    def fills(self) -> bool:
        """Whether `null` is a number."""
        return not isinstance(self.null, str)


def null_row(condition: Condition) -> NDArray[Any]:
    """`[1, *shape]` of what stands for none."""
    return np.full((1, *condition.shape), condition.null, DTYPES[condition.dtype])


def guidance_rows(condition: Condition, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows `[B, *shape]` for guidance scales `[B]`.

    The embedding is that of Kingma et al. (arXiv 2107.00630) as consistency distillation uses it (arXiv 2310.04378):
    sines and cosines of 1000·(scale - 1).
    """
    if condition.from_guidance == "scale":
        return scales
    angles = (scales - np.float32(1.0))[:, None] * embedding_frequencies(condition.shape[0])
    padding = np.zeros((len(scales), condition.shape[0] % 2), np.float32)
    return np.concatenate([np.sin(angles), np.cos(angles), padding], axis=1)


def embedding_frequencies(width: int) -> NDArray[np.float32]:
    """Radians per unit of guidance, `[width // 2]`."""
    exponents = np.arange(width // 2) / (width // 2 - 1)
    return (_EMBEDDED_UNIT * _LONGEST_PERIOD**-exponents).astype(np.float32)


def check_shape(name: str, shape: Any, *, low: int, high: int = MAX_RANK, remedy: str) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list) or not low <= len(shape) <= high:
        count = f"{low}" if low == high else f"{low} to {high}"
        raise InputError(got=f"{name}={shown(shape)}", expected=f"{count} positive integers", remedy=remedy)
    sides = tuple(check_integer(name, n, low=1, high=MAX_SIDE, remedy=remedy) for n in shape)
    if math.prod(sides) > MAX_ELEMENTS:
        raise InputError(got=f"{name}={sides}", expected=f"at most {MAX_ELEMENTS} elements", remedy=remedy)
    return sides

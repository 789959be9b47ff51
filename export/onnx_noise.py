"""The noise of skipstep.calls.noise in ONNX: the same integers, and float32 numbers of the same bits.

Philox runs in uint64, where a 32 by 32 bit product is one multiplication. ONNX reads no bits of a float: the exponent
is found by six comparisons, with multiplications by powers of two, which are exact, and a sign is a factor of ±1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from onnx import TensorProto

from skipstep.calls.noise import MULTIPLIERS, WEYL
from skipstep.export.graph_writer import GraphWriter
from skipstep.kernels.layout import Stream
from skipstep.kernels.normal_constants import (
    COS_COEFFICIENTS,
    LN2_HIGH,
    LN2_LOW,
    LN_COEFFICIENTS,
    PHILOX_ROUNDS,
    RADIANS_PER_UNIT,
    SIN_COEFFICIENTS,
    SQRT_HALF_BITS,
)

_SQRT_HALF = float(np.uint32(SQRT_HALF_BITS).view(np.float32))


def write_normals(
    writer: GraphWriter, seeds: str, stages: str, num_elements: int, stream: Stream, *, to: str | None = None
) -> str:
    """Standard normals float32 `[S, B, num_elements]` of seeds uint64 `[B]` at stages int64 `[S]`."""
    return _Normals(writer).write(seeds, stages, num_elements, stream, to)


class _Normals:
    """Each constant is written once."""

    def __init__(self, writer: GraphWriter) -> None:
        self.add, self.cast = writer.add, writer.cast
        self.word = cache(lambda value: writer.constant(value, np.uint64))
        self.number = cache(lambda value: writer.constant(value, np.float32))
        self.sizes = cache(lambda *values: writer.constant(values))
        self.size = cache(lambda value: writer.constant(value))

    def write(self, seeds: str, stages: str, num_elements: int, stream: Stream, to: str | None) -> str:
        blocks = -(-num_elements // 4)
        key = self.add("Reshape", seeds, self.sizes(1, -1, 1, 1))
        stage = self.add("Reshape", self.cast(stages, TensorProto.UINT64), self.sizes(-1, 1, 1, 1))
        counted = self.cast(self.add("Range", self.size(0), self.size(blocks), self.size(1)), TensorProto.UINT64)
        block = self.add("Reshape", counted, self.sizes(1, 1, -1, 1))
        w0, w1, w2, w3 = self.philox([self.low(block), self.high(block), stage, self.word(int(stream))], key)
        # Both pairs of a block in one: [S, B, blocks, 2].
        radius = self.add("Sqrt", self.add("Mul", self.number(-2.0), self.ln_uniform(self.joined(w0, w2))))
        pair = [
            self.add("Unsqueeze", self.add("Mul", radius, each), self.sizes(4))
            for each in self.cos_sin_turns(self.joined(w1, w3))
        ]
        flat = self.add("Reshape", self.add("Concat", *pair, axis=4), self.sizes(0, 0, 4 * blocks))
        return self.add("Slice", flat, self.sizes(0), self.sizes(num_elements), self.sizes(2), to=to)

    def philox(self, counter: Sequence[str], key: str) -> Sequence[str]:
        """Four words of Philox4x32-10."""
        c0, c1, c2, c3 = counter
        keys = self.low(key), self.high(key)
        for r in range(PHILOX_ROUNDS):
            p0, p1 = (self.add("Mul", c, self.word(m)) for c, m in zip((c0, c2), MULTIPLIERS, strict=True))
            bumped = keys
            if r:
                sums = (self.add("Add", k, self.word(r * step)) for k, step in zip(keys, WEYL, strict=True))
                bumped = self.low(next(sums)), self.low(next(sums))
            high = (self.add("BitwiseXor", self.high(p), c) for p, c in ((p1, c1), (p0, c3)))
            c0, c2 = (self.add("BitwiseXor", h, k) for h, k in zip(high, bumped, strict=True))
            c1, c3 = self.low(p1), self.low(p0)
        return c0, c1, c2, c3

    def low(self, value: str) -> str:
        return self.add("BitwiseAnd", value, self.word(0xFFFFFFFF))

    def high(self, value: str) -> str:
        return self.shifted(value, 32)

    def shifted(self, value: str, bits: int) -> str:
        return self.add("BitShift", value, self.word(bits), direction="RIGHT")

    def joined(self, first: str, second: str) -> str:
        return self.add("Concat", first, second, axis=3)

    def ln_uniform(self, word: str) -> str:
        scaled = self.add("Mul", self.cast(word, TensorProto.FLOAT), self.number(2.0**-32))
        m = self.add("Add", scaled, self.number(2.0**-33))
        e = ""
        # u is at least 2^-33, so fewer than 64 doublings bring it to sqrt(1/2) and above.
        for doublings in (32, 16, 8, 4, 2, 1):
            small = self.add("Less", m, self.number(_SQRT_HALF * 2.0 ** (1 - doublings)))
            m = self.add("Mul", m, self.add("Where", small, self.number(2.0**doublings), self.number(1.0)))
            part = self.add("Where", small, self.number(float(-doublings)), self.number(0.0))
            e = self.add("Add", e, part) if e else part
        f = self.add("Sub", m, self.number(1.0))
        low = self.add("Add", self.add("Mul", f, self.horner(LN_COEFFICIENTS, f)), self.times(e, LN2_LOW))
        return self.add("Add", low, self.times(e, LN2_HIGH))

    def cos_sin_turns(self, word: str) -> tuple[str, str]:
        quarter = self.shifted(self.add("Add", word, self.word(1 << 29)), 30)  # 4 where it is 0 after a whole turn.
        begin = self.cast(self.add("Mul", quarter, self.word(1 << 30)), TensorProto.INT64)
        rest = self.add("Sub", self.cast(word, TensorProto.INT64), begin)
        y = self.times(self.cast(rest, TensorProto.FLOAT), RADIANS_PER_UNIT)
        square = self.add("Mul", y, y)
        sin = self.add("Mul", y, self.horner(SIN_COEFFICIENTS, square))
        cos = self.horner(COS_COEFFICIENTS, square)
        odd = self.cast(self.add("BitwiseAnd", quarter, self.word(1)), TensorProto.BOOL)
        # The sign of the cosine is that of the sine a quarter later.
        later = self.add("Add", quarter, self.word(1))
        return (
            self.add("Mul", self.add("Where", odd, sin, cos), self.sign(later)),
            self.add("Mul", self.add("Where", odd, cos, sin), self.sign(quarter)),
        )

    def sign(self, quarter: str) -> str:
        half = self.cast(self.add("BitwiseAnd", quarter, self.word(2)), TensorProto.FLOAT)
        return self.add("Sub", self.number(1.0), half)

    def times(self, value: str, factor: float) -> str:
        return self.add("Mul", value, self.number(factor))

    def horner(self, coefficients: Sequence[float], x: str) -> str:
        value = self.number(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = self.add("Add", self.add("Mul", value, x), self.number(coefficient))
        return value

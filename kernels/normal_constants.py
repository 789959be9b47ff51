"""From 32-bit integers to normals with the same bits on every device: the constants that all implementations share.

Box-Muller (1958): z0 = r·cos(theta), z1 = r·sin(theta), with r² = -2·ln(u). Library logarithms and cosines differ in
the last bits between a CPU and a GPU, so both are polynomials here, evaluated by Horner's rule in float32 with no
fused multiply-add. Each is the minimax fit (Lawson's iteration in float64, relative error) rounded to float32:

    ln(1+f)/f            f = m - 1, sqrt(1/2) <= m < sqrt(2)         degree 9     error 4e-9 before rounding
    sin(y)/y, in y²      |y| <= pi/4                                 degree 3     error 3e-9
    cos(y), in y²        |y| <= pi/4                                 degree 4     error 3e-8

The constant term comes first.
"""

from __future__ import annotations

from typing import Final

PHILOX_ROUNDS: Final = 10

LN_COEFFICIENTS: Final = (
    1.0,
    -0.49999988079071045,
    0.33333325386047363,
    -0.25001585483551025,
    0.20001967251300812,
    -0.16609011590480804,
    0.14181844890117645,
    -0.13243475556373596,
    0.12904608249664307,
    -0.07621018588542938,
)
SIN_COEFFICIENTS: Final = (1.0, -0.16666650772094727, 0.008332036435604095, -0.00019504022202454507)
COS_COEFFICIENTS: Final = (1.0, -0.5, 0.04166661575436592, -0.0013886619126424193, 2.4379929527640343e-05)

# ln 2 in two parts: the first has nine significant bits, so that its product with an exponent is exact.
LN2_HIGH: Final = 0.693359375
LN2_LOW: Final = -2.12194440e-4

# The bits of sqrt(1/2): subtracting them puts a float's exponent boundary there instead of at 1.
SQRT_HALF_BITS: Final = 0x3F3504F3

# A full turn is 2^32.
RADIANS_PER_UNIT: Final = 1.462918079267160e-09

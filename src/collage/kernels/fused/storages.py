"""The storages, in Triton, transcribed from :mod:`collage.storage` and :mod:`collage.numerics.remainders`.

``parts`` are the components of a role as :func:`collage.kernels.fused.memory.load_parts` makes them: float32 that are
numbers of their formats; before a remainder the pattern of hi, then the remainder, both int32; int32 codes, then the
float32 scales of their rows. In tiles they are three numbers and an exponent, of the quotients.
"""

# Triton's annotations are values, not types.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from collage.kernels.fused.elements import (
    REBIAS8,
    as_bits,
    as_float,
    nearest,
    nearest_number,
    or_nan,
    rounded_number,
)
from collage.kernels.fused.memory import FACTOR, FACTOR8

# Added to a number in [0, 2**23) and taken away again, it leaves it rounded to an integer, ties to even.
WHOLE = tl.constexpr(2.0**23)
# remainders._REBIAS.
REBIAS = tl.constexpr(112 << 23)
# blockwise._INVERSE_255 and _SNAP.
INVERSE_255 = tl.constexpr(0x808081 / 2**31)
SNAP = tl.constexpr(2.0**-20)


# ---- sums of numbers -------------------------------------------------------------------------------------------------


@triton.jit
def residual(x, part):
    """What ``part`` leaves of x; nothing where they are infinite or nan."""
    rest = x - part
    return tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
def low_part(x, draw, FORMAT: tl.constexpr, SECOND: tl.constexpr, STOCHASTIC: tl.constexpr):
    """A residual as a lo in the format, which may be kept scaled."""
    if SECOND == "scaled fp16":
        return rounded_number(x * FACTOR, draw, FORMAT, STOCHASTIC) * (1.0 / FACTOR)
    elif SECOND == "scaled e4m3fn":
        return rounded_number(x * FACTOR8, draw, FORMAT, STOCHASTIC) * (1.0 / FACTOR8)
    elif SECOND == "twice scaled e4m3fn":
        return rounded_number(x * (FACTOR8 * FACTOR8), draw, FORMAT, STOCHASTIC) * (1.0 / (FACTOR8 * FACTOR8))
    else:
        return rounded_number(x, draw, FORMAT, STOCHASTIC)


@triton.jit
def expansion(x, draw, STORED: tl.constexpr):
    """``Expansion.store``: rounds to the grid of lo, then splits. A nan passes through as some number without a lo."""
    FORMAT: tl.constexpr = STORED[1]
    SECOND: tl.constexpr = STORED[2]
    STOCHASTIC: tl.constexpr = STORED[3]
    hi = nearest_number(x, FORMAT)
    total = low_part(residual(x, hi), draw, FORMAT, SECOND, STOCHASTIC) + hi
    hi = nearest_number(total, FORMAT)
    return or_nan(x, hi, FORMAT), low_part(residual(total, hi), draw, FORMAT, SECOND, False)


@triton.jit
def expansion3(x, draw, STORED: tl.constexpr):
    """The same of three numbers."""
    FORMAT: tl.constexpr = STORED[1]
    SECOND: tl.constexpr = STORED[2]
    STOCHASTIC: tl.constexpr = STORED[3]
    THIRD: tl.constexpr = STORED[5]
    hi = nearest_number(x, FORMAT)
    rest = residual(x, hi)
    lo = low_part(rest, draw, FORMAT, SECOND, False)
    total = (low_part(residual(rest, lo), draw, FORMAT, THIRD, STOCHASTIC) + lo) + hi
    hi = nearest_number(total, FORMAT)
    rest = residual(total, hi)
    lo = low_part(rest, draw, FORMAT, SECOND, False)
    return or_nan(x, hi, FORMAT), lo, low_part(residual(rest, lo), draw, FORMAT, THIRD, False)


@triton.jit
def kahan(update, hi, lo, FORMAT: tl.constexpr):
    """``Kahan.add``."""
    grown = nearest(update + lo, FORMAT)
    new = nearest(grown + hi, FORMAT)
    return new, nearest(grown - nearest(new - hi, FORMAT), FORMAT)


# ---- remainders ------------------------------------------------------------------------------------------------------


@triton.jit
def drop(pattern, draw, COUNT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``remainders._drop``."""
    if COUNT == 0:
        return pattern
    elif STOCHASTIC:
        return (pattern + (draw >> (16 - COUNT))) >> COUNT
    else:
        return (pattern + ((pattern >> COUNT) & 1) + ((1 << (COUNT - 1)) - 1)) >> COUNT


@triton.jit
def split_remainder(x, draw, FORMAT: tl.constexpr, EXTRA: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``split_remainder``: the pattern of hi, and lo."""
    pattern = as_bits(x)
    size = pattern & 0x7FFFFFFF
    if FORMAT == "bf16":
        magnitude = drop(tl.where(size > 0x7F800000, 0x7FC00000, size), draw, 16 - EXTRA, STOCHASTIC)
    else:
        # Of the format: bits that float32 has more; its overflow and its nan; the smallest normal number; log2 of the
        # units in 1 of the smallest step.
        MORE: tl.constexpr = 13 if FORMAT == "fp16" else 20
        MOST: tl.constexpr = 0x7C00 if FORMAT == "fp16" else 0x7E
        NAN: tl.constexpr = 0x7E00 if FORMAT == "fp16" else 0x7F
        NORMAL: tl.constexpr = 0x38800000 if FORMAT == "fp16" else 0x3C800000
        UNITS: tl.constexpr = 24 if FORMAT == "fp16" else 9
        BIAS: tl.constexpr = REBIAS if FORMAT == "fp16" else REBIAS8
        normal = tl.minimum(drop(size - BIAS, draw, MORE - EXTRA, STOCHASTIC), MOST << EXTRA)
        large = tl.where(size > 0x7F800000, NAN << EXTRA, normal)
        small = size < NORMAL
        steps = as_float(tl.where(small, size, 0)) * 2.0 ** (UNITS + EXTRA)
        if STOCHASTIC:
            whole = steps.to(tl.int32)
            fraction = ((steps - whole.to(tl.float32)) * 65536.0).to(tl.int32)
            subnormal = whole + ((fraction + draw) >> 16)
        else:
            subnormal = ((steps + WHOLE) - WHOLE).to(tl.int32)
        magnitude = tl.where(small, subnormal, large)
    hi = (magnitude + (1 << (EXTRA - 1))) >> EXTRA
    # Shifted down to the pattern of hi, whose own first bit it is.
    SHIFT: tl.constexpr = 24 if FORMAT == "e4m3fn" else 16
    sign = (pattern >> SHIFT) & (-0x80000000 >> SHIFT)
    return hi | sign, magnitude - (hi << EXTRA)


@triton.jit
def join_remainder(pattern, lo, FORMAT: tl.constexpr, EXTRA: tl.constexpr):
    """``join_remainder`` of the pattern of hi, its sign extended."""
    MASK: tl.constexpr = 0x7F if FORMAT == "e4m3fn" else 0x7FFF
    size = (pattern & MASK) << EXTRA
    magnitude = size + lo
    # Below zero the sign bit of the sum turns that of hi round.
    sign = (pattern ^ magnitude) & -0x80000000
    magnitude = tl.abs(magnitude)
    if FORMAT == "bf16":
        return as_float((magnitude << (16 - EXTRA)) | sign)
    elif FORMAT == "fp16":
        subnormal = as_bits(magnitude.to(tl.float32) * 2.0 ** -(24 + EXTRA))
        large = (magnitude << (13 - EXTRA)) + tl.where(magnitude >= (0x7C00 << EXTRA), 2 * REBIAS, REBIAS)
        return as_float(tl.where(magnitude >= (1 << (10 + EXTRA)), large, subnormal) | sign)
    else:
        subnormal = as_bits(magnitude.to(tl.float32) * 2.0 ** -(9 + EXTRA))
        large = (magnitude << (20 - EXTRA)) + REBIAS8
        found = tl.where(magnitude >= (0x08 << EXTRA), large, subnormal) | sign
        return as_float(tl.where(size == (MASK << EXTRA), 0x7FC00000, found))


# ---- blocks of codes -------------------------------------------------------------------------------------------------


@triton.jit
def scale_of(x, STORED: tl.constexpr):
    """The scales of a tile's rows, nan where a row has a number that is not finite, and where they are numbers.

    The largest magnitude is found among patterns, which grow with it, and a nan's is above all others. Behind a
    row's end codes and gradient are 0: x is too, or nan where the old scale or the loss scale makes the row so anyhow.
    """
    SOFTSIGN: tl.constexpr = STORED[0] == "softsign"
    size = as_bits(x) & 0x7FFFFFFF
    # Blockwise.smallest_scale: 2**-118 and 2**-94.
    largest = tl.maximum(tl.max(size, 1, keep_dims=True), (9 if SOFTSIGN else 33) << 23)
    finite = largest < (0x7F000000 if SOFTSIGN else 0x7F800000)
    return as_float(tl.where(finite, largest, 0x7FC00000)), finite


@triton.jit
def codes_of(x, scale, finite, draw, STORED: tl.constexpr):
    """``Blockwise.store`` beside the scales: int32."""
    size = tl.abs(x)
    if STORED[0] == "softsign":
        exact_code = tl.minimum(tl.div_rn(size, size + scale) * 254.0, 127.0)
    else:
        factor = tl.div_rn(tl.full(scale.shape, 255.0, tl.float32), tl.sqrt_rn(tl.sqrt_rn(scale)))
        exact_code = tl.minimum(tl.sqrt_rn(tl.sqrt_rn(size)) * factor, 255.0)
    code = (exact_code + WHOLE) - WHOLE
    if STORED[3]:
        drawn = draw.to(tl.float32) * 2.0**-16 + exact_code
        # Either way the conversion below is exact or rounds down.
        code = tl.where(tl.abs(exact_code - code) <= code * SNAP, code, drawn)
    if STORED[0] == "softsign":
        code = tl.where(as_bits(x) < 0, -code, code)
    else:
        code = tl.maximum(code, (x > 0).to(tl.float32))
    return tl.where(finite, code, 0.0).to(tl.int32)


@triton.jit
def decoded(code, scale, STORED: tl.constexpr):
    """``Blockwise.load``."""
    code = code.to(tl.float32)
    if STORED[0] == "softsign":
        return tl.div_rn(code, 254.0 - tl.abs(code)) * scale
    else:
        root = code * INVERSE_255
        square = root * root
        return (square * square) * scale


@triton.jit
def square_root(x, STORED: tl.constexpr):
    """Correctly rounded, and of a magnitude where :func:`codes_of` needs that root too: it is computed once."""
    if STORED[0] == "root4":
        return tl.where(x < 0, float("nan"), tl.sqrt_rn(tl.abs(x)))
    else:
        return tl.sqrt_rn(x)


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def power(exponent):
    """``tiled._power``."""
    return as_float(exponent << 23)


@triton.jit
def finite_size(x):
    """The pattern of a magnitude, which grows with it; 0 where it is not finite."""
    size = as_bits(x) & 0x7FFFFFFF
    return tl.where(size < 0x7F800000, size, 0)


@triton.jit
def exponent_of(largest):
    """``Tiled._exponent`` of a magnitude's pattern."""
    # 2**23 - 1 less the significand of 448; its exponent, 8; and the least exponent, 1.
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    return tl.where(largest == 0, 127, exponent)


@triton.jit
def quotients(x, exponent, STORED: tl.constexpr):
    """The part of ``Tiled.store`` before the storage of the quotients."""
    quotient = x * power(254 - exponent)
    # inf - inf is nan.
    quotient = tl.where(tl.abs(quotient) < float("inf"), quotient, quotient - quotient)
    if STORED[7]:
        LEAST: tl.constexpr = 2.0**-17 if STORED[5] != "" else (2.0**-13 if STORED[2] != "" else 2.0**-9)
        quotient = tl.where((x > 0) & (quotient < LEAST), LEAST, quotient)
    return quotient


# ---- by kind ---------------------------------------------------------------------------------------------------------


@triton.jit
def value_of(parts, STORED: tl.constexpr):
    """``Storage.load``."""
    value = number_of(parts, STORED)
    if STORED[6] > 0:
        value = value * power(parts[3])
    if STORED[7]:
        value = value * value
    return value


@triton.jit
def number_of(parts, STORED: tl.constexpr):
    """``Storage.load``; in tiles the quotient."""
    FORMAT: tl.constexpr = STORED[1]
    WIDTH: tl.constexpr = STORED[4]
    if STORED[0] == "rounded":
        return parts[0]
    elif STORED[0] == "master":
        return parts[1]
    elif STORED[0] == "remainder":
        return join_remainder(parts[0], parts[1], FORMAT, WIDTH)
    elif STORED[2] == "scale":
        return decoded(parts[0], parts[1], STORED)
    elif STORED[5] != "":
        return (parts[2] + parts[1]) + parts[0]
    else:
        return parts[1] + parts[0]


@triton.jit
def parts_of(total, update, parts, exponent, draw, STORED: tl.constexpr):
    """The new components: ``Storage.add`` and, of a kind that does not look at the update, ``Storage.store``.

    ``total`` is the value to be stored, the update included; ``parts`` are the old components; ``exponent`` is that of
    the role's tile, where tiles are higher than a row.
    """
    if STORED[6] == 0:
        return numbers_of(total, update, parts, draw, STORED)
    else:
        value = tl.sqrt_rn(total) if STORED[7] else total
        if STORED[6] == 1:
            exponent = exponent_of(tl.max(finite_size(value), 1, keep_dims=True))
        new = numbers_of(quotients(value, exponent, STORED), update, parts, draw, STORED)
        if STORED[5] != "":
            return new[0], new[1], new[2], exponent
        else:
            return new[0], new[1], new[0], exponent


@triton.jit
def numbers_of(total, update, parts, draw, STORED: tl.constexpr):
    """The new components; in tiles of the quotient ``total``, without the exponent."""
    FORMAT: tl.constexpr = STORED[1]
    STOCHASTIC: tl.constexpr = STORED[3]
    WIDTH: tl.constexpr = STORED[4]
    if STORED[0] == "rounded":
        new = or_nan(total, rounded_number(total, draw, FORMAT, STOCHASTIC), FORMAT)
        return new, new
    elif STORED[0] == "master":
        return nearest(total, FORMAT), total
    elif STORED[0] == "kahan":
        return kahan(update, parts[0], parts[1], FORMAT)
    elif STORED[0] == "remainder":
        return split_remainder(total, draw, FORMAT, WIDTH, STOCHASTIC)
    elif STORED[2] == "scale":
        scale, finite = scale_of(total, STORED)
        return codes_of(total, scale, finite, draw, STORED), scale
    elif STORED[5] != "":
        return expansion3(total, draw, STORED)
    else:
        return expansion(total, draw, STORED)


@triton.jit
def seen(parts, STORED: tl.constexpr):
    """``Storage.seen`` of a parameter, in float64."""
    if STORED[6] > 0:
        return nearest(value_of(parts, STORED), "bf16").to(tl.float64)
    elif STORED[0] != "remainder":
        return parts[0].to(tl.float64)
    elif STORED[1] == "bf16":
        return as_float(parts[0] << 16).to(tl.float64)
    else:
        return parts[0].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.float64)


@triton.jit
def exact(parts, STORED: tl.constexpr):
    """``Storage.exact``, in float64."""
    if STORED[6] > 0:
        value = exact_number(parts, STORED) * power(parts[3]).to(tl.float64)
        if STORED[7]:
            value = value * value
        return value
    else:
        return exact_number(parts, STORED)


@triton.jit
def exact_number(parts, STORED: tl.constexpr):
    """``Storage.exact``; in tiles of the quotient."""
    if STORED[0] == "rounded":
        return parts[0].to(tl.float64)
    elif STORED[0] == "master":
        return parts[1].to(tl.float64)
    elif STORED[0] == "remainder" or STORED[2] == "scale":
        return number_of(parts, STORED).to(tl.float64)
    elif STORED[5] != "":
        return (parts[2].to(tl.float64) + parts[1].to(tl.float64)) + parts[0].to(tl.float64)
    else:
        return parts[1].to(tl.float64) + parts[0].to(tl.float64)


@triton.jit
def moved(new, old, STORED: tl.constexpr):
    """``Storage.moved``, in float64, between two sets of components."""
    if STORED[0] == "remainder" or STORED[2] == "scale" or STORED[6] > 0:
        return exact(new, STORED) - exact(old, STORED)
    else:
        by_first = new[0].to(tl.float64) - old[0].to(tl.float64)
        by_second = new[1].to(tl.float64) - old[1].to(tl.float64)
        if STORED[0] == "rounded":
            return by_first
        elif STORED[0] == "master":
            return by_second
        else:
            return by_second + by_first

"""The storages, in Triton, transcribed from :mod:`collage.storage` and :mod:`collage.numerics.remainders`.

Of a role, ``first`` and ``second`` are the two components as :mod:`collage.kernels.fused.memory` loads them: float32
that are numbers of their formats; before a remainder the pattern of hi, then the remainder, both int32; int32 codes,
then the float32 scales of their rows.
"""

# Triton's annotations are values, not types.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from collage.kernels.fused.elements import as_bits, as_float, nearest, nearest_number, or_nan, rounded_number
from collage.kernels.fused.memory import FACTOR

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
        normal = tl.minimum(drop(size - REBIAS, draw, 13 - EXTRA, STOCHASTIC), 0x7C00 << EXTRA)
        large = tl.where(size > 0x7F800000, 0x7E00 << EXTRA, normal)
        small = size < 0x38800000
        steps = as_float(tl.where(small, size, 0)) * 2.0 ** (24 + EXTRA)
        if STOCHASTIC:
            whole = steps.to(tl.int32)
            fraction = ((steps - whole.to(tl.float32)) * 65536.0).to(tl.int32)
            subnormal = whole + ((fraction + draw) >> 16)
        else:
            subnormal = ((steps + WHOLE) - WHOLE).to(tl.int32)
        magnitude = tl.where(small, subnormal, large)
    hi = (magnitude + (1 << (EXTRA - 1))) >> EXTRA
    return hi | ((pattern >> 16) & -0x8000), magnitude - (hi << EXTRA)


@triton.jit
def join_remainder(pattern, lo, FORMAT: tl.constexpr, EXTRA: tl.constexpr):
    """``join_remainder`` of the pattern of hi, its sign extended."""
    magnitude = ((pattern & 0x7FFF) << EXTRA) + lo
    # Below zero the sign bit of the sum turns that of hi round.
    sign = (pattern ^ magnitude) & -0x80000000
    magnitude = tl.abs(magnitude)
    if FORMAT == "bf16":
        return as_float((magnitude << (16 - EXTRA)) | sign)
    else:
        subnormal = as_bits(magnitude.to(tl.float32) * 2.0 ** -(24 + EXTRA))
        large = (magnitude << (13 - EXTRA)) + tl.where(magnitude >= (0x7C00 << EXTRA), 2 * REBIAS, REBIAS)
        return as_float(tl.where(magnitude >= (1 << (10 + EXTRA)), large, subnormal) | sign)


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


# ---- by kind ---------------------------------------------------------------------------------------------------------


@triton.jit
def value_of(first, second, STORED: tl.constexpr):
    """``Storage.load``."""
    FORMAT: tl.constexpr = STORED[1]
    WIDTH: tl.constexpr = STORED[4]
    if STORED[0] == "rounded":
        return first
    elif STORED[0] == "master":
        return second
    elif STORED[0] == "remainder":
        return join_remainder(first, second, FORMAT, WIDTH)
    elif STORED[2] == "scale":
        return decoded(first, second, STORED)
    else:
        return second + first


@triton.jit
def parts_of(total, update, first, second, draw, STORED: tl.constexpr):
    """The new components: ``Storage.add`` and, of a kind that does not look at the update, ``Storage.store``.

    ``total`` is the value to be stored, the update included; ``first`` and ``second`` are the old components.
    """
    FORMAT: tl.constexpr = STORED[1]
    STOCHASTIC: tl.constexpr = STORED[3]
    WIDTH: tl.constexpr = STORED[4]
    if STORED[0] == "rounded":
        new = or_nan(total, rounded_number(total, draw, FORMAT, STOCHASTIC), FORMAT)
        return new, new
    elif STORED[0] == "master":
        return nearest(total, FORMAT), total
    elif STORED[0] == "kahan":
        return kahan(update, first, second, FORMAT)
    elif STORED[0] == "remainder":
        return split_remainder(total, draw, FORMAT, WIDTH, STOCHASTIC)
    elif STORED[2] == "scale":
        scale, finite = scale_of(total, STORED)
        return codes_of(total, scale, finite, draw, STORED), scale
    else:
        return expansion(total, draw, STORED)


@triton.jit
def leading(first, STORED: tl.constexpr):
    """The leading component as a number, in float64."""
    if STORED[0] != "remainder":
        return first.to(tl.float64)
    elif STORED[1] == "bf16":
        return as_float(first << 16).to(tl.float64)
    else:
        return first.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.float64)


@triton.jit
def exact(first, second, STORED: tl.constexpr):
    """``Storage.exact``, in float64."""
    if STORED[0] == "rounded":
        return first.to(tl.float64)
    elif STORED[0] == "master":
        return second.to(tl.float64)
    elif STORED[0] == "remainder" or STORED[2] == "scale":
        return value_of(first, second, STORED).to(tl.float64)
    else:
        return second.to(tl.float64) + first.to(tl.float64)


@triton.jit
def moved(first, second, old_first, old_second, STORED: tl.constexpr):
    """``Storage.moved``, in float64; the arguments are new and old components."""
    if STORED[0] == "remainder" or STORED[2] == "scale":
        return exact(first, second, STORED) - exact(old_first, old_second, STORED)
    else:
        by_first = first.to(tl.float64) - old_first.to(tl.float64)
        by_second = second.to(tl.float64) - old_second.to(tl.float64)
        if STORED[0] == "rounded":
            return by_first
        elif STORED[0] == "master":
            return by_second
        else:
            return by_second + by_first

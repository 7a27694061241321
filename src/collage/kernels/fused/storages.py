"""The storages, in Triton, transcribed from :mod:`collage.storage`.

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
    PTX,
    as_bits,
    as_float,
    nearest,
    nearest_number,
    nearest_or_nan,
    or_nan,
    rounded_number,
    stochastic_number,
)
from collage.kernels.fused.integers import codes_of, decoded, join_remainder, scale_of, split_remainder
from collage.kernels.fused.memory import FACTOR, FACTOR8

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
def on_the_grid(x, draw, STORED: tl.constexpr):
    """x rounded to the grid of lo: a number that hi and lo are the parts of."""
    FORMAT: tl.constexpr = STORED[1]
    SECOND: tl.constexpr = STORED[2]
    STOCHASTIC: tl.constexpr = STORED[3]
    hi = nearest_number(x, FORMAT)
    return low_part(residual(x, hi), draw, FORMAT, SECOND, STOCHASTIC) + hi


@triton.jit
def expansion(x, draw, STORED: tl.constexpr):
    """``Expansion.store``: rounds to the grid of lo, then splits. A nan passes through as some number without a lo."""
    FORMAT: tl.constexpr = STORED[1]
    SECOND: tl.constexpr = STORED[2]
    total = on_the_grid(x, draw, STORED)
    hi = nearest_number(total, FORMAT)
    return nearest_or_nan(x, hi, FORMAT), low_part(residual(total, hi), draw, FORMAT, SECOND, False)


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
    return nearest_or_nan(x, hi, FORMAT), lo, low_part(residual(rest, lo), draw, FORMAT, THIRD, False)


@triton.jit
def kahan(update, hi, lo, FORMAT: tl.constexpr):
    """``Kahan.add``."""
    grown = nearest(update + lo, FORMAT)
    new = nearest(grown + hi, FORMAT)
    return new, nearest(grown - nearest(new - hi, FORMAT), FORMAT)


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
        new = or_nan(total, stochastic_number(total, draw, FORMAT), FORMAT) if STOCHASTIC else nearest(total, FORMAT)
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
def to_be_stored(total, parts, draw, STORED: tl.constexpr):
    """What ``memory.store_parts`` is given for the new components ``parts`` of the value ``total``: numbers not rounded
    yet where the store rounds as the storage does, so that nothing is rounded, unpacked and packed again."""
    if PTX and STORED[1] == "bf16" and STORED[6] == 0:
        if STORED[0] == "expansion":
            # The compiler finds that it has computed this already.
            whole = on_the_grid(total, draw, STORED)
            return whole, residual(whole, nearest_number(whole, "bf16"))
        elif STORED[0] == "master" or (STORED[0] == "rounded" and not STORED[3]):
            return total, total
        else:
            return parts
    else:
        return parts


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

"""What one thread does, in Triton: formats, rounding, random bits and storages, transcribed from their definitions in
:mod:`collage.numerics` and :mod:`collage.storage`.

A component's values live as float32 that are numbers of its format. bfloat16 is loaded, rounded and stored as integers:
the interpreter's own conversions truncate, and integer operations are the same everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_bits(x):
    """The pattern of float32 numbers as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(x):
    """The float32 number that has these 32 bits."""
    return x.to(tl.float32, bitcast=True)


# ---- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def pointers(address, start, BLOCK: tl.constexpr, FORMAT: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to the elements of a block. WHOLE promises 16-byte alignment, without which no access is a wide one."""
    if FORMAT == "fp32":
        base = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == "fp16":
        base = address.to(tl.pointer_type(tl.float16))
    else:
        base = address.to(tl.pointer_type(tl.int16))
    if WHOLE:
        base = tl.multiple_of(base, 16)
        start = tl.multiple_of(start, 16)
    return base + start + tl.arange(0, BLOCK)


@triton.jit
def load(address, start, mask, BLOCK: tl.constexpr, FORMAT: tl.constexpr, WHOLE: tl.constexpr):
    """A block of a component as float32; 0 where the mask is not set."""
    where = pointers(address, start, BLOCK, FORMAT, WHOLE)
    x = tl.load(where) if WHOLE else tl.load(where, mask=mask, other=0)
    if FORMAT == "bf16":
        return as_float(x.to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def store(address, start, mask, x, BLOCK: tl.constexpr, FORMAT: tl.constexpr, WHOLE: tl.constexpr):
    """Stores float32 numbers that are numbers of the format."""
    where = pointers(address, start, BLOCK, FORMAT, WHOLE)
    if FORMAT == "bf16":
        x = (as_bits(x) >> 16).to(tl.int16)
    elif FORMAT == "fp16":
        x = x.to(tl.float16)
    if WHOLE:
        tl.store(where, x)
    else:
        tl.store(where, x, mask=mask)


# ---- rounding --------------------------------------------------------------------------------------------------------


@triton.jit
def nearest_number(x, FORMAT: tl.constexpr):
    """``round_nearest`` of what is not nan."""
    if FORMAT == "bf16":
        bits = as_bits(x)
        return as_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000)
    elif FORMAT == "fp16":
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def stochastic_number(x, draw, FORMAT: tl.constexpr):
    """``round_stochastic`` of what is not nan, with ``draw`` in [0, 2**16)."""
    bits = as_bits(x)
    if FORMAT == "bf16":
        return as_float((bits + draw) & -0x10000)
    else:
        # 13 bits are discarded where the result is normal: of the draw only its first 13 can decide the carry.
        normal = as_float((bits + (draw >> 3)) & -0x2000)
        # Below 2**-14 in units of 2**-24, with 16 fractional bits: exact, and less than 2**26.
        small = tl.abs(x) < 2.0**-14
        units = (tl.where(small, tl.abs(x), 0.0) * 2.0**40).to(tl.int32) + draw
        subnormal = as_float(as_bits((units >> 16).to(tl.float32) * 2.0**-24) | (bits & -0x80000000))
        # What overflows becomes infinite; all else is a number of the format by now.
        return nearest_number(tl.where(small, subnormal, normal), FORMAT)


@triton.jit
def rounded_number(x, draw, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """What is not nan, rounded to nearest or by the draw."""
    if STOCHASTIC:
        return stochastic_number(x, draw, FORMAT)
    else:
        return nearest_number(x, FORMAT)


@triton.jit
def or_nan(x, result, FORMAT: tl.constexpr):
    """``result``, or nan where x is nan: as an integer, a nan may round to anything."""
    if FORMAT == "bf16":
        return as_float(tl.where(x == x, as_bits(result), 0x7FC00000))
    else:
        return tl.where(x == x, result, x)


@triton.jit
def nearest(x, FORMAT: tl.constexpr):
    """``round_nearest``."""
    return or_nan(x, nearest_number(x, FORMAT), FORMAT)


# ---- random bits: collage.numerics.counter ---------------------------------------------------------------------------


@triton.jit
def mix64(z):
    """The finaliser of splitmix64, on uint64."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_word(index, first_key, second_key):
    """One 32-bit word per element, all uint32."""
    x = index ^ first_key
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) + second_key
    x = x * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


# ---- storages --------------------------------------------------------------------------------------------------------


@triton.jit
def residual(x, part):
    """What ``part`` leaves of x; nothing where they are infinite or nan."""
    rest = x - part
    return tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
def expansion(x, draw, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``Expansion.store``: rounds to the grid of lo, then splits. A nan passes through as some number without a lo."""
    hi = nearest_number(x, FORMAT)
    total = rounded_number(residual(x, hi), draw, FORMAT, STOCHASTIC) + hi
    hi = nearest_number(total, FORMAT)
    return or_nan(x, hi, FORMAT), nearest_number(residual(total, hi), FORMAT)


@triton.jit
def kahan(update, hi, lo, FORMAT: tl.constexpr):
    """``Kahan.add``."""
    grown = nearest(update + lo, FORMAT)
    new = nearest(grown + hi, FORMAT)
    return new, nearest(grown - nearest(new - hi, FORMAT), FORMAT)


@triton.jit
def value_of(first, second, STORED: tl.constexpr):
    """``Storage.load``."""
    if STORED[0] == "rounded":
        return first
    elif STORED[0] == "master":
        return second
    else:
        return second + first


@triton.jit
def parts_of(total, update, first, second, draw, STORED: tl.constexpr):
    """The new components: ``Storage.add`` and, of a kind that does not look at the update, ``Storage.store``.

    ``total`` is the value to be stored, the update included; ``first`` and ``second`` are the old components.
    """
    FORMAT: tl.constexpr = STORED[1]
    STOCHASTIC: tl.constexpr = STORED[3]
    if STORED[0] == "rounded":
        new = or_nan(total, rounded_number(total, draw, FORMAT, STOCHASTIC), FORMAT)
        return new, new
    elif STORED[0] == "master":
        return nearest(total, FORMAT), total
    elif STORED[0] == "kahan":
        return kahan(update, first, second, FORMAT)
    else:
        return expansion(total, draw, FORMAT, STOCHASTIC)


@triton.jit
def exact(first, second, STORED: tl.constexpr):
    """``Storage.exact``, in float64."""
    if STORED[0] == "rounded":
        return first.to(tl.float64)
    elif STORED[0] == "master":
        return second.to(tl.float64)
    else:
        return second.to(tl.float64) + first.to(tl.float64)


@triton.jit
def moved(first, second, old_first, old_second, STORED: tl.constexpr):
    """``Storage.moved``, in float64; the arguments are new and old components."""
    by_first = first.to(tl.float64) - old_first.to(tl.float64)
    by_second = second.to(tl.float64) - old_second.to(tl.float64)
    if STORED[0] == "rounded":
        return by_first
    elif STORED[0] == "master":
        return by_second
    else:
        return by_second + by_first

"""What one thread does, in Triton: rounding and random bits, transcribed from their definitions in
:mod:`collage.numerics`.

bfloat16 is loaded, rounded and stored as integers: the interpreter's own conversions truncate, and integer operations
are the same everywhere.
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

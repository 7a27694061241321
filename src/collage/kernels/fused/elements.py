"""What one thread does, in Triton: rounding and random bits, transcribed from their definitions in
:mod:`collage.numerics`.

bfloat16 and float8 are loaded, rounded and stored as integers: the interpreter's own conversions are wrong, few GPUs
have those of float8, and integer operations are the same everywhere. For bfloat16 NVIDIA's GPUs have instructions that
take two numbers at once; they are written as PTX, since what Triton makes of a conversion takes one, at a quarter of
the speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from collage.kernels.fused import interpreted

# Whether the kernels are compiled to PTX.
PTX = tl.constexpr(torch.version.hip is None and not interpreted())
# Of e4m3: its largest number and the smallest normal one; the exponent of float32 less its own, in a float32 pattern.
MAX8 = tl.constexpr(448.0)
NORMAL8 = tl.constexpr(2.0**-6)
REBIAS8 = tl.constexpr(120 << 23)


@triton.jit
def as_bits(x):
    """The pattern of float32 numbers as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(x):
    """The float32 number that has these 32 bits."""
    return x.to(tl.float32, bitcast=True)


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


@triton.jit
def bf16_number(pattern):
    """The number that has these 16 bits, an int16, as float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [pattern], tl.float32, True, 2
        )
    else:
        return as_float(pattern.to(tl.int32) << 16)


@triton.jit
def bf16_pattern(x):
    """The opposite of :func:`bf16_number`. As PTX it rounds to nearest what is no number of the format."""
    if PTX:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.int16, True, 2)
    else:
        return (as_bits(x) >> 16).to(tl.int16)


@triton.jit
def nearest_bf16(x):
    """``round_nearest`` to bfloat16 of what is not nan. As PTX it makes nan of nan."""
    if PTX:
        return bf16_number(bf16_pattern(x))
    else:
        bits = as_bits(x)
        return as_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000)


# ---- rounding --------------------------------------------------------------------------------------------------------


@triton.jit
def nearest_number(x, FORMAT: tl.constexpr):
    """``round_nearest`` of what is not nan."""
    if FORMAT == "bf16":
        return nearest_bf16(x)
    elif FORMAT == "fp16":
        return x.to(tl.float16).to(tl.float32)
    elif FORMAT == "e4m3fn":
        size = tl.minimum(tl.abs(x), MAX8)
        # A power of two whose last bit is the spacing of the format's numbers at x; the sum with it rounds to that.
        coarse = as_float(tl.maximum(as_bits(size) & 0x7F800000, 121 << 23) + (20 << 23))
        return as_float(as_bits((size + coarse) - coarse) | (as_bits(x) & -0x80000000))
    else:
        return x


@triton.jit
def stochastic_number(x, draw, FORMAT: tl.constexpr):
    """``round_stochastic`` of what is not nan, with ``draw`` in [0, 2**16)."""
    bits = as_bits(x)
    if FORMAT == "bf16":
        return as_float((bits + draw) & -0x10000)
    elif FORMAT == "e4m3fn":
        # 20 bits are discarded where the result is normal; the first 16 of them decide the carry.
        normal = as_float((bits + (draw << 4)) & -0x100000)
        # Below 2**-6 in units of 2**-9, with 16 fractional bits: exact, and less than 2**19.
        small = tl.abs(x) < NORMAL8
        units = (tl.where(small, tl.abs(x), 0.0) * 2.0**25).to(tl.int32) + draw
        subnormal = as_float(as_bits((units >> 16).to(tl.float32) * 2.0**-9) | (bits & -0x80000000))
        # What overflows becomes the largest number; all else is a number of the format by now.
        return nearest_number(tl.where(small, subnormal, normal), FORMAT)
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
    """``result``, or nan where x is nan, of which integer operations may make anything."""
    if FORMAT == "bf16":
        return as_float(tl.where(x == x, as_bits(result), 0x7FC00000))
    else:
        return tl.where(x == x, result, x)


@triton.jit
def nearest_or_nan(x, result, FORMAT: tl.constexpr):
    """The same of a ``result`` that :func:`nearest_number` has made of x, or of a sum to which x has passed its nan."""
    if FORMAT == "e4m3fn" or (FORMAT == "bf16" and not PTX):
        return or_nan(x, result, FORMAT)
    else:
        return result


@triton.jit
def nearest(x, FORMAT: tl.constexpr):
    """``round_nearest``."""
    return nearest_or_nan(x, nearest_number(x, FORMAT), FORMAT)


# ---- e4m3 ------------------------------------------------------------------------------------------------------------


@triton.jit
def e4m3_number(pattern):
    """The number that has these 8 bits, an int32, as float32."""
    size = pattern & 0x7F
    large = (size << 20) + REBIAS8
    found = tl.where(size < 0x08, as_bits(size.to(tl.float32) * 2.0**-9), large)
    found = tl.where(size == 0x7F, 0x7FC00000, found)
    return as_float(found | ((pattern & 0x80) << 24))


@triton.jit
def e4m3_pattern(x):
    """The opposite of :func:`e4m3_number`; nan has the pattern of one."""
    size = as_bits(x) & 0x7FFFFFFF
    small = size < 0x3C800000
    subnormal = (as_float(tl.where(small, size, 0)) * 512.0).to(tl.int32)
    found = tl.where(small, subnormal, tl.minimum((size - REBIAS8) >> 20, 0x7F))
    return found | ((as_bits(x) >> 24) & 0x80)


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

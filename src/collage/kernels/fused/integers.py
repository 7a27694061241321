"""Storages of integers, in Triton: remainders, transcribed from :mod:`collage.numerics.remainders`, and codes in
blocks, from :mod:`collage.storage.blockwise`."""

# Triton's annotations are values, not types.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from collage.kernels.fused.elements import REBIAS8, as_bits, as_float

# Added to a number in [0, 2**23) and taken away again, it leaves it rounded to an integer, ties to even.
WHOLE = tl.constexpr(2.0**23)
# remainders._REBIAS.
REBIAS = tl.constexpr(112 << 23)
# blockwise._INVERSE_255 and _SNAP.
INVERSE_255 = tl.constexpr(0x808081 / 2**31)
SNAP = tl.constexpr(2.0**-20)


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

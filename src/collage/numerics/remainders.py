"""A number of a 16- or 8-bit format and, as an integer, the bits that follow it.

Read as an integer, the pattern of a positive float grows with its value and its step is the spacing of the numbers
there. With ``extra`` more bits of significand behind those of the format, the pattern of a value is

    magnitude = hi * 2**extra + lo,    -2**(extra - 1) <= lo < 2**(extra - 1),

with hi the magnitude's pattern in the format. So a unit of lo is 2**-extra of the spacing of the format's numbers on
the value's side of hi, in every binade and among the subnormals alike; rounding, carries into hi and the split are
integer operations; and hi is the value rounded to nearest, ties away from zero (ties to even would give an even hi
2**extra + 1 values of lo). bfloat16 with 16 extra bits is float32 itself.

float8_e4m3fn has no infinity: what is beyond its largest number, 448, infinities included, is that number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collage.numerics.counter import DRAW_BITS
from collage.numerics.formats import BF16, E4M3FN, FP16, FP32, Format, format_of

_NAN = 0x7FC00000
# The exponent of float32 less that of float16, in a float32 pattern.
_REBIAS = (FP32.emax - FP16.emax) << (FP32.precision - 1)
_SIGN = -(1 << 31)
# The most bits behind a format with which each of its numbers is a float32.
_MOST = {BF16: 16, FP16: 13, E4M3FN: 20}
# The exponent of float32 less that of e4m3fn; its largest number's pattern and that of nan; its smallest normal number.
_REBIAS8 = (E4M3FN.emin - FP32.emin) << (FP32.precision - 1)
_MAX8, _NAN8, _NORMAL8 = 0x7E, 0x7F, 0x08


def check_extra(fmt: Format, extra: int) -> None:
    """Raises ValueError unless float32 holds every number of ``fmt`` with ``extra`` bits more."""
    most = _MOST.get(fmt, 0)
    if not 1 <= extra <= most:
        ranges = (f"{each.name} (1 to {count} bits)" for each, count in _MOST.items())
        allowed = f"1 to {most}" if most else ", ".join(ranges)
        raise ValueError(f"a remainder of {extra} bits behind {fmt.name} is not a float32; allowed: {allowed}")


def split_remainder(x: Tensor, fmt: Format, extra: int, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds to ``extra`` bits more than ``fmt`` has, and splits into hi and remainder.

    Args:
        x: float32 tensor of any shape.
        fmt: bf16, fp16 or e4m3fn.
        extra: bits of the remainder: 1 to 16 for bf16, 1 to 13 for fp16, 1 to 20 for e4m3fn.
        bits: int32 draws in [0, 2**16) for stochastic rounding of the last bit, as in
            :func:`~collage.numerics.round_stochastic`; None rounds to nearest, ties to even.

    Returns:
        hi (``fmt.dtype``) and lo (int32, in [-2**(extra - 1), 2**(extra - 1))), both of the shape of ``x``.

    Domain: every number. nan and infinities stand in hi with lo = 0, and what rounds beyond the largest number with
    ``extra`` bits more is infinite; between that number and the format's own largest, hi is infinite and lo negative.
    In e4m3fn what is beyond the largest number, infinities included, is that number with lo = 0.
    Accuracy: |join(hi, lo) - x| <= 2**-extra ulp(x) / 2 to nearest, < 2**-extra ulp(x) by a draw, ulp being that of
    ``fmt`` at x; exact for bf16 with 16 bits, and for fp16 with 13 and e4m3fn with 20 where x is a normal number of
    the format.

    Raises:
        ValueError: ``extra`` out of its range.
        TypeError: ``x`` is not float32.
    """
    check_extra(fmt, extra)
    if x.dtype != torch.float32:
        raise TypeError(f"a remainder is split from float32, got {x.dtype}")
    pattern = x.view(torch.int32)
    size = pattern.bitwise_and(0x7FFFFFFF)
    magnitude = _MAGNITUDES[fmt](size, extra, bits)
    hi = (magnitude + (1 << (extra - 1))).bitwise_right_shift_(extra)
    lo = magnitude.sub_(hi << extra)
    sign = (pattern >> (32 - 8 * fmt.bytes)).bitwise_and_(-1 << (8 * fmt.bytes - 1))
    return hi.bitwise_or_(sign).to(_INTEGERS[fmt.bytes]).view(fmt.dtype), lo


def _bf16_magnitude(size: Tensor, extra: int, bits: Tensor | None) -> Tensor:
    return _drop(torch.where(size > 0x7F800000, _NAN, size), 16 - extra, bits)


def _fp16_magnitude(size: Tensor, extra: int, bits: Tensor | None) -> Tensor:
    normal = _drop(size - _REBIAS, 13 - extra, bits)
    # Below the smallest normal number in units of the smallest step; exact, and less than 2**(10 + extra).
    steps = size.view(torch.float32).clamp(max=FP16.smallest_normal) * 2.0 ** (24 + extra)
    subnormal = _whole(steps, bits)
    infinite = 0x7C00 << extra
    large = torch.where(size > 0x7F800000, 0x7E00 << extra, normal.clamp(max=infinite))
    return torch.where(size < 0x38800000, subnormal, large)


def _e4m3_magnitude(size: Tensor, extra: int, bits: Tensor | None) -> Tensor:
    normal = _drop(size - _REBIAS8, 20 - extra, bits)
    steps = size.view(torch.float32).clamp(max=E4M3FN.smallest_normal) * 2.0 ** (9 + extra)
    subnormal = _whole(steps, bits)
    large = torch.where(size > 0x7F800000, _NAN8 << extra, normal.clamp(max=_MAX8 << extra))
    return torch.where(size < 0x3C800000, subnormal, large)


_MAGNITUDES = {BF16: _bf16_magnitude, FP16: _fp16_magnitude, E4M3FN: _e4m3_magnitude}
_INTEGERS = {1: torch.int8, 2: torch.int16}


def _whole(steps: Tensor, bits: Tensor | None) -> Tensor:
    """Nonnegative numbers rounded to int32, nan to 0; ``steps`` is lost."""
    if bits is None:
        rounded = steps.round_()
    else:
        whole = steps.floor()
        fraction = steps.sub_(whole).mul_(2.0**DRAW_BITS).floor_()
        rounded = whole.add_((fraction + bits) >= 2.0**DRAW_BITS)
    return rounded.nan_to_num(0.0).to(torch.int32)


def _drop(pattern: Tensor, count: int, bits: Tensor | None) -> Tensor:
    """Shifts ``count`` bits out of nonnegative integers, rounding."""
    if count == 0:
        return pattern.clone()
    half = (1 << (count - 1)) - 1
    if bits is None:
        up = (pattern >> count).bitwise_and_(1).add_(half)
    else:
        # Where more than a draw's bits are dropped, the first ones decide.
        up = bits >> (DRAW_BITS - count) if count <= DRAW_BITS else bits << (count - DRAW_BITS)
    return up.add_(pattern).bitwise_right_shift_(count)


def join_remainder(hi: Tensor, lo: Tensor, extra: int) -> Tensor:
    """The value of hi and remainder: the inverse of :func:`split_remainder`.

    Args:
        hi: bfloat16, float16 or float8_e4m3fn tensor of any shape.
        lo: integer tensor of the same shape, in [-2**(extra - 1), 2**(extra - 1)).
        extra: bits of the remainder.

    Returns:
        float32 tensor of the same shape.

    Domain: every pair. A pair that no split gives has a value all the same: a zero with a negative remainder is that
    number on the other side of zero, an infinity or nan with a remainder away from zero is nan; in e4m3fn nan with any
    remainder is, and the largest number goes on beyond itself.
    Accuracy: exact.

    Raises:
        ValueError: ``extra`` out of its range for the format of ``hi``.
    """
    fmt = format_of(hi)
    check_extra(fmt, extra)
    if fmt is E4M3FN:
        return _join_e4m3(hi, lo, extra)
    pattern = hi.view(torch.int16).to(torch.int32)
    magnitude = (pattern & 0x7FFF).bitwise_left_shift_(extra).add_(lo)
    # Below zero the sign bit of the sum turns that of hi round.
    sign = pattern.bitwise_xor_(magnitude).bitwise_and_(_SIGN)
    magnitude.abs_()
    if fmt is BF16:
        return (magnitude << (16 - extra)).bitwise_or_(sign).view(torch.float32)
    subnormal = magnitude.to(torch.float32).mul_(2.0 ** -(24 + extra))
    large = (magnitude << (13 - extra)).add_(_REBIAS)
    large.add_((magnitude >= 0x7C00 << extra).to(torch.int32).mul_(_REBIAS))
    normal = magnitude >= 1 << (10 + extra)
    return torch.where(normal, large, subnormal.view(torch.int32)).bitwise_or_(sign).view(torch.float32)


def _join_e4m3(hi: Tensor, lo: Tensor, extra: int) -> Tensor:
    pattern = hi.view(torch.int8).to(torch.int32)
    nan = (pattern & _NAN8) == _NAN8
    magnitude = (pattern & _NAN8).bitwise_left_shift_(extra).add_(lo)
    sign = pattern.bitwise_xor_(magnitude).bitwise_and_(_SIGN)
    magnitude.abs_()
    subnormal = magnitude.to(torch.float32).mul_(2.0 ** -(9 + extra))
    large = (magnitude << (20 - extra)).add_(_REBIAS8)
    found = torch.where(magnitude >= _NORMAL8 << extra, large, subnormal.view(torch.int32)).bitwise_or_(sign)
    return torch.where(nan, _NAN, found).view(torch.float32)


def pack_nibbles(values: Tensor) -> Tensor:
    """Integers in [-8, 8), an even number of them, as uint8 of half the length: the first of a pair in the low half."""
    pairs = values.reshape(-1, 2)
    return ((pairs[:, 0] & 15) | (pairs[:, 1] & 15) << 4).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`: int32 of twice the length."""
    both = packed.reshape(-1, 1).to(torch.int32)
    halves = torch.cat([both & 15, both >> 4], 1).view(-1)
    return (halves ^ 8) - 8

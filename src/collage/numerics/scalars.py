"""Operations between numbers of a format and a float64 scalar, rounded once.

A float64 result rounded to the format would be rounded twice, and that shows: 0.9 * x lies within 2**-53 of a tie for
one significand in five, because 0.9 is meant as a decimal. Here the float64 result is rounded to odd (Boldo and
Melquiond 2008), so that the rounding to the format is as if it were the only one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from collage.numerics.formats import format_of
from collage.numerics.rounding import round_nearest

_SPLITTER = 2.0**27 + 1.0


def mul_scalar(x: Tensor, scalar: float) -> Tensor:
    """``RN(x * scalar)`` in the format of ``x``.

    Domain: every x and finite scalar whose product is in float64's normal range, or 0.
    Accuracy: |error| <= ulp / 2, the scalar being taken exactly.
    """
    fraction, exponent = math.frexp(scalar)
    high = math.ldexp(round(math.ldexp(fraction, 27)), exponent - 27)
    wide = x.to(torch.float64)
    # Both products are exact: at most 24 + 28 bits.
    return _rounded_sum(wide * high, wide * (scalar - high), x)


def add_scalar(x: Tensor, scalar: float) -> Tensor:
    """``RN(x + scalar)`` in the format of ``x``.

    Domain: every x and finite scalar.
    Accuracy: |error| <= ulp / 2, the scalar being taken exactly.
    """
    wide = x.to(torch.float64)
    return _rounded_sum(wide, torch.full_like(wide, scalar), x)


def div_scalar(x: Tensor, scalar: float) -> Tensor:
    """``RN(x / scalar)`` in the format of ``x``.

    Domain: every x and finite scalar other than 0 whose quotient is in float64's normal range, or 0.
    Accuracy: |error| <= ulp / 2, the scalar being taken exactly.
    """
    wide = x.to(torch.float64)
    divisor = torch.full_like(wide, scalar)
    quotient = wide / divisor
    product = quotient * divisor
    # The remainder of a correctly rounded quotient is a number of float64; its sign says on which side the rest lies.
    remainder = (wide - product) - _product_error(quotient, divisor, product)
    return round_nearest(_to_odd(quotient, remainder * math.copysign(1.0, scalar)), format_of(x))


def _rounded_sum(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``RN(a + b)`` of float64 tensors in the format of ``like``."""
    total = a + b
    b_part = total - a
    rest = (a - (total - b_part)) + (b - b_part)
    return round_nearest(_to_odd(total, rest), format_of(like))


def _product_error(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """``a * b - product`` (Dekker 1971)."""
    a_high, b_high = ((_SPLITTER * t) - (_SPLITTER * t - t) for t in (a, b))
    a_low, b_low = a - a_high, b - b_high
    return a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _to_odd(near: Tensor, rest: Tensor) -> Tensor:
    """The float64 number next to ``near + rest`` whose significand is odd, where ``rest`` is not 0."""
    bits = near.view(torch.int64)
    outward = torch.where((rest > 0) == (near > 0), 1, -1)
    even = torch.isfinite(near) & (rest != 0) & torch.isfinite(rest) & ((bits & 1) == 0)
    return torch.where(even, bits + outward, bits).view(torch.float64)

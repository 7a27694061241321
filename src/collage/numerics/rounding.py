"""Rounding of wider numbers into a format: to nearest with ties to even, to nearest with ties away, and stochastic.

Rounding is the single place where a result meets a format. It takes float32 or float64 and rounds *once*: torch's own
conversion of float64 to a 16- or 8-bit dtype goes through float32 and rounds twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collage.numerics.counter import DRAW_BITS
from collage.numerics.formats import FP32, Format, format_of


def _check_wide(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rounding takes a float32 or float64 tensor, got {x.dtype}; convert it first (exactly)")


def _to_odd(x: Tensor) -> Tensor:
    """float64 to float32, rounded to odd: inexact results end in 1, so that a later rounding to p <= 22 bits is as if
    it were the only one (Boldo and Melquiond 2008)."""
    near = x.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    toward = torch.where(x.abs() > back.abs(), 1, -1).to(torch.int32)
    inexact_even = (back != x) & ~torch.isnan(x) & ((bits & 1) == 0)
    # Around zero the magnitude can only grow, and the sign must be x's: -0.0 rounds from the tiny negatives.
    return torch.where(inexact_even, bits + toward, bits).view(torch.float32)


def round_nearest(x: Tensor, fmt: Format) -> Tensor:
    """Rounds to the nearest number of ``fmt``, ties to the one with an even significand.

    Args:
        x: float32 or float64 tensor of any shape.
        fmt: the format to round into.

    Returns:
        Tensor of ``fmt.dtype`` and the same shape, on the same device.

    Domain: every number. nan, infinities, overflow and subnormals as :mod:`collage.numerics.formats` states.
    Accuracy: |result - x| <= ulp(x) / 2, and |result - x| <= u |x| where the result is normal.

    Raises:
        TypeError: ``x`` is neither float32 nor float64.
    """
    _check_wide(x)
    if x.dtype == torch.float64 and fmt.dtype != torch.float32:
        x = _to_odd(x)
    if fmt.saturates:
        # The cast itself saturates on some versions and gives nan on others; clamp keeps nan.
        x = x.clamp(-fmt.max, fmt.max)
    return x.to(fmt.dtype)


def round_stochastic(x: Tensor, fmt: Format, bits: Tensor) -> Tensor:
    """Rounds to one of the two neighbours in ``fmt``, the nearer one more often: unbiased.

    With q the spacing of ``fmt`` at ``x`` and r the random bits, the magnitude of the result is
    q * floor(|x| / q + r / 2**16).

    Args:
        x: float32 or float64 tensor of any shape.
        fmt: the format to round into.
        bits: int32 tensor of the same shape with values in [0, 2**16), from :mod:`collage.numerics.counter`.

    Returns:
        Tensor of ``fmt.dtype`` and the same shape.

    Domain: every number. Between the largest finite number and the next multiple of its spacing, the upper neighbour
    is the overflow of the format: infinity, or the largest number where the format saturates.
    Accuracy: |result - x| < ulp(x); a number of the format rounds to itself; the mean over all 2**16 draws is ``x``
    exactly where x / q has at most 16 fractional bits (float32 to normal bfloat16), and within 2**-16 q elsewhere.

    Raises:
        TypeError: ``x`` is neither float32 nor float64.
    """
    _check_wide(x)
    spacing = fmt.ulp(x)
    # Each line is exact: q is a power of two, and only the fraction's first 16 bits can decide the carry.
    quotient = x.to(torch.float64).abs() / spacing
    steps = torch.floor(quotient)
    carry = torch.floor((quotient - steps) * 2.0**DRAW_BITS) + bits.to(torch.float64) >= 2.0**DRAW_BITS
    steps = steps + carry.to(torch.float64)
    rounded = torch.copysign(steps * spacing, x)
    # Infinities have no spacing; they (and nan) pass as they are.
    rounded = torch.where(torch.isfinite(x), rounded, x.to(torch.float64))
    return round_nearest(rounded, fmt)


def round_into(x: Tensor, out: Tensor) -> Tensor:
    """:func:`round_nearest` of a float32 tensor into ``out``, whose dtype says the format; ``x`` is kept."""
    fmt = format_of(out)
    return out.copy_(round_nearest(x, fmt) if fmt.saturates else x)


def round_stochastic_into(x: Tensor, out: Tensor, bits: Tensor, scratch: Tensor) -> Tensor:
    """:func:`round_stochastic` of a float32 tensor into ``out``, whose dtype says the format.

    ``x`` and ``scratch`` (float32, the same shape) are lost. bfloat16 has float32's exponents and discards 16 bits at
    every magnitude, so that adding r to the float32 pattern and truncating it *is* the definition.
    """
    if out.dtype != torch.bfloat16:
        return out.copy_(round_stochastic(x, format_of(out), bits))
    # nan where x is nan, else 0: a carry in a nan's pattern could run into its sign. Passes without a bool tensor are
    # an order of magnitude faster than a mask.
    torch.clamp(x, -FP32.max, FP32.max, out=scratch).sub_(scratch)
    x.view(torch.int32).add_(bits).bitwise_and_(-(1 << DRAW_BITS))
    return out.copy_(x.sub_(scratch))


def round_ties_away(x: Tensor, fmt: Format) -> Tensor:
    """Rounds to the nearest number of ``fmt``, ties to the one of larger magnitude.

    Args:
        x: float32 or float64 tensor of any shape.
        fmt: the format to round into.

    Returns:
        Tensor of ``fmt.dtype`` and the same shape.

    Domain: every number; overflow as :func:`round_nearest`.
    Accuracy: as :func:`round_nearest`.

    Raises:
        TypeError: ``x`` is neither float32 nor float64.
    """
    _check_wide(x)
    half = torch.full(x.shape, 2 ** (DRAW_BITS - 1), dtype=torch.int32, device=x.device)
    # floor(|x| / q + 1/2) rounds a tie away from zero.
    return round_stochastic(x, fmt, half)


def is_representable(x: Tensor, fmt: Format) -> Tensor:
    """Whether each float32 or float64 number is a number of ``fmt``; True for nan, for infinities where it has them."""
    back = round_nearest(x, fmt).to(torch.float64)
    return (back == x.to(torch.float64)) | torch.isnan(x)

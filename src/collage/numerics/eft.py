"""Elementary operations rounded to a format, and the error-free transforms built from them.

Every operation is computed in the format's ``wide`` dtype and rounded once, so its result is the correctly rounded
one in all five formats; torch's own arithmetic is native for three of them at best. Everything here is out of place,
broadcasts like torch, and takes operands of one format.

In the docstrings p is the format's precision, u = 2**-p, eta its smallest subnormal, and *exponent* means
floor(log2 |x|). Where a leading result is not finite its residual is 0, so that the pair still sums to it.

A compiler that keeps 16-bit intermediates in float32 turns every residual here into zero (TorchInductor does, unless
``emulate_precision_casts`` is set): these functions are for eager execution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collage.numerics.formats import Format, format_of
from collage.numerics.rounding import round_nearest


def common_format(*operands: Tensor) -> Format:
    """The one format of all operands.

    Raises:
        TypeError: the operands have different dtypes.
        ValueError: their dtype is none of the known formats.
    """
    dtypes = {operand.dtype for operand in operands}
    if len(dtypes) != 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise TypeError(f"operands must have one format, got {names}; round them to the same one first")
    return format_of(operands[0])


def finite_or_zero(x: Tensor, guard: Tensor) -> Tensor:
    """``x`` where ``guard`` is finite, else 0, in the common format of both."""
    fmt = common_format(x, guard)
    return torch.where(torch.isfinite(guard.to(fmt.wide)), x, torch.zeros((), dtype=x.dtype, device=x.device))


def add_rn(a: Tensor, b: Tensor) -> Tensor:
    """``RN(a + b)`` in the operands' format.

    Domain: every pair; overflow as :mod:`collage.numerics.formats` states.
    Accuracy: |error| <= ulp / 2; exact where the result is subnormal.
    """
    fmt = common_format(a, b)
    return round_nearest(a.to(fmt.wide) + b.to(fmt.wide), fmt)


def sub_rn(a: Tensor, b: Tensor) -> Tensor:
    """``RN(a - b)`` in the operands' format.

    Domain: every pair; overflow as :mod:`collage.numerics.formats` states.
    Accuracy: |error| <= ulp / 2; exact where the result is subnormal.
    """
    fmt = common_format(a, b)
    return round_nearest(a.to(fmt.wide) - b.to(fmt.wide), fmt)


def mul_rn(a: Tensor, b: Tensor) -> Tensor:
    """``RN(a * b)`` in the operands' format.

    Domain: every pair; overflow as :mod:`collage.numerics.formats` states.
    Accuracy: |error| <= ulp / 2, also where the result is subnormal.
    """
    fmt = common_format(a, b)
    return round_nearest(a.to(fmt.wide) * b.to(fmt.wide), fmt)


def div_rn(a: Tensor, b: Tensor) -> Tensor:
    """``RN(a / b)`` in the operands' format.

    Domain: every pair. x / 0 is an infinity, which a saturating format turns into its largest number; 0 / 0 is nan.
    Accuracy: |error| <= ulp / 2, also where the result is subnormal.
    """
    fmt = common_format(a, b)
    return round_nearest(a.to(fmt.wide) / b.to(fmt.wide), fmt)


def sqrt_rn(a: Tensor) -> Tensor:
    """``RN(sqrt(a))`` in the operand's format.

    Domain: every number; nan below 0, -0 for -0.
    Accuracy: |error| <= ulp / 2. Through float64 in every format, because torch's float32 square root is not
    correctly rounded on the CPU; a last-bit error of the float64 one cannot reach the result, whose rounding
    boundaries are at least 4 float64 ulps away.
    """
    fmt = common_format(a)
    return round_nearest(torch.sqrt(a.to(torch.float64)), fmt)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and what its rounding lost, for operands in any order.

    The larger operand goes first, then Dekker's three operations. Knuth's six give the same pair without a
    comparison, but one of them can overflow when |b| is the largest number (Boldo, Graillat and Muller 2017).

    Returns:
        ``(s, e)`` with s = RN(a + b) and e = a + b - s.

    Domain: every pair of finite numbers whose sum does not overflow, subnormals included; where a saturating
    format's does, every pair still.
    Accuracy: s + e = a + b exactly.
    """
    fmt = common_format(a, b)
    a, b = torch.broadcast_tensors(a, b)
    ordered = a.to(fmt.wide).abs() >= b.to(fmt.wide).abs()
    return fast_two_sum(torch.where(ordered, a, b), torch.where(ordered, b, a))


def fast_two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and what its rounding lost, for operands in order (Dekker 1971).

    Returns:
        ``(s, e)`` with s = RN(a + b) and e = a + b - s.

    Domain: exponent(a) >= exponent(b), or a = 0, or b = 0, the sum not overflowing. Outside it e may be wrong.
    Accuracy: s + e = a + b exactly.
    """
    s = add_rn(a, b)
    e = sub_rn(b, sub_rn(s, a))
    return s, finite_or_zero(e, s)


def two_prod(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded product and what its rounding lost: ``e = fma(a, b, -p)``.

    Returns:
        ``(p, e)`` with p = RN(a * b) and e = RN(a * b - p). The product is exact in the wide dtype.

    Domain: every pair of finite numbers whose product does not overflow.
    Accuracy: p + e = a * b exactly where exponent(a) + exponent(b) >= emin + precision - 1, or either is 0. Below
    that e is rounded: |p + e - a * b| <= eta / 2, and e = 0 where p is subnormal.
    """
    fmt = common_format(a, b)
    exact = a.to(fmt.wide) * b.to(fmt.wide)
    p = round_nearest(exact, fmt)
    e = round_nearest(exact - p.to(fmt.wide), fmt)
    return p, finite_or_zero(e, p)


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower halves of a significand (Dekker 1971, after Veltkamp), all in the format.

    Returns:
        ``(high, low)``: high has at most p - s significant bits and low at most s - 1, s = ceil(p / 2), so that
        products of halves are exact.

    Domain: |a| * (2**s + 1) does not overflow; subnormals included.
    Accuracy: high + low = a exactly.
    """
    fmt = common_format(a)
    shift = (fmt.precision + 1) // 2
    factor = torch.full((), 2.0**shift + 1, dtype=torch.float64, device=a.device)
    scaled = mul_rn(a, round_nearest(factor, fmt))
    high = sub_rn(scaled, sub_rn(scaled, a))
    return high, finite_or_zero(sub_rn(a, high), high)

"""Arithmetic on expansions: unevaluated sums of 2 to 4 numbers of one format.

An expansion is a tuple of tensors of one dtype and shape, most significant first. It is *normalised* when each
component is the rounded sum of itself and the next, x[i] = RN(x[i] + x[i+1]); equivalently, when renormalize(x) == x.
Operands are expected normalised and results are.

Policy, on top of the one of :mod:`collage.numerics.formats`: a leading component that is not finite stands alone,
all others 0, so that the expansion sums to that infinity or nan. A saturating format has no such component: its
leading component stays at the largest number, and the others hold what is left, saturated in their turn.

In the docstrings n is the number of components, p the format's precision, u = 2**-p, eta its smallest subnormal.
Bounds hold where nothing overflows or saturates on the way; the terms in eta are what underflow can add. Sums need
none: below the normal range they are exact. A bound "to first order" leaves out a factor 1 + O(u). Every bound is
tested as it stands, in all five formats.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from collage.numerics.eft import (
    add_rn,
    common_format,
    div_rn,
    fast_two_sum,
    finite_or_zero,
    mul_rn,
    sqrt_rn,
    sub_rn,
    two_prod,
    two_sum,
)
from collage.numerics.formats import Format
from collage.numerics.rounding import round_nearest

Expansion = tuple[Tensor, ...]
COUNTS = (2, 3, 4)


def _check_count(n: int) -> None:
    if n not in COUNTS:
        raise ValueError(f"an expansion has 2, 3 or 4 components, got {n}")


def _paired(x: Expansion, y: Expansion) -> int:
    """The number of components that both have."""
    _check_count(len(x))
    if len(x) != len(y):
        raise ValueError(f"operands must have equally many components, got {len(x)} and {len(y)}")
    return len(x)


def from_wide(x: Tensor | float, fmt: Format, n: int = 2) -> Expansion:
    """The expansion nearest to a wide number, component by component.

    Args:
        x: float32 or float64 tensor, or a Python number (a 0-d expansion, exact from the Python double).
        fmt: the components' format.
        n: how many components, 2 to 4.

    Domain: every number whose leading part, after the last component is rounded, does not overflow.
    Accuracy: |error| <= max(u**n |x|, eta / 2).

    Raises:
        ValueError: n is not 2, 3 or 4.
        TypeError: ``x`` is a tensor of another dtype.
    """
    _check_count(n)
    rest = x if isinstance(x, Tensor) else torch.full((), float(x), dtype=torch.float64)
    components: list[Tensor] = []
    for _ in range(n):
        component = round_nearest(rest, fmt)
        components.append(component)
        # Exact: the difference of a number and its rounding is representable in the number's own dtype.
        rest = rest - component.to(rest.dtype)
    return renormalize((components[0], *(finite_or_zero(c, components[0]) for c in components[1:])))


def to_wide(x: Expansion, dtype: torch.dtype = torch.float64) -> Tensor:
    """The sum of the components, smallest first, in float32 or float64.

    Domain: every expansion.
    Accuracy: for n = 2 correctly rounded; exact where the sum has at most as many bits as ``dtype``.

    Raises:
        ValueError: ``dtype`` is neither float32 nor float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    total = x[-1].to(dtype)
    for component in reversed(x[:-1]):
        total = component.to(dtype) + total
    return total


def _distill(terms: list[Tensor]) -> list[Tensor]:
    """The same sum as a normalised list of as many terms, by sweeps of two_sum from the last term to the first.

    2m - 3 sweeps settle m terms of any order and size: found by enumeration in small precisions (the tests repeat it
    for m <= 4), not proven. A normalised list passes unchanged, since two_sum leaves each of its pairs as it is.
    """
    terms = list(terms)
    for _ in range(2 * len(terms) - 3):
        for i in range(len(terms) - 1, 0, -1):
            terms[i - 1], terms[i] = two_sum(terms[i - 1], terms[i])
    return [terms[0], *(finite_or_zero(term, terms[0]) for term in terms[1:])]


def renormalize(x: Expansion) -> Expansion:
    """The normalised expansion of the same value.

    Domain: components of any order and size whose partial sums do not overflow.
    Accuracy: the value is preserved exactly; a normalised expansion is returned unchanged.
    """
    _check_count(len(x))
    return tuple(_distill(list(x)))


def is_normalized(x: Expansion) -> Tensor:
    """Whether each element is normalised: bool tensor. A non-finite number that stands alone is."""
    same = [(a == b) | (torch.isnan(a) & torch.isnan(b)) for a, b in zip(renormalize(x), x, strict=True)]
    return torch.stack(torch.broadcast_tensors(*same)).all(dim=0)


def grow(x: Expansion, a: Tensor) -> Expansion:
    """``x + a`` for a single number a of the format.

    n = 2 is the paper's Grow with two_sum first: DWPlusFP of Joldes, Muller and Popescu (2017), whose bound it has.
    For n > 2 the exact sum loses only what is left after the first n components.

    Domain: every normalised x and finite a whose sum does not overflow.
    Accuracy: |error| <= 2 u**2 |x + a| for n = 2; u**n / (1 - 2u) |x + a| for n > 2.
    """
    _check_count(len(x))
    if len(x) == 2:
        s, e = two_sum(x[0], a)
        return fast_two_sum(s, add_rn(x[1], e))
    return tuple(_distill([x[0], a, *x[1:]])[: len(x)])


def add(x: Expansion, y: Expansion) -> Expansion:
    """``x + y``.

    n = 2 is AccurateDWPlusDW of Joldes, Muller and Popescu (2017), whose bound it has. For n > 2 the exact sum loses
    only what is left after the first n components.

    Domain: every two normalised expansions whose sum does not overflow.
    Accuracy: |error| <= 3 u**2 / (1 - 4u) |x + y| for n = 2; u**n / (1 - 2u) |x + y| for n > 2.
    """
    n = _paired(x, y)
    if n == 2:
        s, e = two_sum(x[0], y[0])
        t, f = two_sum(x[1], y[1])
        s, e = fast_two_sum(s, add_rn(e, t))
        return fast_two_sum(s, add_rn(f, e))
    return tuple(_distill([c for pair in zip(x, y, strict=True) for c in pair])[:n])


def scale(x: Expansion, factor: float) -> Expansion:
    """``x * factor`` for plus or minus a power of two.

    Domain: every normalised x; a saturating format saturates each component by itself.
    Accuracy: exact where no component falls below the normal range; else |error| <= n eta / 2.

    Raises:
        ValueError: ``factor`` is not plus or minus a power of two.
    """
    if not math.isfinite(factor) or abs(math.frexp(factor)[0]) != 0.5:
        raise ValueError(f"factor must be plus or minus a power of two, got {factor}; use mul for other numbers")
    fmt = common_format(*x)
    return renormalize(tuple(round_nearest(c.to(torch.float64) * factor, fmt) for c in x))


def _sum_levels(levels: list[list[Tensor]]) -> list[Tensor]:
    """One component per level: two_sum within a level, its errors to the next; the last level is summed plainly."""
    components = []
    for level, following in pairwise(levels):
        total = level[0]
        for term in level[1:]:
            total, e = two_sum(total, term)
            following.append(e)
        components.append(total)
    total = levels[-1][0]
    for term in levels[-1][1:]:
        total = add_rn(total, term)
    return [*components, total]


def mul(x: Expansion, y: Expansion) -> Expansion:
    """``x * y``.

    n = 2 is the paper's Mul: DWTimesDW1 of Joldes, Muller and Popescu (2017), with the bound of Muller and Rideau
    (2022). For n > 2, the products x[i] y[j] with i + j < n, and their errors but for the last level's.

    Domain: every two normalised expansions whose product does not overflow.
    Accuracy: |error| <= c u**n |x y| + n (n + 1) / 2 eta, with c = 5 for n = 2; by counting roundings, to first order,
    c = 36 for n = 3 and 158 for n = 4 (worst seen: 4.3, 5.1, 4.3).
    """
    n = _paired(x, y)
    if n == 2:
        p, e = two_prod(x[0], y[0])
        lo = add_rn(add_rn(mul_rn(x[1], y[0]), mul_rn(x[0], y[1])), e)
        return fast_two_sum(p, finite_or_zero(lo, p))
    levels: list[list[Tensor]] = [[] for _ in range(n)]
    for i in range(n):
        for j in range(n - 1 - i):
            p, e = two_prod(x[i], y[j])
            levels[i + j].append(p)
            levels[i + j + 1].append(e)
        levels[-1].append(mul_rn(x[i], y[n - 1 - i]))
    lead, *others = _sum_levels(levels)
    return renormalize((lead, *(finite_or_zero(c, lead) for c in others)))


def _single(a: Tensor, n: int) -> Expansion:
    return (a, *(torch.zeros_like(a) for _ in range(n - 1)))


def _correct(q: Expansion, correction: Tensor) -> Expansion:
    """``q + correction``; a correction that is not finite (0 / 0, inf - inf) says nothing and is left out."""
    return grow(q, finite_or_zero(correction, correction))


def div(x: Expansion, y: Expansion) -> Expansion:
    """``x / y``, by long division: each quotient digit corrects the remainder of those before it.

    Domain: every two normalised expansions, where neither the quotient nor twice x overflows. x / 0 is an infinity,
    which a saturating format turns into its largest number; 0 / 0 is nan.
    Accuracy: |error| <= c u**n |x / y| + n (n + 1) / 2 eta (1 + 1 / |y|), with, by counting roundings, c = 10 + 80 u
    for n = 2, and to first order 64 for n = 3 and 240 for n = 4 (worst seen: 6.1, 8.9, 10.6).
    """
    n = _paired(x, y)
    q0 = div_rn(x[0], y[0])
    if n == 2:
        p, e = two_prod(q0, y[0])
        remainder = sub_rn(sub_rn(x[0], p), e)
        low = sub_rn(x[1], mul_rn(q0, y[1]))
        correction = div_rn(add_rn(remainder, low), y[0])
        return fast_two_sum(q0, finite_or_zero(correction, correction))
    q = _single(q0, n)
    for _ in range(n - 1):
        remainder = add(x, scale(mul(q, y), -1.0))
        q = _correct(q, div_rn(remainder[0], y[0]))
    return q


def sqrt(x: Expansion) -> Expansion:
    """The square root, by one correction per component.

    n = 2 is SQRTDWtoDW of Lefèvre, Louvet, Muller, Picot and Rideau (2023), whose bound it has.

    Domain: every normalised x; nan below 0.
    Accuracy: |error| <= c u**n sqrt(x) + n (n + 1) / 2 eta (1 + 1 / sqrt(x)), with c = 25 / 8 for n = 2; by counting
    roundings, to first order, c = 42 for n = 3 and 160 for n = 4 (worst seen: 2.2, 4.5, 10.6).
    """
    _check_count(len(x))
    root = sqrt_rn(x[0])
    if len(x) == 2:
        p, e = two_prod(root, root)
        remainder = add_rn(sub_rn(sub_rn(x[0], p), e), x[1])
        correction = div_rn(remainder, add_rn(root, root))
        return fast_two_sum(root, finite_or_zero(correction, correction))
    y = _single(root, len(x))
    for _ in range(len(x) - 1):
        remainder = add(x, scale(mul(y, y), -1.0))
        y = _correct(y, div_rn(remainder[0], add_rn(root, root)))
    return y

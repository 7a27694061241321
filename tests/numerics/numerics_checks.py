"""The claims of the docstrings as functions of the operation: the real one must pass, each mutant must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import torch
from numerics_oracle import exact, exact_sum, nearest, nearest64, same, same_value
from torch import Tensor

from collage.numerics import BF16, Format, format_of

Pair = tuple[Tensor, Tensor]
Expansion = tuple[Tensor, ...]


def fail_where(bad: Tensor, claim: str, *shown: Tensor) -> None:
    """Raises AssertionError with the first element that breaks the claim."""
    if bad.any():
        first = bad.reshape(-1).nonzero()[0, 0]
        values = [t.double().broadcast_to(bad.shape).reshape(-1)[first].item() for t in shown]
        raise AssertionError(f"{claim}: {int(bad.sum())} of {bad.numel()} fail, the first at {values}")


def check_nearest(op: Callable[[Tensor, Format], Tensor], fmt: Format, x: Tensor) -> None:
    """A rounding to nearest against the float64 oracle."""
    got = op(x, fmt)
    assert got.dtype == fmt.dtype
    fail_where(~same(got, nearest64(x.double(), fmt)), f"nearest {fmt.name}", x, got)


def check_nearest_rational(op: Callable[[Tensor, Format], Tensor], fmt: Format, x: Tensor) -> None:
    """A rounding to nearest against exact rationals; finite inputs."""
    want = torch.tensor([nearest(q, fmt) for q in exact(x)], dtype=torch.float64).reshape(x.shape)
    fail_where(~same_value(op(x, fmt), want), f"nearest {fmt.name}", x, want)


def check_stochastic(op: Callable[[Tensor, Format, Tensor], Tensor], fmt: Format, x: float) -> None:
    """All 2**16 draws of one finite input: how many go up, and that the largest draws do."""
    draws = torch.arange(2**16, dtype=torch.int32)
    got = op(torch.full((2**16,), x, dtype=torch.float64), fmt, draws).double()
    q = abs(Fraction(x))
    spacing = exact(fmt.ulp(torch.tensor(x, dtype=torch.float64)))[0]
    below = q // spacing
    ups = (q - below * spacing) * 2**16 // spacing
    sign = -1 if x < 0 else 1
    down, up = (nearest(sign * k * spacing, fmt) for k in (below, below + 1))
    want = torch.where(draws >= 2**16 - int(ups), up, down)
    fail_where(~same_value(got, want), f"stochastic {fmt.name} of {x}", draws, got, want)


def check_unbiased(op: Callable[[Tensor, Format, Tensor], Tensor], fmt: Format, x: float) -> None:
    """The mean over all draws is the input, where it has at most 16 bits below the format's spacing."""
    got = op(torch.full((2**16,), x, dtype=torch.float64), fmt, torch.arange(2**16, dtype=torch.int32))
    values, counts = got.double().unique(return_counts=True)
    mean = sum(Fraction(v) * c for v, c in zip(values.tolist(), counts.tolist(), strict=True)) / 2**16
    assert mean == Fraction(x), f"mean of {fmt.name} roundings of {x} is {float(mean)}"


def check_sum(op: Callable[[Tensor, Tensor], Pair], fmt: Format, a: Tensor, b: Tensor) -> None:
    """An error-free sum: s = RN(a + b), s + e = a + b; e = 0 where s overflows. Sums must be exact in float64."""
    wide_a, wide_b = a.double(), b.double()
    total = wide_a + wide_b
    fail_where((total - wide_a != wide_b) | (total - wide_b != wide_a), "the oracle is exact", a, b)
    s, e = op(a, b)
    assert s.dtype == e.dtype == fmt.dtype
    fail_where(~same_value(s, nearest64(total, fmt)), f"s = RN(a + b) in {fmt.name}", a, b, s)
    lost = torch.where(torch.isfinite(s.double()), total - s.double(), 0.0)
    fail_where(~same_value(e, lost), f"e = a + b - s in {fmt.name}", a, b, s, e)


def check_sum_rational(op: Callable[[Tensor, Tensor], Pair], fmt: Format, a: Tensor, b: Tensor) -> None:
    """The same against exact rationals, at any distance of the exponents; finite operands."""
    s, e = op(a, b)
    rows = zip(exact(a), exact(b), s.double().tolist(), e.double().tolist(), strict=True)
    for qa, qb, got, lost in rows:
        assert got == nearest(qa + qb, fmt), f"s = RN(a + b) in {fmt.name}: {float(qa)}, {float(qb)}, {got}"
        want = qa + qb - Fraction(got) if abs(got) != torch.inf else 0
        assert lost == want, f"e = a + b - s in {fmt.name}: {float(qa)}, {float(qb)}, {got}, {lost}"


def check_product(op: Callable[[Tensor, Tensor], Pair], fmt: Format, a: Tensor, b: Tensor) -> None:
    """An error-free product, with every part of its Domain and Accuracy. Products are exact in float64."""
    total = a.double() * b.double()
    p, e = op(a, b)
    assert p.dtype == e.dtype == fmt.dtype
    fail_where(~same_value(p, nearest64(total, fmt)), f"p = RN(a b) in {fmt.name}", a, b, p)
    finite = torch.isfinite(p.double())
    rest = torch.where(finite, total - p.double(), 0.0)
    fail_where(~same_value(e, nearest64(rest, fmt)), f"e = RN(a b - p) in {fmt.name}", a, b, p, e)
    exponents = torch.frexp(a.double()).exponent + torch.frexp(b.double()).exponent - 2
    domain = finite & ((exponents >= fmt.emin + fmt.precision - 1) | (total == 0)) & (total.abs() <= fmt.max)
    fail_where(domain & (e.double() != rest), f"p + e = a b in the domain in {fmt.name}", a, b, p, e)
    below = finite & (total.abs() <= fmt.max)
    fail_where(below & ((e.double() - rest).abs() > fmt.smallest_subnormal / 2), "off by eta / 2", a, b, p, e)
    subnormal = finite & (p.double().abs() < fmt.smallest_normal)
    fail_where(subnormal & (e.double() != 0), "e = 0 where p is subnormal", a, b, p, e)


def check_split(op: Callable[[Tensor], Pair], fmt: Format, a: Tensor) -> None:
    """Halves that sum to the number, each short enough for an exact product."""
    high, low = op(a)
    half = (fmt.precision + 1) // 2
    fail_where(high.double() + low.double() != a.double(), f"high + low = a in {fmt.name}", a, high, low)
    for part, bits in ((high, fmt.precision - half), (low, half - 1)):
        unit = torch.frexp(part.double()).mantissa * 2.0**bits
        fail_where(unit != torch.round(unit), f"at most {bits} bits in {fmt.name}", a, part)


def check_root(op: Callable[[Tensor], Tensor], fmt: Format, a: Tensor) -> None:
    """A correctly rounded square root of finite numbers > 0: its neighbours' midpoints enclose the root, squared."""
    root = op(a)
    assert root.dtype == fmt.dtype
    wide = root.double()
    # At most 25 bits each: the squares are exact in float64. No root is a midpoint, whose square has too many bits.
    upper = wide + fmt.ulp(wide) / 2
    power = torch.frexp(wide).mantissa == 0.5
    lower = wide - torch.where(power & (wide > fmt.smallest_normal), fmt.ulp(wide) / 4, fmt.ulp(wide) / 2)
    x = a.double()
    fail_where((lower * lower > x) | (upper * upper < x), f"RN(sqrt(a)) in {fmt.name}", a, root)


BETAS = {
    0.9: (0.8984375, 0.00156402587890625),
    0.999: (1.0, -0.00099945068359375),
    0.99: (0.98828125, 0.00171661376953125),
    0.98: (0.98046875, -0.000469207763671875),
    0.95: (0.94921875, 0.000782012939453125),
}


def check_betas(op: Callable[..., Expansion]) -> None:
    """The five constants of paper section 3."""
    for beta, want in BETAS.items():
        got = op(beta, BF16, 2)
        assert tuple(c.item() for c in got) == want, f"{beta} becomes {got}"
        assert all(c.shape == () and c.dtype == torch.bfloat16 for c in got)


def check_from_wide(op: Callable[..., Expansion], fmt: Format, n: int, x: Tensor) -> None:
    """Normalised, and as near as the docstring says; for x that does not overflow."""
    got = op(x, fmt, n)
    check_normalized(got, f"from_wide in {fmt.name}")
    u, eta = Fraction(fmt.unit_roundoff), Fraction(fmt.smallest_subnormal)
    for value, q in zip(exact_sum(got), exact(x), strict=True):
        assert abs(value - q) <= max(u**n * abs(q), eta / 2), f"from_wide in {fmt.name}, {n}: {float(q)}"


def normalized(x: Expansion, fmt: Format) -> Tensor:
    """The definition, x[i] = RN(x[i] + x[i + 1]), or a number that is not finite and stands alone.

    float64 has more than 2p + 2 bits for every format, so that its own rounding of the sum does no harm.
    """
    same_sums = [same_value(nearest64(a.double() + b.double(), fmt), a) for a, b in pairwise(x)]
    alone = torch.isfinite(x[0].double()) | torch.stack([c.double() == 0 for c in x[1:]]).all(dim=0)
    return torch.stack(same_sums).all(dim=0) & alone


def check_normalized(x: Expansion, claim: str) -> None:
    """Every element is normalised by the definition."""
    fail_where(~normalized(x, format_of(x[0])), f"normalised: {claim}", *x)


def equal_sums(x: Expansion, y: Expansion) -> Tensor:
    """Whether two expansions have exactly the same values: fsum of numbers above 2**-1074 is 0 only if the sum is."""
    rows = zip(*(c.double().tolist() for c in x), *((-c.double()).tolist() for c in y), strict=True)
    return torch.tensor([math.fsum(row) == 0 for row in rows], dtype=torch.bool)


def check_renormalize(op: Callable[[Expansion], Expansion], fmt: Format, x: Expansion) -> None:
    """Value preserved, result normalised by the definition, and a fixpoint; for partial sums that do not overflow."""
    got = op(x)
    assert all(c.dtype == fmt.dtype for c in got)
    fail_where(~equal_sums(x, got), f"renormalize preserves the value in {fmt.name}", *x)
    check_normalized(got, f"renormalize in {fmt.name}, {len(x)} components")
    again = op(got)
    fail_where(~torch.stack([same_value(a, b) for a, b in zip(got, again, strict=True)]).all(dim=0), "fixpoint", *x)


def check_bound(
    got: Expansion, want: list[Fraction], fmt: Format, coefficient: Fraction, slack: list[Fraction] | None = None
) -> Fraction:
    """Normalised and |got - want| <= coefficient u**n |want| + slack. Returns the worst error / (u**n |want|)."""
    check_normalized(got, fmt.name)
    scale = Fraction(fmt.unit_roundoff) ** len(got)
    worst = Fraction(0)
    for i, (value, q) in enumerate(zip(exact_sum(got), want, strict=True)):
        error = abs(value - q)
        bound = coefficient * scale * abs(q) + (slack[i] if slack else 0)
        assert error <= bound, f"{fmt.name}, {len(got)} components: error {float(error)} over {float(bound)} at {i}"
        if q and error > (slack[i] if slack else 0):
            worst = max(worst, error / (scale * abs(q)))
    return worst


def _u(fmt: Format) -> Fraction:
    return Fraction(fmt.unit_roundoff)


def _eta_terms(fmt: Format, n: int) -> Fraction:
    return Fraction(n * (n + 1), 2) * Fraction(fmt.smallest_subnormal)


def check_grow(op: Callable[[Expansion, Tensor], Expansion], fmt: Format, x: Expansion, a: Tensor) -> Fraction:
    """|error| <= 2 u^2 |x + a| for n = 2, u^n / (1 - 2u) |x + a| beyond."""
    want = [q + r for q, r in zip(exact_sum(x), exact(a), strict=True)]
    return check_bound(op(x, a), want, fmt, Fraction(2) if len(x) == 2 else 1 / (1 - 2 * _u(fmt)))


def check_add(op: Callable[[Expansion, Expansion], Expansion], fmt: Format, x: Expansion, y: Expansion) -> Fraction:
    """|error| <= 3 u^2 / (1 - 4u) |x + y| for n = 2, u^n / (1 - 2u) |x + y| beyond."""
    want = [q + r for q, r in zip(exact_sum(x), exact_sum(y), strict=True)]
    u = _u(fmt)
    return check_bound(op(x, y), want, fmt, 3 / (1 - 4 * u) if len(x) == 2 else 1 / (1 - 2 * u))


def check_mul(op: Callable[[Expansion, Expansion], Expansion], fmt: Format, x: Expansion, y: Expansion) -> Fraction:
    """|error| <= (5, 36, 158) u^n |x y| + n (n + 1) / 2 eta."""
    want = [q * r for q, r in zip(exact_sum(x), exact_sum(y), strict=True)]
    n = len(x)
    return check_bound(op(x, y), want, fmt, Fraction((5, 36, 158)[n - 2]), [_eta_terms(fmt, n)] * len(want))


def check_div(op: Callable[[Expansion, Expansion], Expansion], fmt: Format, x: Expansion, y: Expansion) -> Fraction:
    """|error| <= (10 + 80 u, 64, 240) u^n |x / y| + n (n + 1) / 2 eta (1 + 1 / |y|)."""
    tops, bottoms, n = exact_sum(x), exact_sum(y), len(x)
    want = [q / r for q, r in zip(tops, bottoms, strict=True)]
    slack = [_eta_terms(fmt, n) * (1 + 1 / abs(r)) for r in bottoms]
    return check_bound(op(x, y), want, fmt, (10 + 80 * _u(fmt), Fraction(64), Fraction(240))[n - 2], slack)


def check_sqrt(op: Callable[[Expansion], Expansion], fmt: Format, x: Expansion) -> Fraction:
    """|error| <= (25 / 8, 42, 160) u^n sqrt(x) + n (n + 1) / 2 eta (1 + 1 / sqrt(x)); x > 0."""
    got, n = op(x), len(x)
    check_normalized(got, fmt.name)
    coefficient = (Fraction(25, 8), Fraction(42), Fraction(160))[n - 2] * _u(fmt) ** n
    worst = Fraction(0)
    for value, q in zip(exact_sum(got), exact_sum(x), strict=True):
        # The rational root is within 2**-120 of itself, which is allowed for.
        root = rational_root(q)
        error, slack = abs(value - root) - root / 2**120, _eta_terms(fmt, n) * (1 + 1 / root)
        assert error <= coefficient * root + slack, f"sqrt in {fmt.name}, {n} components: of {float(q)}"
        if error > slack:
            worst = max(worst, error / root / _u(fmt) ** n)
    return worst


def rational_root(q: Fraction) -> Fraction:
    """The square root of q > 0, within 2**-120 of itself."""
    shift = 2 * (140 + max(0, q.denominator.bit_length() - q.numerator.bit_length()))
    return Fraction(math.isqrt(q.numerator * 2**shift // q.denominator), 2 ** (shift // 2))

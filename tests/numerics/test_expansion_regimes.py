"""The stated bounds over the whole range: ends, underflow, cancellation and raw bit patterns, for every format."""

from __future__ import annotations

import pytest
import torch
from numerics_checks import check_add, check_div, check_grow, check_mul, check_normalized, check_renormalize, check_sqrt
from numerics_operands import (
    REGIMES,
    Expansion,
    Regime,
    pattern_expansion,
    product_domain,
    quotient_domain,
    root_domain,
    sum_domain,
)
from numerics_oracle import by_name, random_bits_of

from collage.numerics import Format, add, div, grow, mul, renormalize, sqrt

COUNT = 250
EACH = pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
COUNTS = pytest.mark.parametrize("n", [2, 3, 4])


def operands(regime: Regime, fmt: Format, n: int) -> tuple[Expansion, Expansion]:
    return regime.draw(fmt, n, COUNT, torch.Generator().manual_seed(n))


def kept(x: Expansion) -> Expansion:
    """The same, unless the domain left too few to prove anything."""
    assert x[0].numel() >= COUNT // 8
    return x


@EACH
@COUNTS
@pytest.mark.parametrize(**by_name())
def test_sums_keep_their_bounds_everywhere(fmt: Format, n: int, regime: Regime) -> None:
    x, y = sum_domain(*operands(regime, fmt, n), fmt)
    check_add(add, fmt, kept(x), y)
    check_grow(grow, fmt, x, y[0])
    check_grow(grow, fmt, y, x[0])


@EACH
@COUNTS
@pytest.mark.parametrize(**by_name())
def test_products_keep_their_bound_everywhere(fmt: Format, n: int, regime: Regime) -> None:
    x, y = product_domain(*operands(regime, fmt, n), fmt)
    check_mul(mul, fmt, kept(x), y)


@EACH
@COUNTS
@pytest.mark.parametrize(**by_name())
def test_quotients_keep_their_bound_everywhere(fmt: Format, n: int, regime: Regime) -> None:
    x, y = quotient_domain(*operands(regime, fmt, n), fmt)
    check_div(div, fmt, kept(x), y)


@EACH
@COUNTS
@pytest.mark.parametrize(**by_name())
def test_roots_keep_their_bound_everywhere(fmt: Format, n: int, regime: Regime) -> None:
    x, _ = operands(regime, fmt, n)
    check_sqrt(sqrt, fmt, kept(root_domain(x)))


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_raw_patterns_are_normalised_with_their_value(fmt: Format, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    raw = tuple(random_bits_of(fmt, 4000, generator) for _ in range(n))
    # Partial sums that overflow are outside the domain.
    inside = torch.stack([c.double().abs() for c in raw]).sum(dim=0) <= fmt.max
    check_renormalize(renormalize, fmt, kept(tuple(c[inside] for c in raw)))


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_as_many_sweeps_as_add_makes_settle_raw_patterns(fmt: Format, n: int) -> None:
    """A sum of two expansions of n components is a list of 2n."""
    generator = torch.Generator().manual_seed(10 + n)
    x, y = (pattern_expansion(fmt, n, 4000, generator) for _ in range(2))
    check_normalized(add(x, y), f"{n} components of {fmt.name}")

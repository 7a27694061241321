"""Expansions of 2, 3 and 4 components in every format: normal form, the stated bounds as they stand, specials."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_checks import (
    check_add,
    check_betas,
    check_div,
    check_from_wide,
    check_grow,
    check_mul,
    check_normalized,
    check_renormalize,
    check_sqrt,
    fail_where,
    normalized,
)
from numerics_oracle import (
    FP8,
    by_name,
    every_finite,
    exact,
    exact_sum,
    from_bits,
    nearest64,
    pairs,
    random_bits_of,
    random_expansion,
    random_numbers,
    same_value,
    significands,
)
from torch import Tensor

from collage.numerics import (
    BF16,
    E4M3FN,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    Format,
    add,
    add_rn,
    div,
    fast_two_sum,
    from_wide,
    grow,
    is_normalized,
    mul,
    mul_rn,
    renormalize,
    scale,
    sqrt,
    to_wide,
    two_prod,
    two_sum,
)

COUNTS = pytest.mark.parametrize("n", [2, 3, 4])
# Leading exponents around 1 whose products and quotients stay in every format's range.
LOW, HIGH = -3, 2


def two(fmt: Format, n: int, count: int, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Two lists of random normalised expansions."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (renormalize(random_expansion(fmt, n, count, LOW, HIGH, generator)) for _ in range(2))
    return x, y


def positive(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """|x|."""
    sign = torch.where(x[0].double() < 0, -1.0, 1.0)
    return tuple((c.double() * sign).to(c.dtype) for c in x)


def cancelling(x: tuple[Tensor, ...], y: tuple[Tensor, ...], fmt: Format) -> tuple[Tensor, ...]:
    """Expansions that share 0, 1, ... leading components with -x and continue otherwise."""
    kept = torch.arange(x[0].numel()) % (len(x) + 1)
    parts = []
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        other = nearest64(b.double() * fmt.ulp(a) / 4 * 2.0 ** -(i % 2), fmt)
        parts.append(torch.where(kept > i, -a.double(), other).to(fmt.dtype))
    return renormalize(tuple(parts))


# ---- normal form ----


def every_list(sizes: Tensor, n: int) -> tuple[Tensor, ...]:
    """Every list of n of these numbers."""
    return tuple(grid.reshape(-1) for grid in torch.meshgrid(*([sizes] * n), indexing="ij"))


@pytest.mark.parametrize(("n", "binades"), [(2, 16), (3, 9), (4, 3)])
def test_sweeps_settle_every_short_list_of_three_bit_numbers(n, binades):
    numbers = torch.cat([significands(E5M2, b) for b in range(binades)]) * 2.0**-4
    numbers = torch.cat([torch.zeros(1, dtype=torch.float64), numbers, -numbers])
    check_renormalize(renormalize, E5M2, tuple(c.to(E5M2.dtype) for c in every_list(numbers, n)))


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_any_list_within_reach_is_normalised_and_keeps_its_value(fmt, n):
    """Random order, cancellations, ties and zeros; exponents near enough for float64 to add the list exactly."""
    generator = torch.Generator().manual_seed(n)
    reach = min(52 - fmt.precision - 3, fmt.emax - 3 - fmt.emin)
    low = max(fmt.emin, -reach // 2)
    lists = [random_numbers(fmt, 20000, low, low + reach, generator) for _ in range(n)]
    zero = [torch.rand(20000, generator=generator) < 0.05 for _ in range(n)]
    check_renormalize(
        renormalize, fmt, tuple(c.masked_fill(z, 0).to(fmt.dtype) for c, z in zip(lists, zero, strict=True))
    )


@given(st.lists(st.tuples(*[st.integers(0, 2**16 - 1)] * 4), min_size=1, max_size=16), st.sampled_from(FORMATS))
@settings(max_examples=200)
def test_patterns_at_any_distance_keep_their_value(patterns, fmt):
    for n in (2, 3, 4):
        x = tuple(from_bits([p[i] >> 8 * (2 - min(fmt.bytes, 2)) for p in patterns], fmt.dtype) for i in range(n))
        if fmt == FP32:
            x = tuple(from_bits([p[i] << 16 | p[i] for p in patterns], fmt.dtype) for i in range(n))
        # Sums that overflow on the way are outside the domain.
        inside = sum(c.double().abs() for c in x) <= fmt.max
        x = tuple(c[inside] for c in x)
        got = renormalize(x)
        assert exact_sum(got) == exact_sum(x)
        check_normalized(got, fmt.name)


@pytest.mark.parametrize(**by_name(FP8))
def test_is_normalized_is_the_definition_for_every_fp8_pair(fmt):
    x = pairs(every_finite(fmt), every_finite(fmt))
    assert torch.equal(is_normalized(x), normalized(x, fmt))


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_is_normalized_tells_ties_overlaps_and_gaps(fmt, n):
    def expansion(*values: float) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(v, dtype=torch.float64).to(fmt.dtype) for v in (*values, 0.0, 0.0)[:n])

    u = fmt.unit_roundoff
    assert is_normalized(expansion(1.0, u))
    assert is_normalized(expansion(1.0, -u / 2))
    assert not is_normalized(expansion(1.0 + 2 * u, u))
    assert not is_normalized(expansion(1.0, 2 * u))
    assert not is_normalized(expansion(0.0, 1.0))
    assert is_normalized(expansion(math.nan, 0.0))
    assert not is_normalized(expansion(math.nan, 1.0))
    if fmt.has_inf:
        assert is_normalized(expansion(math.inf, 0.0))
        assert not is_normalized(expansion(math.inf, 1.0))


# ---- conversion ----


def test_the_betas_of_the_paper_come_from_the_exact_double():
    check_betas(from_wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_betas_do_not_depend_on_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    check_betas(from_wide)


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_from_wide_is_as_near_as_stated(fmt, n):
    generator = torch.Generator().manual_seed(n)
    x = (torch.rand(3000, generator=generator, dtype=torch.float64) * 2 - 1) * 2.0 ** torch.randint(
        max(fmt.emin, -40), min(fmt.emax, 40), (3000,), generator=generator
    ).double()
    check_from_wide(from_wide, fmt, n, x)
    check_from_wide(from_wide, fmt, n, x.float())


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_from_wide_normalises_at_ties(fmt, n):
    """hi odd and lo half of its ulp, exactly and after lo is rounded."""
    # All of them up to 11 bits; of float32 every 8,192nd and its odd neighbour.
    leads = significands(fmt, 0)
    if fmt == FP32:
        leads = torch.cat([leads[::8192], leads[1::8192]])
    half = fmt.ulp(leads) / 2
    for x in (leads + half, leads - half / 2, leads + half * (1 - 2.0**-20), leads + half * (1 + 2.0**-20)):
        check_from_wide(from_wide, fmt, n, x)
        check_from_wide(from_wide, fmt, n, -x)


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12), st.sampled_from(FORMATS), st.sampled_from([2, 3, 4])
)
@settings(max_examples=200)
def test_from_wide_takes_any_pattern(patterns, fmt, n):
    x = torch.tensor([p - 2**64 if p >= 2**63 else p for p in patterns], dtype=torch.int64).view(torch.float64)
    check_from_wide(from_wide, fmt, n, x[x.abs() < fmt.max])
    special = from_wide(x, fmt, n)
    assert is_normalized(special).all()


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_a_wide_number_that_fits_comes_back(fmt, n):
    generator = torch.Generator().manual_seed(n)
    x = renormalize(random_expansion(fmt, n, 2000, LOW, HIGH, generator))
    wide = to_wide(x)
    fits = torch.tensor([Fraction(w) == q for w, q in zip(wide.tolist(), exact_sum(x), strict=True)])
    # Three float32 components hold more bits than the float64 that carries their sum.
    assert fits.float().mean() > 0.1
    back = from_wide(wide, fmt, n)
    same = torch.tensor([Fraction(w) == q for w, q in zip(wide.tolist(), exact_sum(back), strict=True)])
    fail_where(fits & ~same, fmt.name, wide, *back)
    if n == 2:
        # A longer expansion with a tie between two neighbours has a second normalised form of the same value.
        for a, b in zip(back, x, strict=True):
            fail_where(fits & ~same_value(a, b), fmt.name, wide, a, b)


@pytest.mark.parametrize("value", [3, -7, 0, 0.1, 1e-30, 2**40])
def test_python_numbers_become_expansions_without_a_shape(value):
    x = from_wide(value, FP32, 3)
    assert [c.shape for c in x] == [()] * 3
    assert to_wide(x).item() == float(value)


@pytest.mark.parametrize(**by_name())
def test_to_wide_of_two_components_is_rounded_once(fmt):
    generator = torch.Generator().manual_seed(8)
    parts = tuple(random_bits_of(fmt, 3000, generator) for _ in range(2))
    keep = torch.isfinite(parts[0].double()) & torch.isfinite(parts[1].double())
    x = tuple(c[keep] for c in parts)
    sums = exact_sum(x)
    assert to_wide(x).tolist() == [float(q) for q in sums]
    single = to_wide(x, torch.float32)
    assert single.dtype == torch.float32
    if fmt != FP32:
        want = torch.tensor([float(q) for q in sums], dtype=torch.float64)
        near = (want.abs() > 0) & (torch.frexp(x[0].double()).exponent - torch.frexp(x[1].double()).exponent).abs().le(
            28
        )
        fail_where(near & (single.double() != nearest64(want, FP32)), fmt.name, want, single)


def test_to_wide_refuses_other_dtypes():
    with pytest.raises(ValueError, match=r"float32 or torch.float64, got torch.bfloat16"):
        to_wide(from_wide(1.0, BF16), torch.bfloat16)


# ---- arithmetic: bounds ----


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_grow_keeps_its_bound(fmt, n):
    x, y = two(fmt, n, 2000, 10 + n)
    check_grow(grow, fmt, x, y[0])
    for distance in (1, fmt.precision - 1, fmt.precision, fmt.precision + 1, 2 * fmt.precision):
        small = nearest64(y[0].double() * 2.0**-distance, fmt).to(fmt.dtype)
        check_grow(grow, fmt, x, small)
    check_grow(grow, fmt, x, (-x[0].double()).to(fmt.dtype))
    check_grow(grow, fmt, tuple(torch.zeros_like(c) for c in x), y[0])


@pytest.mark.parametrize(**by_name(FP8))
def test_grow_keeps_its_bound_for_every_fp8_expansion_and_a_spread_of_numbers(fmt):
    """Every normalised pair beside every number, in float64, where all of it is exact."""
    numbers = every_finite(fmt)
    hi, lo = pairs(numbers, numbers)
    inside = normalized((hi, lo), fmt) & ((hi.double() + lo.double()).abs() <= fmt.max)
    hi, lo = hi[inside], lo[inside]
    for a in numbers[:: 8 if fmt == E5M2 else 6]:
        want = hi.double() + lo.double() + a.double()
        s, e = grow((hi, lo), a)
        error = (s.double() + e.double() - want).abs()
        bad = (error > 2 * fmt.unit_roundoff**2 * want.abs()) & (want.abs() <= fmt.max)
        fail_where(bad, f"grow in {fmt.name} by {a.item()}", hi, lo)
        fail_where(~is_normalized((s, e)), f"grow in {fmt.name} by {a.item()}", hi, lo)


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_add_keeps_its_bound_also_under_cancellation(fmt, n):
    x, y = two(fmt, n, 1500, 20 + n)
    check_add(add, fmt, x, y)
    check_add(add, fmt, x, cancelling(x, y, fmt))
    check_add(add, fmt, x, scale(x, -1.0))
    check_add(add, fmt, x, tuple(torch.zeros_like(c) for c in x))


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_mul_keeps_its_bound(fmt, n):
    x, y = two(fmt, n, 2000, 30 + n)
    check_mul(mul, fmt, x, y)


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_div_keeps_its_bound(fmt, n):
    x, y = two(fmt, n, 1000, 40 + n)
    check_div(div, fmt, x, y)


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_sqrt_keeps_its_bound(fmt, n):
    x, _ = two(fmt, n, 1000, 50 + n)
    check_sqrt(sqrt, fmt, positive(x))


@pytest.mark.parametrize(**by_name([BF16, FP16, FP32]))
def test_bounds_of_two_components_hold_next_to_powers_of_two(fmt):
    """Where the worst errors lie: significands just above 1, lo at half an ulp."""
    leads = 1 + 2 * fmt.unit_roundoff * torch.arange(6, dtype=torch.float64)
    lows = fmt.unit_roundoff * torch.tensor([1.0, -1.0, 1 - 2 * fmt.unit_roundoff, -0.5, 0.75], dtype=torch.float64)
    hi, lo = pairs(leads, lows)
    several = renormalize((hi.to(fmt.dtype), lo.to(fmt.dtype)))
    index = torch.arange(len(hi))
    i, j = pairs(index, index)
    x, y = tuple(c[i] for c in several), tuple(c[j] for c in several)
    for distance in (0, fmt.precision - 1, fmt.precision, fmt.precision + 1):
        for sign in (1.0, -1.0):
            other = scale(y, sign * 2.0**-distance)
            check_add(add, fmt, x, other)
            check_grow(grow, fmt, x, other[0])
            check_mul(mul, fmt, x, other)
            check_div(div, fmt, x, other)
    check_sqrt(sqrt, fmt, several)


@COUNTS
@pytest.mark.parametrize(**by_name([FP16, E4M3FN, E5M2]))
def test_bounds_hold_across_underflow(fmt, n):
    generator = torch.Generator().manual_seed(60 + n)
    low, high = fmt.emin - fmt.precision, 1
    x, y = (renormalize(random_expansion(fmt, n, 1500, max(low, fmt.emin), high, generator)) for _ in range(2))
    check_add(add, fmt, x, y)
    check_mul(mul, fmt, x, y)
    check_sqrt(sqrt, fmt, positive(x))
    quotients = [abs(q / r) < fmt.max / 4 for q, r in zip(exact_sum(x), exact_sum(y), strict=True)]
    keep = torch.tensor(quotients)
    check_div(div, fmt, tuple(c[keep] for c in x), tuple(c[keep] for c in y))


@given(st.integers(0, 2**32 - 1), st.sampled_from(FORMATS), st.sampled_from([2, 3, 4]), st.integers(0, 40))
@settings(max_examples=150)
def test_bounds_hold_for_random_operands_at_random_distances(seed, fmt, n, distance):
    x, y = two(fmt, n, 16, seed)
    y = scale(y, 2.0 ** -min(distance, -fmt.emin // 2))
    check_grow(grow, fmt, x, y[0])
    check_add(add, fmt, x, y)
    check_mul(mul, fmt, x, y)
    check_sqrt(sqrt, fmt, positive(x))
    nonzero = y[0].double().abs() * fmt.max > 64
    check_div(div, fmt, tuple(c[nonzero] for c in x), tuple(c[nonzero] for c in y))


# ---- arithmetic: sequences and exactness ----


@pytest.mark.parametrize(**by_name())
def test_grow_and_mul_are_the_papers_sequences(fmt):
    x, y = two(fmt, 2, 5000, 70)
    s, e = two_sum(x[0], y[0])
    want = fast_two_sum(s, add_rn(x[1], e))
    assert all(same_value(a, b).all() for a, b in zip(grow(x, y[0]), want, strict=True))
    p, e = two_prod(x[0], y[0])
    low = add_rn(add_rn(mul_rn(x[1], y[0]), mul_rn(x[0], y[1])), e)
    want = fast_two_sum(p, low)
    assert all(same_value(a, b).all() for a, b in zip(mul(x, y), want, strict=True))


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_scaling_by_a_power_of_two_is_exact_above_underflow(fmt, n):
    x, _ = two(fmt, n, 1000, 80)
    for factor in (2.0, -0.5, -1.0, 1.0, 0.25):
        got = scale(x, factor)
        check_normalized(got, fmt.name)
        smallest = min(c.double().abs().min().item() for c in x)
        for value, q in zip(exact_sum(got), exact_sum(x), strict=True):
            slack = (
                0
                if smallest * abs(factor) >= fmt.smallest_normal
                else Fraction(n, 2) * Fraction(fmt.smallest_subnormal)
            )
            assert abs(value - q * Fraction(factor)) <= slack


@pytest.mark.parametrize("factor", [3.0, 0.0, 0.1, math.inf, math.nan])
def test_scaling_by_anything_else_is_refused(factor):
    with pytest.raises(ValueError, match="power of two"):
        scale(from_wide(1.0, BF16), factor)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_other_counts_of_components_are_refused(n):
    parts = tuple(torch.ones(1, dtype=torch.bfloat16) for _ in range(n))
    for call in (
        lambda: from_wide(1.0, BF16, n),
        lambda: renormalize(parts),
        lambda: grow(parts, torch.ones(1).bfloat16()),
    ):
        with pytest.raises(ValueError, match=f"2, 3 or 4 components, got {n}"):
            call()


def test_operands_of_different_length_are_refused():
    with pytest.raises(ValueError, match="got 2 and 3"):
        add(from_wide(1.0, BF16, 2), from_wide(1.0, BF16, 3))


@COUNTS
def test_operands_broadcast_and_are_not_written(n):
    x = from_wide(torch.full((3, 1), 1.25), BF16, n)
    y = from_wide(torch.full((4,), 0.3), BF16, n)
    kept = [c.clone() for c in (*x, *y)]
    for result in (grow(x, y[0]), add(x, y), mul(x, y), div(x, y)):
        assert all(c.shape == (3, 4) and c.dtype == torch.bfloat16 for c in result)
    assert all(torch.equal(a, b) for a, b in zip((*x, *y), kept, strict=True))


# ---- specials ----

IEEE = [math.inf, -math.inf, math.nan, 0.0, 1.0, -2.0, 0.1]


@COUNTS
@pytest.mark.parametrize(**by_name([BF16, FP16, FP32, E5M2]))
def test_a_leading_component_that_is_not_finite_stands_alone(fmt, n):
    values = torch.tensor(IEEE, dtype=torch.float64)
    a, b = pairs(values, values)
    x, y = from_wide(a, fmt, n), from_wide(b, fmt, n)
    results = {
        "from_wide": (x, a),
        "grow": (grow(x, y[0]), a + b),
        "add": (add(x, y), a + b),
        "mul": (mul(x, y), a * b),
        "div": (div(x, y), a / b),
        "sqrt": (sqrt(x), torch.sqrt(a)),
        "renormalize": (renormalize(x), a),
    }
    for name, (got, want) in results.items():
        special = ~torch.isfinite(want)
        fail_where(special & ~same_value(to_wide(got), want), f"{name} in {fmt.name}", a, b, *got)
        fail_where(special & (sum(c.double().abs() for c in got[1:]) != 0), f"{name} stands alone", a, b, *got)
        fail_where(~special & ~torch.isfinite(to_wide(got)), f"{name} is finite in {fmt.name}", a, b, *got)


@COUNTS
@pytest.mark.parametrize(**by_name([BF16, FP16, FP32, E5M2]))
def test_overflow_leaves_an_infinity_alone(fmt, n):
    top = from_wide(fmt.max, fmt, n)
    for got in (grow(top, top[0]), add(top, top), mul(top, top), scale(top, 2.0), div(top, from_wide(0.25, fmt, n))):
        assert [c.item() for c in got] == [math.inf] + [0.0] * (n - 1)
    assert to_wide(from_wide(torch.tensor(1e300, dtype=torch.float64), fmt, n)).item() == math.inf


@COUNTS
def test_nan_stands_alone_in_the_saturating_format(n):
    x = from_wide(math.nan, E4M3FN, n)
    one = from_wide(1.0, E4M3FN, n)
    zero = from_wide(0.0, E4M3FN, n)
    for got in (
        x,
        add(x, one),
        mul(one, x),
        div(x, one),
        div(zero, zero),
        sqrt(from_wide(-1.0, E4M3FN, n)),
        grow(one, x[0]),
    ):
        assert got[0].double().isnan()
        assert [c.item() for c in got[1:]] == [0.0] * (n - 1)


def test_saturation_leaves_the_rest_to_the_other_components():
    def values(x: tuple[Tensor, ...]) -> list[float]:
        return [c.item() for c in x]

    assert values(from_wide(1000.0, E4M3FN, 2)) == [448.0, 448.0]
    assert values(from_wide(-1000.0, E4M3FN, 3)) == [-448.0, -448.0, -104.0]
    assert values(from_wide(math.inf, E4M3FN, 4)) == [448.0] * 4
    top = from_wide(448.0, E4M3FN)
    assert values(grow(top, torch.tensor(288.0).to(E4M3FN.dtype))) == [448.0, 288.0]
    assert values(add(top, top)) == [448.0, 448.0]
    assert values(scale(top, 2.0)) == [448.0, 0.0]
    assert is_normalized(add(top, top))


@COUNTS
@pytest.mark.parametrize(**by_name())
def test_zero_has_zero_for_its_root_and_its_products(fmt, n):
    zero, one = from_wide(0.0, fmt, n), from_wide(1.5, fmt, n)
    for got in (sqrt(zero), mul(zero, one), div(zero, one), add(zero, zero), grow(zero, zero[0])):
        assert [c.item() for c in got] == [0.0] * n


def test_exact_quotients_and_roots_are_exact():
    for fmt in FORMATS:
        x = from_wide(torch.tensor([6.0, 2.25, 1.0, 9.0]), fmt)
        assert to_wide(sqrt(mul(x, x))).tolist() == [6.0, 2.25, 1.0, 9.0]
        assert exact(to_wide(div(x, x))) == [1, 1, 1, 1]

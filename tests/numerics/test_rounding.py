"""Rounding into every format: critical values, all bit patterns, all draws, and random patterns against rationals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_checks import check_nearest, check_nearest_rational, check_stochastic, check_unbiased, fail_where
from numerics_oracle import (
    by_name,
    every,
    every_finite,
    exact,
    from_bits,
    nearest,
    nearest64,
    random_bits_of,
    same,
    same_value,
)

from collage.numerics import (
    BF16,
    E4M3FN,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    Format,
    is_representable,
    round_into,
    round_nearest,
    round_stochastic,
    round_stochastic_into,
    round_ties_away,
)

SMALL = [BF16, FP16, E4M3FN, E5M2]


def critical(fmt: Format) -> torch.Tensor:
    """float64: what finfo names, its neighbours, the points halfway, and just beside those (double-rounding traps)."""
    u, eta, normal = fmt.unit_roundoff, fmt.smallest_subnormal, fmt.smallest_normal
    numbers = [0.0, eta, 2 * eta, 3 * eta, normal - eta, normal, normal + eta, 1.0, 1 + 2 * u, 1 + 4 * u, 2 - 2 * u]
    numbers += [2.0, 3.0, fmt.max / 2, fmt.max - float(fmt.ulp(torch.tensor(fmt.max, dtype=torch.float64))), fmt.max]
    points = []
    for x in numbers:
        half = float(fmt.ulp(torch.tensor(x, dtype=torch.float64))) / 2
        for y in (x, x + half, x - half / 2, x + half / 2):
            points += [y, math.nextafter(y, math.inf), math.nextafter(y, -math.inf)]
            points += [y * (1 + 2.0**-30), y * (1 - 2.0**-30)]
    points += [5e-324, 1e-320, 2.0**-1022, 1e300, 1.7976931348623157e308, fmt.max * 1.5, fmt.max * 2]
    x = torch.tensor(points, dtype=torch.float64)
    return torch.cat([x, -x])


def between(fmt: Format) -> torch.Tensor:
    """float64: every finite number of a small format, every point halfway, and the float64 neighbours of those."""
    numbers = every_finite(fmt).double()
    numbers = numbers[numbers >= 0]
    half = numbers + fmt.ulp(numbers) / 2
    up, down = torch.tensor(math.inf, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    x = torch.cat([numbers, half, torch.nextafter(half, up), torch.nextafter(half, down)])
    return torch.cat([x, -x])


@pytest.mark.parametrize(**by_name())
def test_critical_values_round_to_the_nearest_even(fmt):
    check_nearest(round_nearest, fmt, critical(fmt))
    check_nearest_rational(round_nearest, fmt, critical(fmt))
    check_nearest_rational(round_nearest, fmt, critical(fmt).float()[critical(fmt).float().isfinite()])


@pytest.mark.parametrize(**by_name(SMALL))
def test_every_number_every_tie_and_its_neighbours_round_to_the_nearest_even(fmt):
    check_nearest(round_nearest, fmt, between(fmt))
    narrow = between(fmt).float()
    for x in (narrow, torch.nextafter(narrow, torch.tensor(math.inf)), torch.nextafter(narrow, torch.tensor(0.0))):
        check_nearest(round_nearest, fmt, x)


@pytest.mark.parametrize(**by_name())
@pytest.mark.parametrize("source", SMALL, ids=lambda fmt: fmt.name)
def test_every_pattern_of_a_small_format_rounds_into_every_format(fmt, source):
    for wide in (torch.float32, torch.float64):
        check_nearest(round_nearest, fmt, every(source).to(wide))


@pytest.mark.parametrize(**by_name(SMALL))
def test_numbers_of_the_format_round_to_themselves_in_every_way(fmt):
    x = every(fmt)
    bits = torch.full(x.shape, 2**16 - 1, dtype=torch.int32)
    for got in (
        round_nearest(x.float(), fmt),
        round_ties_away(x.double(), fmt),
        round_stochastic(x.float(), fmt, bits),
    ):
        fail_where(~same(got, x), fmt.name, x, got)


@pytest.mark.parametrize(**by_name())
def test_nan_and_infinities_follow_the_policy(fmt):
    top = fmt.max if fmt.saturates else math.inf
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        bits = torch.full((3,), 2**16 - 1, dtype=torch.int32)
        for got in (round_nearest(x, fmt), round_ties_away(x, fmt), round_stochastic(x, fmt, bits)):
            assert got[0].double().isnan()
            assert got[1:].double().tolist() == [top, -top]


PATTERNS64 = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12)
PATTERNS32 = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12)


def doubles(patterns: list[int]) -> torch.Tensor:
    """The float64 numbers with these bits."""
    return torch.tensor([p - 2**64 if p >= 2**63 else p for p in patterns], dtype=torch.int64).view(torch.float64)


def check_directions(fmt: Format, x: torch.Tensor) -> None:
    """All three roundings of finite numbers against the rationals."""
    check_nearest_rational(round_nearest, fmt, x)
    for value, away in zip(exact(x), round_ties_away(x, fmt).double().tolist(), strict=True):
        assert away == nearest_away(value, fmt)
    bits = torch.arange(len(x), dtype=torch.int32) * 7919 % 2**16
    got = round_stochastic(x, fmt, bits).double().tolist()
    for value, r, rounded in zip(exact(x), bits.tolist(), got, strict=True):
        spacing = exact(fmt.ulp(torch.tensor(float(value), dtype=torch.float64)))[0]
        steps = math.floor(abs(value) / spacing + Fraction(r, 2**16))
        assert rounded == nearest(steps * spacing * (-1 if value < 0 else 1), fmt)


def nearest_away(q: Fraction, fmt: Format) -> float:
    """To nearest with ties away from zero, by integer arithmetic."""
    spacing = exact(fmt.ulp(torch.tensor(float(q), dtype=torch.float64)))[0]
    steps = math.floor(abs(q) / spacing + Fraction(1, 2))
    return nearest(steps * spacing * (-1 if q < 0 else 1), fmt)


@given(PATTERNS64)
@settings(max_examples=150, derandomize=True)
def test_float64_patterns_obey_the_rationals(patterns):
    x = doubles(patterns)
    for fmt in FORMATS:
        check_directions(fmt, x[torch.isfinite(x)])


@given(PATTERNS32)
@settings(max_examples=150, derandomize=True)
def test_float32_patterns_obey_the_rationals(patterns):
    x = from_bits(patterns, torch.float32)
    for fmt in FORMATS:
        check_directions(fmt, x[torch.isfinite(x)])


@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**37 - 1)), min_size=1, max_size=12))
@settings(max_examples=150, derandomize=True)
def test_float64_numbers_in_the_formats_range_obey_the_rationals(parts):
    """Random patterns seldom fall in a small format's range: a number of the format with random lower bits does."""
    for fmt in FORMATS:
        lead = from_bits([p >> (16 - 8 * min(fmt.bytes, 2)) << 8 * max(fmt.bytes - 2, 0) for p, _ in parts], fmt.dtype)
        tail = torch.tensor([t / 2**37 for _, t in parts], dtype=torch.float64)
        x = lead.double() + tail * torch.nan_to_num(fmt.ulp(lead))
        check_directions(fmt, x[torch.isfinite(x)])


@pytest.mark.parametrize(**by_name())
def test_critical_values_round_away_and_stochastically_as_the_rationals_say(fmt):
    check_directions(fmt, critical(fmt))


CHOSEN = [1.0, 1.3, -1.7, 2 / 3, 0.1, 1 + 2.0**-12, 1 + 2.0**-16, 1 + 2.0**-23, 1.999999, 3e-5, 2e-8]


@pytest.mark.parametrize(**by_name())
@pytest.mark.parametrize("x", CHOSEN)
def test_all_draws_round_up_as_often_as_the_fraction_says(fmt, x):
    check_stochastic(round_stochastic, fmt, x)


@pytest.mark.parametrize(**by_name(SMALL))
def test_all_draws_are_right_at_the_ends_of_the_range(fmt):
    top, eta, normal = fmt.max, fmt.smallest_subnormal, fmt.smallest_normal
    step = float(fmt.ulp(torch.tensor(top, dtype=torch.float64)))
    for x in (top, top + step / 4, top + step * 0.75, 2 * top, eta / 3, -eta * 0.6, normal - eta / 5, normal + eta / 7):
        check_stochastic(round_stochastic, fmt, x)


@pytest.mark.parametrize(**by_name())
def test_the_mean_over_all_draws_is_exact_within_sixteen_bits(fmt):
    q = 2.0 ** (1 - fmt.precision)
    for k in (0, 1, 2, 3, 1000, 2**15, 2**15 + 1, 2**16 - 1):
        for lead in (1.0, 1 + q, 2 - q, -1.0, -1.5):
            check_unbiased(round_stochastic, fmt, lead + math.copysign(q * k / 2**16, lead))


def test_float32_to_bfloat16_is_exactly_unbiased():
    for x in torch.tensor([0.1, 1 / 3, -2.7182817, 1e-20, 7e37]).tolist():
        check_unbiased(round_stochastic, BF16, x)


@pytest.mark.parametrize(**by_name())
def test_the_mean_elsewhere_is_within_two_to_the_minus_sixteen_of_a_spacing(fmt):
    for x in (0.1, math.pi, 1 / 3):
        got = round_stochastic(
            torch.full((2**16,), x, dtype=torch.float64), fmt, torch.arange(2**16, dtype=torch.int32)
        )
        spacing = fmt.ulp(torch.tensor(x, dtype=torch.float64)).item()
        # The sum of 2**16 numbers of one binade is exact in float64.
        assert abs(got.double().sum().item() / 2**16 - x) <= 2.0**-16 * spacing


@pytest.mark.parametrize(**by_name(SMALL))
def test_ties_go_away_from_zero(fmt):
    numbers = every_finite(fmt).double()
    half = fmt.ulp(numbers) / 2
    away = torch.where(torch.signbit(numbers), -half, half)
    want = nearest64(numbers + 2 * away, fmt)
    got = round_ties_away(numbers + away, fmt)
    # Beside the tie it rounds as round_nearest does.
    fail_where(~same_value(got, want), fmt.name, numbers, got)
    for factor in (0.5, 1.5):
        x = numbers + factor * away
        fail_where(~same_value(round_ties_away(x, fmt), nearest64(x, fmt)), fmt.name, x)


@pytest.mark.parametrize(**by_name())
def test_torchs_own_cast_of_float32_agrees_where_it_does_not_saturate(fmt):
    x = torch.cat([critical(fmt).float(), random_bits_of(FP32, 100_000, torch.Generator().manual_seed(4))])
    if fmt.saturates:
        x = x[x.abs() <= fmt.max]
    fail_where(~same(x.to(fmt.dtype), round_nearest(x, fmt)), fmt.name, x)


def test_torchs_own_cast_of_float64_rounds_twice():
    """The reason for rounding to odd: if this fails, torch has changed and the detour may go."""
    trap = torch.tensor(1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    assert trap.to(torch.bfloat16).item() == 1.0
    assert round_nearest(trap, BF16).item() == 1 + 2.0**-7


@pytest.mark.parametrize(**by_name())
def test_rounding_refuses_what_is_not_wide(fmt):
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        x = torch.ones(2, dtype=dtype)
        for rounding in (round_nearest, round_ties_away):
            with pytest.raises(TypeError, match="float32 or float64"):
                rounding(x, fmt)
        with pytest.raises(TypeError, match="float32 or float64"):
            round_stochastic(x, fmt, torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize(**by_name())
def test_is_representable_says_which_numbers_the_format_has(fmt):
    x = critical(fmt)
    want = torch.tensor([nearest(q, fmt) == float(q) for q in exact(x)])
    assert (is_representable(x, fmt) == want).all()
    special = torch.tensor([math.nan, math.inf, -math.inf])
    assert is_representable(special, fmt).tolist() == [True, fmt.has_inf, fmt.has_inf]


@pytest.mark.parametrize(**by_name())
def test_rounding_into_a_tensor_is_round_nearest(fmt):
    generator = torch.Generator().manual_seed(5)
    x = torch.cat([critical(fmt).float(), random_bits_of(FP32, 50_000, generator)])
    kept, out = x.clone(), torch.empty(x.shape, dtype=fmt.dtype)
    assert round_into(x, out) is out
    assert same(x, kept).all()
    fail_where(~same(out, round_nearest(kept, fmt)), fmt.name, kept)


@pytest.mark.parametrize(**by_name())
def test_rounding_stochastically_into_a_tensor_is_round_stochastic(fmt):
    generator = torch.Generator().manual_seed(6)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    nans = from_bits([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], torch.float32)
    random = random_bits_of(FP32, 50_000, generator)
    x = torch.cat([special, nans, critical(fmt).float(), random])
    for draw in (0, 1, 2**15, 2**16 - 1, None):
        bits = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32)
        bits = bits if draw is None else torch.full_like(bits, draw)
        out = torch.empty(x.shape, dtype=fmt.dtype)
        round_stochastic_into(x.clone(), out, bits, torch.empty_like(x))
        fail_where(~same(out, round_stochastic(x, fmt, bits)), fmt.name, x, bits, out)


def test_shapes_are_kept():
    for shape in ((), (0,), (2, 3), (1, 0, 4)):
        x, bits = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
        for got in (round_nearest(x, BF16), round_ties_away(x, FP32), round_stochastic(x, E4M3FN, bits)):
            assert got.shape == shape

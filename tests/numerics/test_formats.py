"""The records of the formats against torch.finfo and exact rationals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from numerics_oracle import by_name, every, exponent, from_bits

from collage.numerics import BF16, E4M3FN, E5M2, FORMATS, FP16, FP32, Format, format_of


@pytest.mark.parametrize(**by_name())
def test_derived_values_equal_those_of_torch(fmt):
    info = torch.finfo(fmt.dtype)
    assert fmt.max == info.max
    assert fmt.smallest_normal == info.smallest_normal
    assert fmt.unit_roundoff == info.eps / 2
    assert fmt.bytes * 8 == info.bits


@pytest.mark.parametrize(**by_name())
def test_the_smallest_patterns_are_the_smallest_numbers(fmt):
    smallest, first_normal = from_bits([1, 2 ** (fmt.precision - 1)], fmt.dtype).double().tolist()
    assert smallest == fmt.smallest_subnormal
    assert first_normal == fmt.smallest_normal


@pytest.mark.parametrize(**by_name())
def test_the_largest_binade_is_emax(fmt):
    assert 2.0**fmt.emax <= fmt.max < 2.0 ** (fmt.emax + 1)


@pytest.mark.parametrize(**by_name([BF16, FP16, E4M3FN, E5M2]))
def test_has_inf_says_whether_a_pattern_is_infinite(fmt):
    numbers = every(fmt).double()
    assert torch.isinf(numbers).any().item() == fmt.has_inf == (not fmt.saturates)
    assert numbers[torch.isfinite(numbers)].max() == fmt.max


@pytest.mark.parametrize(**by_name())
def test_wide_has_room_for_one_operation(fmt):
    """Figueroa: 2p + 2 bits make the second rounding innocent; twice the exponents hold every product but the
    smallest of bfloat16, whose residuals are zero (test_eft)."""
    bits = {torch.float32: 24, torch.float64: 53}[fmt.wide]
    assert bits >= 2 * fmt.precision + 2


@pytest.mark.parametrize(**by_name())
def test_ulp_is_exact_in_every_binade_of_float64(fmt):
    points = []
    for e in range(-1074, 1024):
        ends = (2.0**e, math.nextafter(2.0 ** (e + 1) if e < 1023 else math.inf, 0))
        points += [ends[0], -ends[0], ends[1], -ends[1]]
    spacings = fmt.ulp(torch.tensor(points, dtype=torch.float64)).tolist()
    for x, spacing in zip(points, spacings, strict=True):
        want = Fraction(2) ** (max(exponent(Fraction(x)), fmt.emin) - fmt.precision + 1)
        assert Fraction(spacing) == want, x


@pytest.mark.parametrize(**by_name([BF16, FP16, E4M3FN, E5M2]))
def test_ulp_is_the_distance_to_the_next_number(fmt):
    numbers = every(fmt)[: 2 ** (8 * fmt.bytes - 1)].double()
    here, following = numbers[:-1], numbers[1:]
    finite = torch.isfinite(here) & torch.isfinite(following)
    assert (fmt.ulp(here)[finite] == (following - here)[finite]).all()


@pytest.mark.parametrize(**by_name())
def test_ulp_of_zero_is_the_smallest_subnormal_and_of_nan_and_infinity_nan(fmt):
    x = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf], dtype=torch.float32)
    assert fmt.ulp(x)[:2].tolist() == [fmt.smallest_subnormal] * 2
    assert fmt.ulp(x)[2:].isnan().all()
    assert fmt.ulp(x).dtype == torch.float64


@pytest.mark.parametrize(**by_name())
def test_ulp_takes_any_floating_dtype(fmt):
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float32, torch.float64):
        assert fmt.ulp(torch.tensor(1.5).to(dtype)).item() == 2.0 ** (1 - fmt.precision)


@pytest.mark.parametrize(**by_name())
def test_a_format_is_found_by_itself_its_name_its_dtype_and_a_tensor(fmt):
    for kind in (fmt, fmt.name, fmt.dtype, torch.zeros(2).to(fmt.dtype)):
        assert format_of(kind) is fmt


@pytest.mark.parametrize("kind", ["bfloat", torch.float64, torch.int8, torch.zeros(1, dtype=torch.int32)])
def test_an_unknown_format_is_refused_with_the_known_ones(kind):
    with pytest.raises(ValueError, match=r"allowed: bf16 \(torch.bfloat16\), fp16") as error:
        format_of(kind)
    assert all(fmt.name in str(error.value) for fmt in FORMATS)


def test_formats_are_values():
    assert Format(**{name: getattr(FP32, name) for name in FP32.__dataclass_fields__}) == FP32
    assert len(set(FORMATS)) == 5

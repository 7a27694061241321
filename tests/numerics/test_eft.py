"""Error-free transforms in the 8-bit formats and bfloat16, by enumeration, and float32 on random patterns.

Scaling both operands by powers of two scales every intermediate result alike as long as nothing leaves the normal
range, so all significand pairs at every difference of exponents, at one place of the range, stand for the whole
range; beyond p + 2 binades the smaller operand is the residual, and larger differences behave as p + 3. The ends of
the range are enumerated by themselves.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_checks import check_product, check_root, check_split, check_sum, check_sum_rational, fail_where
from numerics_oracle import (
    FP8,
    by_name,
    every,
    every_finite,
    exact,
    from_bits,
    nearest,
    nearest64,
    pairs,
    random_bits_of,
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
    add_rn,
    div_rn,
    fast_two_sum,
    mul_rn,
    split,
    sqrt_rn,
    sub_rn,
    two_prod,
    two_sum,
)

OPERATIONS = {
    "add": (add_rn, lambda a, b: a + b),
    "sub": (sub_rn, lambda a, b: a - b),
    "mul": (mul_rn, lambda a, b: a * b),
    "div": (div_rn, lambda a, b: a / b),
}


def in_order(a: Tensor, b: Tensor) -> Tensor:
    """The domain of fast_two_sum."""
    a, b = a.double(), b.double()
    return (a == 0) | (b == 0) | (torch.frexp(a).exponent >= torch.frexp(b).exponent)


def special(name: str, a: float, b: float, fmt: Format) -> float:
    """IEEE 754's answer where an operand is not finite or the divisor is zero, with the format's overflow."""
    wide_a, wide_b = torch.tensor([a, b], dtype=torch.float64)
    value = OPERATIONS[name][1](wide_a, wide_b).item()
    return math.copysign(fmt.max, value) if math.isinf(value) and fmt.saturates else value


@pytest.mark.parametrize(**by_name(FP8))
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_fp8_pair_rounds_the_exact_rational_once(fmt, name):
    operation, rational = OPERATIONS[name]
    numbers = every(fmt)
    a, b = pairs(numbers, numbers)
    values = [Fraction(v) if math.isfinite(v) else None for v in numbers.double().tolist()]
    floats = numbers.double().tolist()
    want = []
    for i, p in enumerate(values):
        for j, q in enumerate(values):
            ordinary = p is not None and q is not None and not (name == "div" and q == 0)
            want.append(nearest(rational(p, q), fmt) if ordinary else special(name, floats[i], floats[j], fmt))
    got = operation(a, b)
    assert got.dtype == fmt.dtype
    fail_where(~same_value(got, torch.tensor(want, dtype=torch.float64)), f"{name} in {fmt.name}", a, b, got)


@pytest.mark.parametrize(**by_name(FP8))
def test_every_fp8_pair_sums_exactly(fmt):
    a, b = pairs(every_finite(fmt), every_finite(fmt))
    check_sum(two_sum, fmt, a, b)
    ordered = in_order(a, b)
    check_sum(fast_two_sum, fmt, a[ordered], b[ordered])


@pytest.mark.parametrize(**by_name(FP8))
def test_every_fp8_pair_multiplies_exactly(fmt):
    check_product(two_prod, fmt, *pairs(every_finite(fmt), every_finite(fmt)))


@pytest.mark.parametrize(**by_name([E4M3FN, E5M2, BF16, FP16]))
def test_every_number_splits_and_has_a_rounded_root(fmt):
    numbers = every_finite(fmt)
    factor = 2.0 ** ((fmt.precision + 1) // 2) + 1
    check_split(split, fmt, numbers[numbers.double().abs() * factor <= fmt.max])
    check_root(sqrt_rn, fmt, numbers[numbers.double() > 0])


@pytest.mark.parametrize(**by_name([E4M3FN, E5M2, BF16, FP16]))
def test_roots_of_zeros_infinities_and_negatives_are_ieee(fmt):
    numbers = every(fmt)
    wide = numbers.double()
    outside = ~(torch.isfinite(wide) & (wide > 0))
    fail_where(outside & ~same_value(sqrt_rn(numbers), torch.sqrt(wide)), f"special roots in {fmt.name}", numbers)


def test_every_fp32_significand_has_a_rounded_root():
    """All 2**24 significands (two binades: even and odd exponents), in pieces. The root scales by 2 per 4."""
    for start in range(0x3F800000, 0x40800000, 2**21):
        check_root(sqrt_rn, FP32, torch.arange(start, start + 2**21, dtype=torch.int32).view(torch.float32))


def test_fp32_roots_are_right_at_the_ends_of_the_range():
    tiny = torch.arange(1, 2**16, dtype=torch.int32).view(torch.float32)
    largest = torch.arange(0x7F7F0000, 0x7F800000, dtype=torch.int32).view(torch.float32)
    check_root(sqrt_rn, FP32, tiny)
    check_root(sqrt_rn, FP32, largest)


GAPS = [*range(-12, 13), -40, -20, 20, 40]


@pytest.mark.parametrize("sign", [1, -1])
def test_every_bf16_significand_pair_sums_exactly_at_every_gap(sign):
    for gap in GAPS:
        a, b = pairs(significands(BF16, 0), sign * significands(BF16, gap))
        a, b = a.bfloat16(), b.bfloat16()
        check_sum(two_sum, BF16, a, b)
        if gap <= 0:
            check_sum(fast_two_sum, BF16, a, b)


def test_bf16_sums_are_exact_among_subnormals():
    near_zero = every_finite(BF16)
    near_zero = near_zero[near_zero.double().abs() < BF16.smallest_normal * 4]
    a, b = pairs(near_zero, near_zero)
    check_sum(two_sum, BF16, a, b)
    ordered = in_order(a, b)
    check_sum(fast_two_sum, BF16, a[ordered], b[ordered])


def test_bf16_sums_are_exact_up_to_overflow_and_infinite_beyond():
    numbers = every_finite(BF16)
    huge = numbers[numbers.double().abs() >= 2.0 ** (BF16.emax - 1)]
    large = numbers[numbers.double().abs() >= 2.0 ** (BF16.emax - 11)]
    for a, b in (pairs(huge, large), pairs(large, huge)):
        check_sum(two_sum, BF16, a, b)
        ordered = in_order(a, b)
        check_sum(fast_two_sum, BF16, a[ordered], b[ordered])


@pytest.mark.parametrize("place", [0, *range(BF16.emin - 12, BF16.emin + 12), BF16.emax - 1, BF16.emax])
def test_every_bf16_significand_pair_multiplies_as_stated(place):
    """``place`` is the sum of the exponents: the middle, across the underflow of the residual, and at overflow."""
    a, b = pairs(significands(BF16, place // 2), significands(BF16, place - place // 2))
    check_product(two_prod, BF16, a.bfloat16(), b.bfloat16())
    check_product(two_prod, BF16, -a.bfloat16(), b.bfloat16())


def test_bf16_products_with_subnormals_are_as_stated():
    numbers = every_finite(BF16)
    small = numbers[numbers.double().abs() < BF16.smallest_normal * 2]
    for power in (-1, 0, 1, 3, 8, 60, 126):
        check_product(two_prod, BF16, *pairs(small, significands(BF16, power).bfloat16()))


@pytest.mark.parametrize(**by_name())
def test_random_patterns_sum_and_multiply_as_stated(fmt):
    generator = torch.Generator().manual_seed(1)
    a, b = (random_bits_of(fmt, 6000, generator) for _ in range(2))
    finite = torch.isfinite(a.double()) & torch.isfinite(b.double())
    a, b = a[finite], b[finite]
    check_sum_rational(two_sum, fmt, a, b)
    check_product(two_prod, fmt, a, b)
    factor = 2.0 ** ((fmt.precision + 1) // 2) + 1
    check_split(split, fmt, a[a.double().abs() * factor <= fmt.max])
    ordered = in_order(a, b)
    check_sum_rational(fast_two_sum, fmt, a[ordered], b[ordered])


@pytest.mark.parametrize("sign", [1, -1])
def test_fp32_sums_are_exact_at_every_gap(sign):
    generator = torch.Generator().manual_seed(2)
    patterns = torch.randint(2**23, (2, 20000), generator=generator)
    edges = torch.tensor([0, 1, 2, 2**22, 2**23 - 2, 2**23 - 1])
    patterns[:, :6] = edges
    for gap in range(-28, 29):
        a = (patterns[0] + (127 << 23)).to(torch.int32).view(torch.float32)
        b = (patterns[1].roll(gap) + ((127 + gap) << 23)).to(torch.int32).view(torch.float32) * sign
        check_sum(two_sum, FP32, a, b)
        if gap <= 0:
            check_sum(fast_two_sum, FP32, a, b)


@given(st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), min_size=1, max_size=20))
@settings(max_examples=200, derandomize=True)
def test_fp32_patterns_obey_the_rationals(patterns):
    a, b = (from_bits([p[i] for p in patterns], torch.float32) for i in range(2))
    finite = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[finite], b[finite]
    check_sum_rational(two_sum, FP32, a, b)
    check_product(two_prod, FP32, a, b)
    for operation, rational in OPERATIONS.values():
        defined = (b != 0) | (operation is not div_rn)
        x, y = a[defined], b[defined]
        want = [nearest(rational(p, q), FP32) for p, q in zip(exact(x), exact(y), strict=True)]
        assert operation(x, y).tolist() == want


@pytest.mark.parametrize(**by_name([BF16, FP16]))
def test_16_bit_quotients_and_products_are_rounded_once(fmt):
    """Against exact rationals, underflow included, where a second rounding would show."""
    generator = torch.Generator().manual_seed(3)
    a, b = (random_bits_of(fmt, 6000, generator) for _ in range(2))
    a[::3] = from_bits(torch.randint(2**fmt.precision, (2000,), generator=generator), fmt.dtype)
    usable = torch.isfinite(a.double()) & torch.isfinite(b.double()) & (b.double() != 0)
    a, b = a[usable], b[usable]
    for operation, rational in OPERATIONS.values():
        want = [nearest(rational(p, q), fmt) for p, q in zip(exact(a), exact(b), strict=True)]
        fail_where(~same_value(operation(a, b), torch.tensor(want, dtype=torch.float64)), fmt.name, a, b)


@pytest.mark.parametrize(**by_name())
def test_residual_of_a_result_that_is_not_finite_is_zero(fmt):
    values = [math.inf, -math.inf, math.nan, fmt.max, 1.0, 0.0]
    numbers = torch.tensor([v for v in values if fmt.has_inf or not math.isinf(v)], dtype=torch.float64)
    a, b = pairs(numbers, numbers)
    a, b = a.to(fmt.dtype), b.to(fmt.dtype)
    for transform in (two_sum, fast_two_sum, two_prod):
        leading, e = transform(a, b)
        fail_where(~torch.isfinite(leading.double()) & (e.double() != 0), transform.__name__, a, b, leading, e)


def test_a_saturated_sum_keeps_what_is_left():
    s, e = two_sum(torch.tensor(448.0).to(torch.float8_e4m3fn), torch.tensor(288.0).to(torch.float8_e4m3fn))
    assert (s.item(), e.item()) == (448.0, 288.0)


def test_operands_broadcast_and_are_not_written():
    a, b = torch.ones(3, 1, dtype=torch.bfloat16), torch.full((4,), 2.0**-10, dtype=torch.bfloat16)
    for transform in (two_sum, fast_two_sum, two_prod):
        for part in transform(a, b):
            assert part.shape == (3, 4)
    assert (a == 1).all()
    assert (b == 2.0**-10).all()


def test_operands_of_two_formats_are_refused():
    with pytest.raises(TypeError, match=r"one format, got torch.bfloat16, torch.float16"):
        two_sum(torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float16))


def test_operands_of_no_format_are_refused():
    with pytest.raises(ValueError, match=r"torch.float64 is not a format"):
        add_rn(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(**by_name())
def test_the_float64_oracle_agrees_with_the_rationals(fmt):
    generator = torch.Generator().manual_seed(4)
    a, b = (random_bits_of(fmt, 3000, generator).double() for _ in range(2))
    x = torch.cat([a + b, a * b, a / b])
    x = x[torch.isfinite(x)]
    want = torch.tensor([nearest(q, fmt) for q in exact(x)], dtype=torch.float64)
    fail_where(~same_value(nearest64(x, fmt), want), f"oracle in {fmt.name}", x)


def test_formats_are_all_covered():
    assert {fmt.name for fmt in FORMATS} == {"bf16", "fp16", "fp32", "e4m3fn", "e5m2"}

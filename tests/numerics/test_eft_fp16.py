"""Error-free transforms in float16: every significand pair at every difference of exponents that matters.

Scaling invariance is as in test_eft.py. One call handles 2**20 pairs, so that memory stays far below 1 GB.
"""

from __future__ import annotations

import pytest
import torch
from numerics_checks import check_product, check_sum
from numerics_oracle import every_finite, pairs, significands

from collage.numerics import FP16, fast_two_sum, two_prod, two_sum

# From 13 = p + 2 binades on the smaller operand is the residual.
GAPS = [*range(-14, 15), -20, 20]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("gap", GAPS)
def test_every_fp16_significand_pair_sums_exactly(gap, sign):
    # The larger binade is 13, so that neither operand nor the sum leaves the normal range.
    place = 13 - max(gap, 0)
    a, b = pairs(significands(FP16, place), sign * significands(FP16, place + gap))
    a, b = a.half(), b.half()
    check_sum(two_sum, FP16, a, b)
    if gap <= 0:
        check_sum(fast_two_sum, FP16, a, b)


@pytest.mark.parametrize("place", [4, *range(FP16.emin - 13, FP16.emin + 12), 14, 15])
def test_every_fp16_significand_pair_multiplies_as_stated(place):
    """``place`` is the sum of the exponents: the middle, across the underflow of the residual, and at overflow."""
    a, b = pairs(significands(FP16, place // 2), significands(FP16, place - place // 2))
    check_product(two_prod, FP16, a.half(), -b.half())


def test_fp16_sums_are_exact_among_subnormals():
    numbers = every_finite(FP16)
    small = numbers[numbers.double().abs() < FP16.smallest_normal * 4]
    some = small[torch.randperm(len(small), generator=torch.Generator().manual_seed(0))[:300]]
    check_sum(two_sum, FP16, *pairs(small, some))
    check_sum(two_sum, FP16, *pairs(some, small))


def test_fp16_sums_are_exact_up_to_overflow_and_infinite_beyond():
    numbers = every_finite(FP16)
    huge = numbers[numbers.double().abs() >= 2.0**14]
    large = numbers[numbers.double().abs() >= 2.0**2]
    edges = torch.tensor([FP16.max, FP16.max - 32, 2.0**15, 2.0**15 + 32, -FP16.max]).half()
    some = huge[torch.randperm(len(huge), generator=torch.Generator().manual_seed(0))[:60]]
    some = torch.cat([edges, some])
    check_sum(two_sum, FP16, *pairs(some, large))
    check_sum(two_sum, FP16, *pairs(large, some))


def test_fp16_products_with_subnormals_are_as_stated():
    numbers = every_finite(FP16)
    small = numbers[numbers.double().abs() < FP16.smallest_normal]
    for power in (-3, 0, 1, 9, 14):
        check_product(two_prod, FP16, *pairs(small[::7], significands(FP16, power).half()))

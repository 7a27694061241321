"""Broken variants fail the very checks that the real functions pass."""

from __future__ import annotations

import pytest
import torch
from numerics_checks import (
    check_betas,
    check_grow,
    check_mul,
    check_nearest,
    check_product,
    check_sum,
    check_unbiased,
)
from numerics_oracle import every_finite, pairs, random_expansion
from torch import Tensor

from collage.numerics import (
    BF16,
    E4M3FN,
    add_rn,
    fast_two_sum,
    from_wide,
    grow,
    mul,
    mul_rn,
    round_nearest,
    round_stochastic,
    sub_rn,
    two_prod,
    two_sum,
)


def truncated(x: Tensor, fmt):
    bits = x.to(torch.float32).view(torch.int32) & -65536
    return bits.view(torch.float32).to(fmt.dtype)


def no_residual(a, b):
    return add_rn(a, b), torch.zeros_like(a)


def swapped(a, b):
    return fast_two_sum(b, a)


def old_hi_lost(x, y):
    """The released code's product: hi is overwritten before the error term reads it."""
    p, e = two_prod(x[0], y[0])
    lo = add_rn(add_rn(mul_rn(x[1], y[0]), mul_rn(p, y[1])), e)
    return fast_two_sum(p, lo)


def careless_grow(x, a):
    s, e = fast_two_sum(x[0], a)
    return fast_two_sum(s, add_rn(x[1], e))


def beta_against_float32(value, fmt, n=2):
    hi = round_nearest(torch.tensor(value, dtype=torch.float64), fmt)
    lo = torch.tensor(value, dtype=torch.float32) - torch.tensor(value, dtype=torch.float64).float()
    return hi, lo.to(fmt.dtype)


def no_product_error(a, b):
    p = mul_rn(a, b)
    return p, sub_rn(p, p)


FP8_PAIRS = pairs(every_finite(E4M3FN), every_finite(E4M3FN))
TIES = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40, 1.00390625, -1.01171875], dtype=torch.float64)


def expansions(seed: int):
    return random_expansion(BF16, 2, 4000, -8, 8, torch.Generator().manual_seed(seed))


def ordered_pairs():
    a, b = FP8_PAIRS
    keep = a.float().abs() >= b.float().abs()
    return a[keep], b[keep]


def wide_addend():
    x = expansions(1)
    return x, (x[0].double() * 64).to(torch.bfloat16)


CHECKS = {
    "a dropped residual": (two_sum, no_residual, lambda op: check_sum(op, E4M3FN, *FP8_PAIRS)),
    "swapped operands": (fast_two_sum, swapped, lambda op: check_sum(op, E4M3FN, *ordered_pairs())),
    "fast_two_sum outside its domain": (two_sum, fast_two_sum, lambda op: check_sum(op, E4M3FN, *FP8_PAIRS)),
    "a product without its error": (two_prod, no_product_error, lambda op: check_product(op, E4M3FN, *FP8_PAIRS)),
    "truncation": (round_nearest, truncated, lambda op: check_nearest(op, BF16, TIES)),
    "two roundings": (
        round_nearest,
        lambda x, fmt: x.to(torch.float32).to(fmt.dtype),
        lambda op: check_nearest(op, BF16, TIES),
    ),
    "ignored random bits": (
        round_stochastic,
        lambda x, fmt, bits: round_nearest(x, fmt),
        lambda op: check_unbiased(op, BF16, 1.001953125),
    ),
    "hi overwritten in a product": (mul, old_hi_lost, lambda op: check_mul(op, BF16, expansions(2), expansions(3))),
    "fast_two_sum in grow": (grow, careless_grow, lambda op: check_grow(op, BF16, *wide_addend())),
    "beta's low part against float32": (from_wide, beta_against_float32, check_betas),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_passes_the_function_and_fails_the_broken_variant(name: str) -> None:
    real, broken, check = CHECKS[name]
    check(real)
    with pytest.raises(AssertionError):
        check(broken)

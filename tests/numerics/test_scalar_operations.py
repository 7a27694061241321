"""Operations with a float64 scalar are rounded once, against exact rationals."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from collage.numerics import BF16, FP16, FP32, Format, add_scalar, div_scalar, mul_scalar
from step_oracle import nearest

FORMATS = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
# Decimals meant exactly and stored inexactly: their products and quotients lie beside ties. And powers of two.
SCALARS = [0.9, 0.1, 0.999, 0.001, -0.001, 0.95, 0.05, -0.3, 1e-8, 3e-5, 1 - 1e-16, 0.5, 2.0**-9, 0.1**0.5, 1e3 / 7]
EXACT = {
    mul_scalar: lambda x, s: x * s,
    add_scalar: lambda x, s: x + s,
    div_scalar: lambda x, s: x / s,
}


def numbers(fmt: str) -> list[float]:
    """Small significands, where the ties are, in several binades; and many others."""
    rng = random.Random(fmt)
    small = [sign * n * 2.0**e for n in range(1, 130) for e in (-3, 2) for sign in (1, -1)]
    others = [nearest(10 ** rng.uniform(-4, 3), fmt) for _ in range(200)]
    return [0.0, *small, *others, 2.0 ** FORMATS[fmt].emin, FORMATS[fmt].smallest_subnormal]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("operation", EXACT, ids=lambda f: f.__name__)
def test_operations_with_a_scalar_round_once(operation, fmt: str) -> None:
    values = numbers(fmt)
    x = torch.tensor(values, dtype=torch.float64).to(FORMATS[fmt].dtype)
    for scalar in SCALARS:
        found = operation(x, scalar)
        wanted = [nearest(EXACT[operation](Fraction(value), Fraction(scalar)), fmt) for value in values]
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=0)


def test_rounding_through_float64_would_differ_for_nine_tenths() -> None:
    x = torch.arange(128, 256, dtype=torch.float64).to(torch.bfloat16)
    twice = (x.double() * 0.9).float().to(torch.bfloat16)
    assert (mul_scalar(x, 0.9) != twice).sum() >= 5


@pytest.mark.parametrize("operation", EXACT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_what_is_not_finite_passes(operation, fmt: Format) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64).to(fmt.dtype)
    found = operation(x, 0.9).double().tolist()
    assert found[:2] == [torch.inf, -torch.inf]
    assert found[2] != found[2]

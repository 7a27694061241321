"""Oracles: exact rationals, and a float64 rounding that is itself checked against them."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from collage.numerics import FORMATS, Format

FP8 = [fmt for fmt in FORMATS if fmt.bytes == 1]
HALF = [fmt for fmt in FORMATS if fmt.bytes == 2]
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def by_name(formats: list[Format] | tuple[Format, ...] = FORMATS) -> dict:
    """Arguments of ``pytest.mark.parametrize`` for a list of formats."""
    return {"argnames": "fmt", "argvalues": formats, "ids": [fmt.name for fmt in formats]}


def from_bits(patterns: list[int] | Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that have these bit patterns (unsigned)."""
    size = dtype.itemsize
    bits = torch.as_tensor(patterns, dtype=torch.int64)
    if size > 1:
        bits = torch.where(bits >= 2 ** (8 * size - 1), bits - 2 ** (8 * size), bits) if size < 8 else bits
    return bits.to(INTS[size]).view(dtype)


def every(fmt: Format) -> Tensor:
    """Every bit pattern of an 8- or 16-bit format."""
    return from_bits(torch.arange(2 ** (8 * fmt.bytes)), fmt.dtype)


def every_finite(fmt: Format) -> Tensor:
    """Every finite number of an 8- or 16-bit format."""
    x = every(fmt)
    return x[torch.isfinite(x.double())]


def same(a: Tensor, b: Tensor) -> Tensor:
    """Equal as bits, every nan taken as one nan."""
    a, b = a.double(), b.double()
    return ((a == b) & (torch.signbit(a) == torch.signbit(b))) | (a.isnan() & b.isnan())


def same_value(a: Tensor, b: Tensor) -> Tensor:
    """Equal as numbers (0 = -0), every nan taken as one nan."""
    a, b = a.double(), b.double()
    return (a == b) | (a.isnan() & b.isnan())


def exact(x: Tensor) -> list[Fraction]:
    """The exact values of finite numbers."""
    return [Fraction(v) for v in x.double().reshape(-1).tolist()]


def exact_sum(components: tuple[Tensor, ...]) -> list[Fraction]:
    """The exact values of expansions with finite components."""
    return [sum(parts, Fraction(0)) for parts in zip(*(exact(c) for c in components), strict=True)]


def exponent(q: Fraction) -> int:
    """``floor(log2 |q|)``."""
    n, d = abs(q.numerator), q.denominator
    e = n.bit_length() - d.bit_length()
    below = n < d << e if e >= 0 else n << -e < d
    return e - below


@lru_cache(maxsize=2**18)
def nearest(q: Fraction, fmt: Format) -> float:
    """``RN(q)``, ties to even, with the format's overflow, by integer arithmetic alone."""
    if q == 0:
        return 0.0
    spacing = Fraction(2) ** (max(exponent(q), fmt.emin) - fmt.precision + 1)
    steps = q / spacing
    whole = math.floor(steps)
    rest = steps - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    value = whole * spacing
    if abs(value) <= Fraction(fmt.max):
        return float(value)
    top = fmt.max if fmt.saturates else math.inf
    return -top if q < 0 else top


def nearest64(x: Tensor, fmt: Format) -> Tensor:
    """``RN(x)`` of a float64 tensor, as float64: :func:`nearest` by exact scaling and torch.round's ties to even."""
    spacing = fmt.ulp(x)
    value = torch.round(x / spacing) * spacing
    top = fmt.max if fmt.saturates else math.inf
    value = torch.where(value.abs() > fmt.max, torch.copysign(torch.full_like(x, top), x), value)
    return torch.where(torch.isinf(x), torch.copysign(torch.full_like(x, top), x), value)


def significands(fmt: Format, binade: int) -> Tensor:
    """The format's numbers in [2**binade, 2**(binade + 1)), float64."""
    count = 2 ** (fmt.precision - 1)
    return (1 + torch.arange(count, dtype=torch.float64) / count) * 2.0**binade


def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Every element of ``a`` beside every element of ``b``, flat."""
    return a.repeat_interleave(len(b)), b.repeat(len(a))


def random_bits_of(fmt: Format, count: int, generator: torch.Generator) -> Tensor:
    """Random bit patterns: every class of number, nan and infinities included."""
    return from_bits(torch.randint(2 ** (8 * fmt.bytes), (count,), generator=generator), fmt.dtype)


def random_numbers(fmt: Format, count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Float64 numbers of the format with exponents in [low, high]; a third lies next to a power of two."""
    ones = 2 ** (fmt.precision - 1)
    significand = torch.randint(ones, 2 * ones, (count,), generator=generator)
    edges = torch.tensor([ones, ones + 1, 2 * ones - 1])
    at_edge = torch.randint(3, (count,), generator=generator) == 0
    significand = torch.where(at_edge, edges[torch.randint(3, (count,), generator=generator)], significand)
    sign = 1 - 2 * torch.randint(2, (count,), generator=generator)
    power = torch.randint(low, high + 1, (count,), generator=generator) - fmt.precision + 1
    return (sign * significand).double() * ((power + 1023) << 52).view(torch.float64)


def random_expansion(
    fmt: Format, n: int, count: int, low: int, high: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Expansions with leading exponents in [low, high]; each component lies 0 to 3 binades below where it may begin,
    one in sixteen is 0. Not normalised: a tie may round away from its component."""
    lead = random_numbers(fmt, count, low, high, generator)
    components = [lead]
    for _ in range(n - 1):
        gap = torch.randint(4, (count,), generator=generator)
        following = random_numbers(fmt, count, 0, 0, generator)
        size = fmt.ulp(components[-1]) / 2 * 2.0 ** -gap.double()
        following = torch.where(components[-1] == 0, 0, following * size)
        following = torch.where(torch.randint(16, (count,), generator=generator) == 0, 0, following)
        # What rounding carries up to the next binade stays within half an ulp: ties are wanted.
        following = following.clamp(-fmt.ulp(components[-1]) / 2, fmt.ulp(components[-1]) / 2)
        components.append(nearest64(following, fmt))
    return tuple(c.to(fmt.dtype) for c in components)

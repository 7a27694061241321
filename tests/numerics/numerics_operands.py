"""Operands of expansion arithmetic: where in the range they lie, how far apart, and when they are in the domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from numerics_oracle import nearest64, random_bits_of, random_expansion
from torch import Generator, Tensor

from collage.numerics import Format, renormalize

Expansion = tuple[Tensor, ...]


def normal_expansion(fmt: Format, n: int, count: int, low: int, high: int, generator: Generator) -> Expansion:
    """Normalised expansions with leading exponents in [low, high]."""
    return renormalize(random_expansion(fmt, n, count, low, high, generator))


def cancelling(x: Expansion, fmt: Format, generator: Generator) -> Expansion:
    """Expansions that cancel 1 to n components of ``x``, all but some last bits of the one where they part."""
    part = torch.randint(len(x), x[0].shape, generator=generator)
    components = []
    for i, c in enumerate(x):
        off = torch.randint(-3, 4, c.shape, generator=generator) * fmt.ulp(c)
        wide = torch.where(part > i, -c.double(), torch.where(part == i, -c.double() + off, off * fmt.unit_roundoff))
        components.append(nearest64(wide, fmt).to(fmt.dtype))
    return renormalize(tuple(components))


def pattern_expansion(fmt: Format, n: int, count: int, generator: Generator) -> Expansion:
    """Random bit patterns, normalised; those that are not finite, or overflow on the way, become 0."""
    raw = tuple(random_bits_of(fmt, count, generator) for _ in range(n))
    return harmless(raw, fmt)


def harmless(raw: Expansion, fmt: Format) -> Expansion:
    """The normalised expansions of components of any kind; where a sum could overflow, 0."""
    size = torch.stack([c.double().abs() for c in raw]).sum(dim=0)
    kept = size <= fmt.max / 2
    return renormalize(tuple(torch.where(kept, c.double(), 0.0).to(fmt.dtype) for c in raw))


@dataclass(frozen=True)
class Regime:
    """Pairs of operands of one kind."""

    name: str
    draw: Callable[[Format, int, int, Generator], tuple[Expansion, Expansion]]


def _middle(fmt: Format, n: int, count: int, g: Generator) -> tuple[Expansion, Expansion]:
    return normal_expansion(fmt, n, count, -1, 2, g), normal_expansion(fmt, n, count, -3, 2, g)


def _ends(fmt: Format, n: int, count: int, g: Generator) -> tuple[Expansion, Expansion]:
    x = normal_expansion(fmt, n, count, fmt.emin, fmt.emax - 2, g)
    return x, normal_expansion(fmt, n, count, fmt.emin, fmt.emax - 2, g)


def _small(fmt: Format, n: int, count: int, g: Generator) -> tuple[Expansion, Expansion]:
    reach = fmt.precision * n // 2
    x = normal_expansion(fmt, n, count, fmt.emin, min(fmt.emin + reach, fmt.emax - 2), g)
    return x, normal_expansion(fmt, n, count, -3, 2, g)


def _opposed(fmt: Format, n: int, count: int, g: Generator) -> tuple[Expansion, Expansion]:
    x = normal_expansion(fmt, n, count, -1, 2, g)
    return x, cancelling(x, fmt, g)


def _patterns(fmt: Format, n: int, count: int, g: Generator) -> tuple[Expansion, Expansion]:
    return pattern_expansion(fmt, n, count, g), pattern_expansion(fmt, n, count, g)


REGIMES = [
    Regime("middle", _middle),
    Regime("whole-range", _ends),
    Regime("underflow", _small),
    Regime("cancellation", _opposed),
    Regime("patterns", _patterns),
]


def _size(x: Expansion) -> Tensor:
    return x[0].double().abs()


def _kept(keep: Tensor, *operands: Expansion) -> tuple[Expansion, ...]:
    return tuple(tuple(c[keep] for c in x) for x in operands)


def sum_domain(x: Expansion, y: Expansion, fmt: Format) -> tuple[Expansion, ...]:
    """The pairs whose sum does not overflow on any way to it."""
    return _kept(_size(x) + _size(y) <= fmt.max / 2, x, y)


def product_domain(x: Expansion, y: Expansion, fmt: Format) -> tuple[Expansion, ...]:
    """The pairs whose product does not overflow."""
    return _kept(_size(x) * _size(y) <= fmt.max / 2, x, y)


def quotient_domain(x: Expansion, y: Expansion, fmt: Format) -> tuple[Expansion, ...]:
    """The pairs with a divisor other than 0 where neither the quotient nor twice x overflows."""
    small = (_size(x) <= fmt.max / 4) & (_size(x) / _size(y) <= fmt.max / 2)
    return _kept(small & (_size(y) != 0), x, y)


def root_domain(x: Expansion) -> Expansion:
    """The positive ones; negative ones are turned round."""
    (kept,) = _kept(_size(x) != 0, x)
    sign = torch.sign(kept[0].double())
    return tuple((c.double() * sign).to(c.dtype) for c in kept)

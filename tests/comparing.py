"""Data for optimizers, and the comparison of their parameters and states bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import collage
from collage.optim import StepRow

STRATEGIES = list(collage.strategies())
LOW = [name for name in STRATEGIES if name != "fp32"]
WORKING = [name for name, strategy in collage.strategies().items() if strategy.has_working_arithmetic]


def serves(strategy: str, dtype: torch.dtype) -> bool:
    """Whether a strategy serves low-precision parameters of a dtype."""
    try:
        collage.strategies()[strategy].layout(dtype)
    except ValueError:
        return False
    return True


# Every strategy for low-precision parameters with every dtype that it serves.
CASES = [(name, dtype) for name in LOW for dtype in (torch.bfloat16, torch.float16) if serves(name, dtype)]


def dtype_of(strategy: str) -> torch.dtype:
    """What a model's parameters are for a strategy."""
    served = (dtype for dtype in (torch.bfloat16, torch.float16) if serves(strategy, dtype))
    return next(served, torch.float32)


def keeps(strategy: str, dtype: torch.dtype) -> bool:
    """Whether a strategy keeps parameters of this low-precision dtype."""
    try:
        collage.strategies()[strategy].layout(dtype)
    except ValueError:
        return False
    return True


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16, spread: float = 0.05) -> Tensor:
    """Normal values that depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def parameter(value: Tensor, strategy: str) -> nn.Parameter:
    """A parameter as a strategy keeps it: in tiles where it has such and the value is large enough."""
    storage = collage.strategies()[strategy].param
    form = storage.fitted(value.shape) if isinstance(storage, collage.Tiled) else None
    tiled = form is not None and value.dtype != torch.float32
    return nn.Parameter(collage.TiledTensor.of(value, form) if tiled else value)


def bits(x: Tensor) -> Tensor:
    """The bits in logical order, every nan as one."""
    x = x.detach().contiguous()
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8)
        return torch.where((x & 0x7F) == 0x7F, 0x7F, x)
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def snapshot(opt: Optimizer) -> list[tuple[str, torch.dtype, Tensor]]:
    """Every parameter and state tensor of an optimizer: name, dtype, bits."""
    found = []
    for i, param in enumerate(param for group in opt.param_groups for param in group["params"]):
        found.append((f"{i}", param.dtype, bits(param).clone()))
        for number, part in enumerate(getattr(param, "parts", ())):
            found.append((f"{i} part {number}", part.dtype, bits(part).clone()))
        for name, value in sorted(opt.state.get(param, {}).items()):
            found.append((f"{i}.{name}", value.dtype, bits(value).clone()))
    return found


def assert_same(one: Any, other: Any) -> None:
    """Two optimizers (or snapshots) with the same bits everywhere."""
    first, second = (snapshot(x) if isinstance(x, Optimizer) else x for x in (one, other))
    assert [entry[:2] for entry in first] == [entry[:2] for entry in second]
    wrong = [a[0] for a, b in zip(first, second, strict=True) if not torch.equal(a[2], b[2])]
    assert not wrong, f"bits differ in {wrong}"


def any_rows(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """:func:`any_bits` in rows of several kinds, since one number can spoil a block: anything, 2**-30 to 2**30, a
    magnitude of the row's own from 2**-150 to 2**150, ordinary values, zeros, few other than zero."""
    found = any_bits(shape, seed, dtype)
    if not dtype.is_floating_point or len(shape) < 2:
        return found
    generator = torch.Generator().manual_seed(seed + 1)
    column = (shape[0], *[1] * (len(shape) - 1))
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    within, between = (torch.rand(size, generator=generator, dtype=torch.float64) - 0.5 for size in (shape, column))
    few = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.05
    kinds = [
        normal * torch.exp2(60 * within),
        normal * torch.exp2(300 * between),
        normal * 0.05,
        normal * 0,
        normal * few,
    ]
    row = torch.arange(shape[0]).view(column) % (len(kinds) + 1)
    for number, kind in enumerate(kinds):
        found = torch.where(row == number, kind.to(dtype), found)
    return found


def any_bits(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Half random bit patterns (infinities, nans, subnormals, everything), half ordinary values, some zeros. Of a dtype
    of integers random ones alone."""
    generator = torch.Generator().manual_seed(seed)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize] if dtype.is_floating_point else dtype
    limits = torch.iinfo(integers)
    raw = torch.randint(limits.min, limits.max + 1, shape, generator=generator, dtype=torch.int64).to(integers)
    if not dtype.is_floating_point:
        return raw
    ordinary = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.05).to(dtype)
    kind = torch.rand(shape, generator=generator, dtype=torch.float64)
    mixed = torch.where(kind < 0.5, raw.view(dtype), ordinary)
    return torch.where(kind > 0.97, torch.copysign(torch.zeros_like(mixed), ordinary), mixed)


class Keeper:
    """An observer of an optimizer that keeps every row."""

    def __init__(self) -> None:
        self.rows: list[StepRow] = []

    def wants(self, step: int) -> bool:
        return True

    def record(self, step: int, rows: Sequence[StepRow]) -> None:
        self.rows += rows

"""Batches of tensors for tests of the Triton step, and their comparison with the eager one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import collage
from collage import Tiled, TiledTensor
from collage.kernels import eager, fused
from collage.kernels.contract import MOMENTS, SUMS, Batch, Hyper, Inputs, Layout
from comparing import STRATEGIES, any_bits, any_rows, bits, values

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
LOW = [torch.bfloat16, torch.float16]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
COUNTS = slice(SUMS.index("updates"), len(SUMS))


def layout_of(strategy: str, dtype: torch.dtype, block: int = 128) -> Layout:
    """The storages of a strategy for parameters whose rows have blocks of so many elements."""
    return collage.strategies()[strategy].layout(dtype, torch.Size((256, block)))


def serves(strategy: str, dtype: torch.dtype) -> bool:
    try:
        return layout_of(strategy, dtype) is not None
    except ValueError:
        return False


# (strategy, dtype of the parameters) of every combination there is; float32 parameters have one layout.
CASES = [
    *((name, dtype) for name, dtype in itertools.product(STRATEGIES, LOW) if serves(name, dtype)),
    ("fp32", torch.float32),
]
# Those that keep parameters in tiles.
IN_TILES = [name for name in STRATEGIES if isinstance(collage.strategies()[name].param, Tiled)]
# Those whose elements share entries of components.
BLOCKED = [(name, dtype) for name, dtype in CASES if layout_of(name, dtype).block(dtype) > 1]


def normal(count: int, dtype: torch.dtype, seed: int, spread: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * spread).to(dtype)


def wild(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A third each of random bit patterns, of numbers near 1, and of a list of critical ones; any integers."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max + 1, (count,), generator=generator).to(dtype)
    integer = INTEGERS[dtype.itemsize]
    limit = 2 ** (8 * dtype.itemsize - 1)
    patterns = torch.randint(-limit, limit, (count,), generator=generator, dtype=torch.int64).to(integer).view(dtype)
    info = torch.finfo(dtype)
    critical = [0.0, 1.0, info.max, info.smallest_normal, info.tiny / 4, 1 + info.eps, torch.inf, torch.nan]
    chosen = torch.tensor([*critical, *(-x for x in critical)], dtype=torch.float64).to(dtype)
    # A GPU's own nan: all bits of the significand are set, where rounding it as a number carries into its sign.
    chosen = torch.where(chosen.isnan(), torch.tensor(limit - 1, dtype=integer).view(dtype), chosen)
    chosen = chosen[torch.randint(0, len(chosen), (count,), generator=generator)]
    kind = torch.randint(0, 3, (count,), generator=generator)
    return torch.where(kind == 0, patterns, torch.where(kind == 1, normal(count, dtype, seed, 1.0), chosen))


def tame_(x: Tensor, block: int) -> Tensor:
    """In place, by block: as it is, zeros, what is neither large nor infinite nor nan, ordinary. A block with one nan
    is nan as a whole, and few would be anything else."""
    rows = x.view(-1, block)
    rows[1::4] = 0
    if x.is_floating_point():
        rows[2::4] = torch.where(rows[2::4].abs() < 1e15, rows[2::4], 0)
        rows[3::4] = normal(rows[3::4].numel(), x.dtype, 0).view(-1, block)
    return x


def make_batch(
    layout: Layout, dtype: torch.dtype, sizes: Sequence[int], fill=None, firsts=None, steps=None, device="cpu", seed=5
) -> Batch:
    """Parameters with fresh states, or, by ``fill``, with parameters and states of any values. Sizes, and the indices
    of first elements, grow to whole blocks."""
    block = layout.block(dtype)
    sizes = [-(-size // block) * block for size in sizes]
    firsts = [-(-first // block) * block for first in firsts or [0] * len(sizes)]
    params = [(fill or normal)(size, dtype, i) for i, size in enumerate(sizes)]
    components = layout.components(dtype)
    states = []
    for i, (param, size) in enumerate(zip(params, sizes, strict=True)):
        make = fill or (lambda count, kind, seed: torch.zeros(count, dtype=kind))
        state = {
            name: make(size // c.elements, c.dtype, 1000 * i + j) for j, (name, c) in enumerate(components.items())
        }
        states.append(state)
        if fill is None:
            for role in MOMENTS:
                getattr(layout, role).clear(layout.parts(role, param, state))
        elif block > 1:
            tame_(param, block)
            for name, component in components.items():
                tame_(state[name], block // component.elements)
        if fill is None and "master_param" in state:
            state["master_param"].copy_(param)
    return Batch(
        layout=layout,
        arithmetic="fp32",
        seed=seed,
        params=[param.to(device) for param in params],
        states=[{name: value.to(device) for name, value in state.items()} for state in states],
        steps=torch.tensor(steps or [0] * len(sizes), dtype=torch.float32, device=device),
        ordinals=list(range(3, 3 + len(sizes))),
        firsts=firsts,
    )


def tile_layout(strategy: str, width: int, rows: int, columns: int) -> Layout:
    """The storages of a strategy for parameters in tiles of so many rows and columns."""
    record = collage.strategies()[strategy]
    storages = [replace(record.param, rows=rows, columns=columns, width=width)]
    for storage in (record.exp_avg, record.exp_avg_sq):
        fit = {"columns": columns, "width": width} if isinstance(storage, Tiled) else {"block": columns}
        storages.append(replace(storage, **fit))
    return Layout(*storages)


def tile_batch(layout: Layout, heights: Sequence[int], firsts=None, steps=None, device="cpu", anything=False) -> Batch:
    """Parameters in tiles with so many rows: ordinary ones with fresh states, the last tile of a row of them zeros; or
    with components of any patterns, the scales of every second one as of numbers near 1."""
    form, dtype = layout.param, torch.bfloat16
    assert isinstance(form, Tiled)
    params, states = [], []
    for i, height in enumerate(heights):
        shape = torch.Size((height, form.width))
        param = TiledTensor.of(values(shape, i) * (torch.arange(form.width) < form.width - form.columns), form)
        state = {name: torch.zeros(c.shape(shape), dtype=c.dtype) for name, c in layout.components(dtype).items()}
        for role in MOMENTS:
            getattr(layout, role).clear(layout.parts(role, param, state))
        if anything:
            fill_(param.parts, i)
            for role in MOMENTS:
                fill_(layout.parts(role, param, state), i + 500)
        params.append(param.to(device))
        states.append({name: value.to(device) for name, value in state.items()})
    return Batch(
        layout=layout,
        arithmetic="fp32",
        seed=2**63 + 5,
        params=params,
        states=states,
        steps=torch.tensor(steps or [0.0] * len(heights), device=device),
        ordinals=list(range(3, 3 + len(heights))),
        firsts=firsts or [0] * len(heights),
    )


def fill_(parts: Sequence[Tensor], seed: int) -> None:
    """Any patterns in a role's components; the scales, which are last, tame where the seed is odd."""
    for number, part in enumerate(parts):
        shape, key = tuple(part.shape), 77 * seed + number
        if part.dtype == torch.float32:
            part.copy_(any_rows(shape, key, torch.float32))
            part.copy_(part.abs().clamp(2.0**-94) if seed % 2 else part)
        else:
            kind = torch.uint8 if part.dtype == torch.float8_e4m3fn else part.dtype
            part.view(kind).copy_(any_bits(shape, key, kind))
    if parts[-1].dtype == torch.uint8 and seed % 2:
        parts[-1].remainder_(40).add_(110)


def copy_of(batch: Batch) -> Batch:
    """The same values in other tensors, nothing kept."""
    states = [{name: value.clone() for name, value in state.items()} for state in batch.states]
    params = [param.clone() for param in batch.params]
    return replace(batch, params=params, states=states, steps=batch.steps.clone(), kept={})


def gradients(batch: Batch, dtype: torch.dtype, seed: int, fill=normal) -> list[Tensor]:
    if batch.layout.param.borne and fill is not normal:
        return [any_rows(tuple(p.shape), 100 * seed + i, dtype).to(p.device) for i, p in enumerate(batch.params)]
    grads = [fill(p.numel(), dtype, 7000 + 100 * seed + i) for i, p in enumerate(batch.params)]
    block = batch.layout.block(batch.params[0].dtype) if batch.params else 1
    if fill is not normal and block > 1:
        grads = [tame_(grad, block) for grad in grads]
    return [grad.to(p.device) for grad, p in zip(grads, batch.params, strict=True)]


def components(param: Tensor) -> Sequence[Tensor]:
    """The tensors of which a parameter consists."""
    return param.parts if isinstance(param, TiledTensor) else [param]


def assert_same(one: Batch, other: Batch) -> None:
    """The same bits in parameters, states and steps, every nan taken as one."""
    assert torch.equal(one.steps, other.steps)
    for i, (first, second) in enumerate(zip(one.params, other.params, strict=True)):
        pairs = enumerate(zip(components(first), components(second), strict=True))
        wrong = [number for number, (a, b) in pairs if not torch.equal(bits(a), bits(b))]
        assert not wrong, f"components {wrong} of parameter {i}"
    for i, (first, second) in enumerate(zip(one.states, other.states, strict=True)):
        wrong = [name for name in first if not torch.equal(bits(first[name]), bits(second[name]))]
        assert not wrong, f"{wrong} of parameter {i}"


def assert_same_sums(eager_sums: Tensor | None, sums: Tensor | None) -> None:
    """The same counts, and the other sums up to the order in which float64 terms are added."""
    assert eager_sums is not None
    assert sums is not None
    assert sums.dtype == torch.float64
    assert torch.equal(eager_sums[:, COUNTS], sums[:, COUNTS])
    torch.testing.assert_close(sums, eager_sums, rtol=1e-11, atol=1e-30, equal_nan=True)


def step_both(batch: Batch, other: Batch, inputs: Inputs, eager_inputs: Inputs | None = None) -> None:
    """Steps the first batch eagerly and the other one in Triton, and compares all that they leave."""
    before = [grad.clone() for grad in inputs.grads]
    eager_sums = eager.step(batch, eager_inputs or inputs)
    sums = fused.step(other, inputs)
    assert_same(batch, other)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, inputs.grads, strict=True)), "gradient written"
    if inputs.audit:
        assert_same_sums(eager_sums, sums)
    else:
        assert sums is None

"""Batches of tensors for tests of the Triton step, and their comparison with the eager one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import collage
from collage.kernels import eager, fused
from collage.kernels.contract import SUMS, Batch, Hyper, Inputs, Layout
from comparing import STRATEGIES, bits

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
LOW = [torch.bfloat16, torch.float16]
# (strategy, dtype of the parameters) of every combination there is; float32 parameters have one layout.
CASES = [*itertools.product([name for name in STRATEGIES if name != "fp32"], LOW), ("fp32", torch.float32)]
COUNTS = slice(SUMS.index("updates"), len(SUMS))
INTEGERS = {2: torch.int16, 4: torch.int32}


def layout_of(strategy: str, dtype: torch.dtype) -> Layout:
    return collage.strategies()[strategy].layout(dtype)


def normal(count: int, dtype: torch.dtype, seed: int, spread: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * spread).to(dtype)


def wild(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A third each of random bit patterns, of numbers near 1, and of a list of critical ones."""
    generator = torch.Generator().manual_seed(seed)
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


def make_batch(
    layout: Layout, dtype: torch.dtype, sizes: Sequence[int], fill=None, firsts=None, steps=None, device="cpu", seed=5
) -> Batch:
    """Parameters with fresh states, or, by ``fill``, with parameters and states of any values."""
    params = [(fill or normal)(size, dtype, i) for i, size in enumerate(sizes)]
    states = []
    for i, size in enumerate(sizes):
        names = layout.state_names(dtype)
        make = fill or (lambda count, kind, seed: torch.zeros(count, dtype=kind))
        states.append({name: make(size, kind, 1000 * i + j) for j, (name, kind) in enumerate(names.items())})
        if fill is None and "master_param" in names:
            states[-1]["master_param"].copy_(params[i])
    return Batch(
        layout=layout,
        arithmetic="fp32",
        seed=seed,
        params=[param.to(device) for param in params],
        states=[{name: value.to(device) for name, value in state.items()} for state in states],
        steps=torch.tensor(steps or [0] * len(sizes), dtype=torch.float32, device=device),
        ordinals=list(range(3, 3 + len(sizes))),
        firsts=firsts or [0] * len(sizes),
    )


def copy_of(batch: Batch) -> Batch:
    """The same values in other tensors, nothing kept."""
    states = [{name: value.clone() for name, value in state.items()} for state in batch.states]
    params = [param.clone() for param in batch.params]
    return replace(batch, params=params, states=states, steps=batch.steps.clone(), kept={})


def gradients(batch: Batch, dtype: torch.dtype, seed: int, fill=normal) -> list[Tensor]:
    return [fill(p.numel(), dtype, 7000 + 100 * seed + i).to(p.device) for i, p in enumerate(batch.params)]


def assert_same(one: Batch, other: Batch) -> None:
    """The same bits in parameters, states and steps, every nan taken as one."""
    assert torch.equal(one.steps, other.steps)
    for i, (first, second) in enumerate(zip(one.params, other.params, strict=True)):
        assert torch.equal(bits(first), bits(second)), f"parameter {i}"
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

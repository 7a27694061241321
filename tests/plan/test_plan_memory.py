"""Bytes of parameters, gradients and states, shards, peaks and the largest micro-batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import collage
from collage.plan.memory import Needs, Planner, Settings, gathered, shard_elements, stored
from collage.plan.models import Shape, from_shape, named
from collage.plan.result import bytes_per_param

TINY = from_shape(Shape(64, 4, 4, 96), 32)


def counted(strategy: str) -> tuple[int, int, int]:
    """Bytes of real tensors after a real step: weights, states, gradients."""
    dtype = collage.strategies()[strategy].param_dtype(torch.bfloat16)
    model = TINY.build(dtype=torch.float32, attention="eager")
    if dtype != torch.float32:
        collage.to_low_precision(model, dtype)
    if collage.strategies()[strategy].param.borne:
        collage.to_fp8_(model, strategy)
    optimizer = collage.AdamW(model.parameters(), strategy=strategy)
    TINY.loss(model, TINY.tokens(1)).backward()
    optimizer.step()
    params = [part for p in model.parameters() for part in (p.parts if isinstance(p, collage.TiledTensor) else [p])]
    held = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return tuple(sum(t.numel() * t.element_size() for t in each) for each in (params, held, grads))


@pytest.mark.parametrize("strategy", list(collage.strategies()))
def test_bytes_are_those_of_real_tensors(strategy: str) -> None:
    found = stored(collage.strategies()[strategy], TINY.shapes, Settings())
    assert (found.params, found.states, found.gradients) == counted(strategy)


TABLE = {"plain": 8, "stochastic": 8, "kahan": 10, "light": 10, "plus": 12, "light-nearest": 10, "plus-nearest": 12}
TABLE |= {"fp32-states": 12, "mixed": 16, "fp32": 16, "exact": 12, "compact": 7.1, "fp8": 6.1}


@pytest.mark.parametrize(("strategy", "expected"), TABLE.items())
def test_bytes_per_parameter_are_those_of_the_table(strategy: str, expected: float) -> None:
    record = collage.strategies()[strategy]
    assert round(bytes_per_param(record, Settings()), 1) == expected
    model = named("gpt-125m", 2048)
    found = stored(record, model.shapes, Settings())
    total = found.params + found.states + found.gradients
    # The parameters that storages in blocks can't keep are a thousandth.
    assert total / model.count == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "shards", "expected"),
    [((10, 3), 1, 30), ((10, 3), 4, 9), ((3, 5), 8, 5), ((7,), 2, 4), ((), 3, 1), ((12, 2, 2), 3, 16)],
)
def test_the_largest_shard_is_that_of_a_chunk_along_the_first_dimension(
    shape: tuple[int, ...], shards: int, expected: int
) -> None:
    assert shard_elements(shape, shards) == expected
    if shape:
        assert expected == torch.empty(shape).chunk(shards)[0].numel()


@pytest.mark.parametrize("strategy", ["plus", "compact", "mixed"])
def test_shards_share_all_but_what_is_gathered(strategy: str) -> None:
    record = collage.strategies()[strategy]
    one, many = stored(record, TINY.shapes, Settings()), stored(record, TINY.shapes, Settings(shards=3))
    for part in ("params", "states", "gradients"):
        assert getattr(one, part) / 3 <= getattr(many, part) < getattr(one, part) / 2.5
    assert gathered(TINY, record, Settings()).forward == 0
    around = gathered(TINY, record, Settings(shards=3))
    block = sum(TINY.shapes[place].numel() for place in TINY.by_block[0])
    rest = TINY.count - 4 * block
    assert around.forward == 2 * (rest + 2 * block)
    assert around.backward == around.forward + 2 * rest + 4 * block
    wide = gathered(TINY, record, Settings(shards=3, reduce=torch.float32))
    assert wide.backward - around.backward == 2 * block


def needs(strategy: str = "plus", checkpointing: bool = False, **settings: object) -> Needs:
    planner = Planner(TINY, dataclasses.replace(Settings(), **settings))  # pyright: ignore[reportArgumentType]
    return planner.needs(collage.strategies()[strategy], checkpointing)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    found = needs()
    for memory in (found.peak(1), found.peak(3), found.peak(3) - 1, found.peak(40) + 1, 10**10):
        most = found.largest_micro_batch(memory)
        assert most == 0 or found.peak(most) <= memory
        assert found.peak(most + 1) > memory
    assert found.largest_micro_batch(found.peak(1) - 1) == 0


def test_more_memory_never_fits_less() -> None:
    found = needs()
    fitting = [found.largest_micro_batch(memory) for memory in range(10**6, 10**7, 10**5)]
    assert fitting == sorted(fitting)
    assert fitting[0] == 0 < fitting[-1]


def test_the_peak_grows_with_the_micro_batch_and_with_the_states() -> None:
    found = needs()
    sizes = [found.peak(batch) for batch in range(1, 9)]
    assert sizes == sorted(set(sizes))
    more = needs("mixed")
    difference = more.stored.states - found.stored.states
    assert all(more.peak(batch) - found.peak(batch) == difference for batch in (1, 8))
    assert needs(checkpointing=True).peak(8) < found.peak(8)


def test_gradients_that_accumulate_are_there_all_the_time() -> None:
    once, several = needs().phases(8), needs(accumulates=True).phases(8)
    assert several["forward"] - once["forward"] == needs().stored.gradients
    assert several["backward"] > once["backward"]
    assert several["step"] == once["step"]


def test_gradients_in_float32_take_twice_as_much() -> None:
    low, wide = needs(), needs(gradient="float32")
    assert wide.stored.gradients == 2 * low.stored.gradients
    assert wide.stored.states == low.stored.states
    assert bytes_per_param(collage.strategies()["plus"], Settings(gradient="float32")) == 14
    assert wide.peak(1) > low.peak(1)


def test_a_strategy_that_cannot_serve_the_dtype_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(collage.strategies()["compact"], name="no small", small=None)
    planned = Planner(TINY, Settings()).plan(broken)
    assert planned.needs is None
    assert "names no strategy for small parameters" in planned.reason

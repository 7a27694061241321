from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import collage
from collage.bench.contenders import (
    HYPER,
    MasterAdamW,
    Streams,
    own_contenders,
    reference,
    state_bytes,
    strategy_streams,
    torch_contenders,
)
from collage.bench.shapes import ShapeSet, Values

BF16 = torch.bfloat16
STRATEGIES = list(collage.strategies())
SHAPES = ShapeSet("test", "", ((16, 8), (8,)))
# Rows of whole blocks.
BLOCKS = ShapeSet("blocks", "", ((32, 128), (4, 16, 128)))
TILES = ShapeSet("tiles", "", ((128, 128), (256, 384)))


def parameters(dtype: torch.dtype, shapes: ShapeSet = SHAPES) -> list[nn.Parameter]:
    return Values.of(shapes, torch.bfloat16, torch.device("cpu")).parameters(dtype)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("plain", 14),
        ("kahan", 18),
        ("light", 18),
        ("plus", 22),
        ("plus-nearest", 22),
        ("fp32-states", 22),
        ("mixed", 28),
        ("fp32", 28),
    ],
)
def test_bytes_moved_are_every_component_read_and_written_and_the_gradient_read(name: str, moved: float) -> None:
    strategy = collage.strategies()[name]
    assert strategy_streams(strategy, strategy.param_dtype(BF16)).bytes_moved == moved


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_streams_keep_what_the_strategy_says_it_keeps(name: str) -> None:
    strategy = collage.strategies()[name]
    dtype = strategy.param_dtype(BF16)
    assert strategy_streams(strategy, dtype).bytes_kept == strategy.bytes_per_param(BF16)


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_bytes_on_the_real_tensors_are_those_of_the_storages(name: str) -> None:
    (contender,) = own_contenders([name], ["eager"], BF16)
    tiled = isinstance(collage.strategies()[name].param, collage.Tiled)
    shapes = TILES if tiled else BLOCKS
    params = parameters(contender.dtype, shapes)
    optimizer = contender.build(params)
    optimizer.step()
    own = sum(part.numel() * part.element_size() for param in params for part in getattr(param, "parts", [param]))
    kept = collage.strategies()[name].bytes_per_param(BF16, grad=False) * shapes.parameters
    assert state_bytes(optimizer) + own == kept
    assert all(isinstance(param, collage.TiledTensor) == tiled for param in params)


def test_own_contenders_are_every_strategy_with_every_backend() -> None:
    made = own_contenders(STRATEGIES, ["native", "eager"], BF16)
    assert [(each.strategy, each.backend) for each in made] == [(s, b) for s in STRATEGIES for b in ("native", "eager")]
    assert len({each.name for each in made}) == len(made)
    assert [each.strategy for each in made if each.dtype == torch.float32] == ["fp32", "fp32"]


@pytest.mark.parametrize("contender", [reference(BF16), *torch_contenders(BF16)], ids=lambda each: each.name)
def test_torchs_own_contenders_keep_what_their_streams_say(contender: Any) -> None:
    params = parameters(contender.dtype)
    before = params[0].detach().clone()
    optimizer = contender.build(params)
    optimizer.step()
    assert not torch.equal(before, params[0])
    # The master's float32 gradients are its state too, and no stream of its formats.
    own = 4 if "master" in contender.name else 0
    kept = contender.streams.bytes_kept - 2 * contender.dtype.itemsize + own
    assert state_bytes(optimizer) == kept * SHAPES.parameters


def test_the_float32_master_makes_the_steps_of_float32_parameters() -> None:
    low, full = parameters(BF16), parameters(torch.float32)
    master, plain = MasterAdamW(low), torch.optim.AdamW(full, **HYPER, fused=True)
    for _ in range(3):
        master.step()
        plain.step()
    for param, exact in zip(low, full, strict=True):
        assert torch.equal(param, exact.to(BF16))


def test_null_streams_count_what_is_only_written_as_read_and_leave_out_scales() -> None:
    assert Streams((4, 4), (2,), (2,)).null() == ((2, 4, 4), (2,))
    assert Streams((2, 1, 4 / 256), (2,)).null() == ((1, 2), (2,))
    assert math.isclose(Streams((2, 1, 4 / 256), (2,)).bytes_moved, 2 * (2 + 1 + 4 / 256) + 2)


class Wrapped(torch.Tensor):
    """A tensor that keeps others, as quantized states do."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None


def test_state_bytes_see_through_wrappers_count_shared_memory_once_and_leave_out_counters() -> None:
    wrapped = torch.zeros(100).as_subclass(Wrapped)
    wrapped.codes, wrapped.scale = torch.zeros(100, dtype=torch.uint8), torch.zeros(2)
    shared = torch.zeros(10)
    inner = SimpleNamespace(quantized=torch.zeros(5, dtype=torch.int8), name="text")
    state = {"a": {"v": wrapped, "step": torch.tensor(3.0)}, "b": [shared, (shared, inner)], "lr": 0.1}
    assert state_bytes(SimpleNamespace(state=state, step=print)) == 100 + 8 + 40 + 5

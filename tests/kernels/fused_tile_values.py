"""What Triton's interpreter makes of the kernels of parameters in tiles, bit by bit beside the definition.

As ``fused_values.py``: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/fused_tile_values.py``.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from fused_batches import (
    HYPER,
    IN_TILES,
    assert_same,
    copy_of,
    gradients,
    step_both,
    tile_batch,
    tile_layout,
    wild,
)

import collage
from collage import TiledTensor
from collage.kernels import fused
from collage.kernels.contract import Inputs
from collage.kernels.fused import elements, launching
from collage.numerics import (
    E4M3FN,
)
from collage.storage.matmul import ROUNDERS, rounded
from collage.storage.tensor import READERS, read
from comparing import any_bits, bits, snapshot, values
from comparing import assert_same as assert_same_optimizers

pytestmark = pytest.mark.usefixtures("interpreted")


@triton.jit
def e4m3_kernel(patterns, numbers, back, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    number = elements.e4m3_number(tl.load(patterns + at).to(tl.int32))
    tl.store(numbers + at, number)
    tl.store(back + at, elements.e4m3_pattern(number).to(tl.uint8))


def test_every_e4m3_number_is_read_and_written() -> None:
    patterns = torch.arange(256).to(torch.uint8)
    numbers, back = torch.empty(256), torch.zeros(256, dtype=torch.uint8)
    launching.launch(e4m3_kernel, 1, patterns, numbers, back, SIZE=256)
    assert torch.equal(bits(numbers), bits(patterns.view(E4M3FN.dtype).float()))
    assert torch.equal(bits(back.view(E4M3FN.dtype)), bits(patterns.view(E4M3FN.dtype)))


# Width of a row, rows and columns of a tile: a last tile less high, rows that no power of two divides; a scale per row;
# 16 bytes at a time, in several slabs.
TILES = [(34, 4, 34), (64, 1, 32), (64, 128, 64)]


@pytest.mark.parametrize(("width", "rows", "columns"), TILES)
@pytest.mark.parametrize("strategy", IN_TILES)
def test_any_components_in_tiles_step_as_in_the_eager_definition(
    strategy: str, width: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "SLAB_ROWS", 4 if rows == 128 else 64)
    layout = tile_layout(strategy, width, rows, columns)
    assert fused.serves(layout, torch.bfloat16)
    batch = tile_batch(layout, [5, 3], [0, 5 * rows * width], [0.0, 5.0], anything=True)
    other = copy_of(batch)
    first = Inputs(replace(HYPER, maximize=True), gradients(batch, torch.bfloat16, 1, wild))
    step_both(batch, other, first)
    grads = gradients(batch, torch.float32, 2, wild)
    step_both(batch, other, Inputs(HYPER, grads, grad_scale=torch.tensor(3.0), audit=True))


@pytest.mark.parametrize("strategy", IN_TILES)
def test_tiles_follow_many_steps_that_grow_and_shrink(strategy: str) -> None:
    # Two tiles, the second of zeros without a gradient at first.
    batch = tile_batch(tile_layout(strategy, 64, 128, 32), [9])
    other = copy_of(batch)
    for step, lr in enumerate([300.0, 1e-5, 1e-3]):
        grads = gradients(batch, torch.bfloat16, step)
        grads[0].view(9, 64)[:, 32:] *= step > 0
        step_both(batch, other, Inputs(replace(HYPER, lr=lr), grads, audit=step == 2))
    assert isinstance(other.params[0], TiledTensor)
    assert other.params[0].scale[0, 0] > 127 - 8


def test_keys_change_between_rows_of_tiles_at_2_to_the_32() -> None:
    batch = tile_batch(tile_layout("fp8", 64, 2, 64), [4], [2**32 - 128])
    other = copy_of(batch)
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 0)))
    assert other.kept["triton"].highs == 2


def test_tiles_are_stepped_in_one_launch_or_skipped(launches: list[str]) -> None:
    batch = tile_batch(tile_layout("naive-fp8", 64, 128, 64), [3, 0, 2])
    other = copy_of(batch)
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 0), audit=True))
    assert launches == ["advance_kernel", "tile_kernel", "sums_kernel"]
    grads = gradients(batch, torch.bfloat16, 1)
    fused.step(other, Inputs(HYPER, grads, found_inf=torch.tensor(1.0)))
    assert_same(batch, other)
    assert launches[3:] == ["advance_kernel", "tile_kernel"]


def test_unaligned_tiles_have_the_same_bits() -> None:
    batch = tile_batch(tile_layout("fp8", 64, 128, 64), [3])
    other = copy_of(batch)
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 0)))
    tables = other.kept["triton"]
    assert tables.aligned
    grads = gradients(batch, torch.bfloat16, 1)
    grads = [torch.cat([grads[0], grads[0]])[3 : 3 + len(grads[0])].copy_(grads[0])]
    step_both(batch, other, Inputs(HYPER, grads))
    assert not tables.aligned
    assert tables.uploads == 2


@pytest.mark.parametrize("strategy", ["fp8", "fp8-3"])
def test_an_optimizer_steps_a_model_in_tiles_by_these_kernels(
    strategy: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "SLAB_ROWS", 64)
    optimizers = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        model = collage.to_fp8_(torch.nn.Linear(64, 64, bias=False), strategy)
        optimizer = collage.AdamW(model.parameters(), lr=1e-3, strategy=strategy, backend=backend)
        model.weight.grad = values((64, 64), 1)
        before = snapshot(optimizer)
        optimizer.step()
        assert not torch.equal(before[1][2], snapshot(optimizer)[1][2])
        assert ("tile_kernel" in launches) == (backend == "triton")
        optimizers.append(optimizer)
        launches.clear()
    assert_same_optimizers(*optimizers)


def test_every_pair_and_every_scale_is_read_as_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "SLAB_ROWS", 128)
    form = tile_layout("fp8", 256, 1, 128).param
    hi = torch.arange(256).to(torch.uint8).view(256, 1).expand(256, 256).contiguous().view(E4M3FN.dtype)
    lo = torch.arange(256).to(torch.uint8).view(1, 256).expand(256, 256).contiguous().view(torch.int8)
    for shift, forward in itertools.product((0, 97), ("value", "hi")):
        scale = torch.arange(512).add(shift).to(torch.uint8).view(256, 2)
        tensor = TiledTensor([hi, lo, scale], form, forward)
        found = fused.read(tensor)
        assert found is not None
        assert torch.equal(bits(found), bits(read(form, tensor.parts, forward)))


@pytest.mark.parametrize(("width", "rows", "columns"), [(68, 7, 34), (128, 32, 64)])
@pytest.mark.parametrize("strategy", IN_TILES)
def test_a_model_reads_what_is_defined_in_one_launch(
    strategy: str, width: int, rows: int, columns: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READERS, "cpu", fused.read)
    form = tile_layout(strategy, width, rows, columns).param
    parts = TiledTensor.of(torch.zeros(40, width), form).parts
    for part in parts:
        part.view(torch.uint8).copy_(any_bits(tuple(part.shape), part.numel(), torch.uint8))
    for forward in ("value", "hi"):
        tensor = TiledTensor(parts, form, forward)
        assert torch.equal(bits(tensor.dequantize()), bits(read(form, parts, forward)))
    assert launches == ["read_kernel"] * 2
    assert fused.read(TiledTensor([part.t().contiguous().t() for part in parts], form)) is None


@pytest.mark.parametrize(("width", "columns"), [(68, 34), (256, 128)])
def test_activations_are_rounded_as_defined_in_one_launch(
    width: int, columns: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = any_bits((40, width), width, torch.bfloat16)
    x[3] = 0.0
    x[4:30] = values((26, width), 1) * torch.logspace(-40, 40, 26, base=2.0).bfloat16()[:, None]
    wanted = rounded(x, columns)
    assert not launches
    monkeypatch.setitem(ROUNDERS, "cpu", fused.round_rows)
    for each in (x, x.t().contiguous().t()):
        found = rounded(each, columns)
        for mine, theirs in zip(found.parts, wanted.parts, strict=True):
            assert torch.equal(bits(mine), bits(theirs))
    assert launches == ["round_kernel"] * 2
    assert fused.round_rows(x.float(), wanted.form) is None
    assert rounded(x[:0], columns).hi.shape == (0, width)

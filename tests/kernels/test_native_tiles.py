"""The native step and the native reading of parameters in tiles: bit-equal to the definitions, on any components."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import collage
from collage import Tiled, TiledTensor, kernels
from collage.kernels import Batch, Hyper, Inputs, native
from collage.storage.tensor import read
from comparing import any_bits, any_rows, bits, values

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
# Rows that end in a tile less high, tiles of one row, widths that no vector divides.
SHAPES = [((300, 128), 128), ((64, 96), 1), ((70, 100), 32), ((130, 256), 64)]
every_isa = pytest.mark.parametrize("isa", native.instruction_sets())
HYPER = Hyper(1e-2, 0.9, 0.95, 1e-8, 0.1)


def form_for(shape: tuple[int, int], rows: int, strategy: str = "fp8") -> Tiled:
    storage = collage.strategies()[strategy].param
    assert isinstance(storage, Tiled)
    form = storage.fitted(torch.Size(shape))
    assert form is not None
    return replace(form, rows=rows)


def any_parameter(form: Tiled, shape: tuple[int, int], seed: int, ordinary_scale: bool) -> TiledTensor:
    """Of any components: nan, zeros of both signs, pairs that no store writes, any scale or one near 1."""
    parts: list[Tensor] = []
    for number, component in enumerate(form.components(torch.bfloat16)):
        part = any_bits(component.shape(torch.Size(shape)), 77 * seed + number, torch.uint8)
        parts.append(part.view(component.dtype))
    if ordinary_scale:
        parts[-1].remainder_(40).add_(110)
    return TiledTensor(parts, form)


def any_batch(shape: tuple[int, int], rows: int) -> Batch:
    """Two parameters; the second with scales as a store leaves them, and not the first of its tensor."""
    form = form_for(shape, rows)
    layout = collage.strategies()["fp8"].layout(torch.bfloat16, torch.Size(shape), form)
    states = []
    for i in range(2):
        components = layout.components(torch.bfloat16).items()
        state = {name: any_rows(each.shape(torch.Size(shape)), 31 * i, each.dtype) for name, each in components}
        for name in state if i else ():
            if name.endswith("_scale"):
                state[name] = any_rows(tuple(state[name].shape), 33, torch.float32).abs().clamp(2.0**-94)
        states.append(state)
    params = [any_parameter(form, shape, i, bool(i)) for i in range(2)]
    return Batch(layout, "fp32", 2**63 + 5, params, states, torch.tensor([0.0, 5.0]), [3, 4], [0, 5 * rows * shape[1]])


def assert_steps_as_eager(isa: str, shape: tuple[int, int], rows: int, grad_dtype: torch.dtype, audit: bool) -> None:
    mine, eager = any_batch(shape, rows), any_batch(shape, rows)
    assert native.serves(mine.layout, torch.bfloat16)
    for step in range(3):
        make = any_rows if step < 2 else values
        inputs = Inputs(HYPER, [make(shape, 10 * step + i, grad_dtype) for i in range(2)], audit=audit)
        with native.using(isa):
            sums = kernels.step(mine, inputs, "native")
        wanted = kernels.step(eager, inputs, "eager")
        for one, other in zip(mine.params, eager.params, strict=True):
            pairs = zip(one.part_names, one.parts, other.parts, strict=True)  # type: ignore[attr-defined]
            assert [name for name, a, b in pairs if not torch.equal(bits(a), bits(b))] == []
        for a, b in zip(mine.states, eager.states, strict=True):
            assert [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))] == []
        if sums is not None and wanted is not None:
            assert torch.equal(sums[:, 3:], wanted[:, 3:])
            assert sums.isnan().equal(wanted.isnan())


@every_isa
@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_any_components_step_as_in_the_eager_definition(shape: tuple[int, int], rows: int, isa: str) -> None:
    for grad_dtype, audit in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        assert_steps_as_eager(isa, shape, rows, grad_dtype, audit)


def test_pieces_of_two_threads_are_whole_rows_of_tiles() -> None:
    torch.set_num_threads(2)
    assert_steps_as_eager(native.instruction_sets()[0], (600, 128), 128, torch.bfloat16, True)


@every_isa
def test_every_pair_and_every_scale_is_read_as_defined(isa: str) -> None:
    form = form_for((256, 256), 1)
    form = replace(form, columns=128)
    hi = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(256, 1).expand(256, 256).contiguous()
    lo = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(1, 256).expand(256, 256).contiguous()
    for shift in (0, 97):
        scale = torch.arange(512, dtype=torch.int32).add(shift).to(torch.uint8).view(256, 2)
        for forward in ("value", "hi"):
            tensor = TiledTensor([hi.view(torch.float8_e4m3fn), lo.view(torch.int8), scale], form, forward)
            with native.using(isa):
                found = native.read(tensor)
            assert found is not None
            assert torch.equal(bits(found), bits(read(form, tensor.parts, forward)))


@pytest.mark.parametrize("strategy", ["fp8-native", "fp8-3", "naive-fp8"])
def test_other_components_step_and_are_read_eagerly(strategy: str) -> None:
    form = form_for((128, 128), 128, strategy)
    tensor = TiledTensor.of(values((128, 128), 0), form)
    assert native.read(tensor) is None
    layout = collage.strategies()[strategy].layout(torch.bfloat16, torch.Size((128, 128)), form)
    case = (layout, "fp32", torch.bfloat16, torch.device("cpu"))
    assert kernels.choose(*case, None) == "eager"
    with pytest.raises(ValueError, match=r"backend 'native' has no kernel for Layout\(param=Tiled"):
        kernels.choose(*case, "native")


def test_tiles_that_the_kernels_do_not_know_are_left_to_the_eager_step() -> None:
    layout = any_batch((64, 96), 32).layout
    assert native.serves(layout, torch.bfloat16)
    assert isinstance(layout.param, Tiled)
    assert not native.serves(replace(layout, param=replace(layout.param, rows=256)), torch.bfloat16)
    assert not native.serves(replace(layout, param=replace(layout.param, columns=48)), torch.bfloat16)

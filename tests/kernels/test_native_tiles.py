"""The native step and the native reading of parameters in tiles: bit-equal to the definitions, on any components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from collage import Tiled, TiledTensor, kernels
from collage.kernels import Batch, Hyper, Inputs, Layout, eager, native
from collage.numerics import E5M2
from collage.storage import Expansion, Remainder, Rounded, expansion, rounded
from collage.storage.tensor import read
from comparing import Keeper, any_bits, any_rows, assert_same, bits, parameter, values

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
STRATEGIES = ("fp8", "fp8-native", "fp8-3", "naive-fp8")
# Rows that end in a tile less high, tiles of one row, widths that no vector divides, the narrowest tiles.
SHAPES = [((300, 128), 128), ((64, 96), 1), ((70, 100), 32), ((130, 256), 64), ((67, 68), 128)]
every_isa = pytest.mark.parametrize("isa", native.instruction_sets())
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
HYPER = Hyper(1e-2, 0.9, 0.95, 1e-8, 0.1)
UNUSUAL = Hyper(3.0, 0.5, 0.5, 0.0, 0.0, maximize=True)


def form_for(shape: tuple[int, int], rows: int, strategy: str) -> Tiled:
    storage = collage.strategies()[strategy].param
    assert isinstance(storage, Tiled)
    form = storage.fitted(torch.Size(shape))
    assert form is not None
    return replace(form, rows=rows)


def layout_for(shape: tuple[int, int], rows: int, strategy: str) -> Layout:
    form = form_for(shape, rows, strategy)
    return collage.strategies()[strategy].layout(torch.bfloat16, torch.Size(shape), form)


def any_component(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Of 8 bits any patterns: nan, zeros of both signs, numbers that no store writes."""
    return any_bits(shape, seed, torch.uint8).view(dtype) if dtype.itemsize == 1 else any_rows(shape, seed, dtype)


def ordinary_scale(scale: Tensor) -> Tensor:
    """A block's or a tile's, of any bits, near those that a store leaves."""
    return (scale % 40) + 110 if scale.dtype == torch.uint8 else scale.nan_to_num(1.0).abs().clamp(2.0**-94, 2.0**94)


def any_batch(shape: tuple[int, int], rows: int, strategy: str) -> Batch:
    """Two parameters: of any components and scales, and with ordinary scales and not the first of its tensor."""
    layout = layout_for(shape, rows, strategy)
    assert isinstance(layout.param, Tiled)
    params, states = [], []
    for i in range(2):
        components = [*layout.param.components(torch.bfloat16), *layout.components(torch.bfloat16).values()]
        found = [any_component(c.shape(torch.Size(shape)), 77 * i + n, c.dtype) for n, c in enumerate(components)]
        scaled = [c.name.endswith("_scale") for c in components]
        found = [ordinary_scale(part) if i and scale else part for part, scale in zip(found, scaled, strict=True)]
        count = len(layout.param.components(torch.bfloat16))
        params.append(TiledTensor(found[:count], layout.param))
        states.append(dict(zip(layout.components(torch.bfloat16), found[count:], strict=True)))
    return Batch(layout, "fp32", 2**63 + 5, params, states, torch.tensor([0.0, 5.0]), [3, 4], [0, 5 * rows * shape[1]])


def assert_steps_as_eager(
    isa: str, strategy: str, shape: tuple[int, int], rows: int, grad_dtype: torch.dtype, **options: Any
) -> None:
    """Two steps on gradients of any bits and one on ordinary ones, with ``options`` that are fields of Inputs."""
    batches = any_batch(shape, rows, strategy), any_batch(shape, rows, strategy)
    makes = (any_rows, any_rows, values)
    grads = [[make(shape, 10 * n + i, grad_dtype) for i in range(2)] for n, make in enumerate(makes)]
    hyper = options.pop("hyper", HYPER)
    assert_same_steps(isa, *batches, [Inputs(hyper, each, **options) for each in grads])


def assert_same_steps(isa: str, mine: Batch, eager: Batch, steps: list[Inputs]) -> None:
    """The native steps of one batch against the eager ones of its like."""
    assert native.serves(mine.layout, torch.bfloat16)
    for inputs in steps:
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


@every_strategy
@pytest.mark.parametrize("rows", [1, 8])
def test_tensors_step_as_in_the_eager_definition_where_its_pieces_end_within_rows(rows: int, strategy: str) -> None:
    shape = (300, 768)
    assert eager.CHUNK < 300 * 768
    assert eager.CHUNK % 768
    assert_steps_as_eager(native.instruction_sets()[0], strategy, shape, rows, torch.bfloat16, audit=True)


@every_isa
@every_strategy
@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_any_components_step_as_in_the_eager_definition(
    shape: tuple[int, int], rows: int, strategy: str, isa: str
) -> None:
    case = (isa, strategy, shape, rows)
    assert_steps_as_eager(*case, torch.bfloat16)
    assert_steps_as_eager(*case, torch.float32, audit=True)
    assert_steps_as_eager(*case, torch.bfloat16, audit=True, hyper=UNUSUAL, grad_scale=torch.tensor(3.0))


@every_isa
@every_strategy
def test_tiles_of_zeros_and_of_numbers_below_the_smallest_scale_step_as_in_the_eager_definition(
    strategy: str, isa: str
) -> None:
    shape = (70, 100)
    mine, eager = (any_batch(shape, 32, strategy) for _ in range(2))
    for batch in (mine, eager):
        for param, state in zip(batch.params, batch.states, strict=True):
            for role, storage in batch.layout.roles:
                storage.clear(batch.layout.parts(role, param, state))
    hyper = Hyper(1e-2, 0.9, 0.95, 1.0, 0.1)
    grads = [
        [values(shape, i, torch.float32) * 2.0**exponent for i in range(2)] for exponent in (-200, -140, -120, -60)
    ]
    assert_same_steps(isa, mine, eager, [Inputs(hyper, each, audit=True) for each in grads])


@every_strategy
def test_pieces_of_two_threads_are_whole_rows_of_tiles(strategy: str) -> None:
    torch.set_num_threads(2)
    assert_steps_as_eager(native.instruction_sets()[0], strategy, (600, 128), 128, torch.bfloat16, audit=True)


def one_more(exponent: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: exponent(*arguments) + 1


BROKEN = {
    "a scale twice as large": ("naive-fp8", Tiled, "_exponent", one_more(Tiled._exponent)),
    "a root that becomes 0": ("naive-fp8", Tiled, "_least", 0.0),
    "a lo kept 8 times": ("fp8-3", Expansion, "_factor", lambda *_: 8.0),
    "a lo to nearest": ("fp8-native", expansion, "round_stochastic_into", lambda x, out, *_: out.copy_(x)),
    "a root to nearest": ("fp8-native", rounded, "round_stochastic_into", lambda x, out, *_: out.copy_(x)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_definition_that_differs_in_one_thing_is_not_what_the_kernels_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, owner, attribute, value = BROKEN[name]
    monkeypatch.setattr(owner, attribute, value)
    with pytest.raises(AssertionError):
        assert_steps_as_eager(native.instruction_sets()[0], strategy, (70, 100), 32, torch.bfloat16)


@every_isa
@every_strategy
def test_optimizers_take_the_kernels_and_audit_what_the_eager_step_audits(
    strategy: str, isa: str, ran: list[str]
) -> None:
    found = []
    for backend in (None, "eager"):
        params = [nn.Parameter(parameter(values(shape, i), strategy)) for i, shape in enumerate([(300, 96), (40, 256)])]
        opt = collage.AdamW(params, lr=1e-4, weight_decay=0.1, strategy=strategy, backend=backend)
        keeper = Keeper()
        opt.add_observer(keeper)
        ran.clear()
        with native.using(isa):
            for step in range(3):
                for i, param in enumerate(params):
                    param.grad = values(tuple(param.shape), 10 * step + i)
                opt.step()
        assert set(ran) == {backend or "native"}
        found.append((opt, torch.stack([row.sums for row in keeper.rows])))
    (mine, sums), (eager, wanted) = found
    assert_same(mine, eager)
    # Sums are added up in another order; counts are exact.
    assert torch.equal(sums[:, 3:], wanted[:, 3:])
    assert ((sums[:, :3] - wanted[:, :3]).abs() <= 1e-12 * wanted[:, 2:3]).all()


@every_isa
@every_strategy
def test_every_pair_and_every_scale_is_read_as_defined(strategy: str, isa: str) -> None:
    form = replace(form_for((256, 256), 1, strategy), columns=128)
    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    column, row = (patterns.view(shape).expand(256, 256) for shape in ((256, 1), (1, 256)))
    numbers = [column, row, any_bits((256, 256), 3, torch.uint8)]
    dtypes = [component.dtype for component in form.components(torch.bfloat16)[:-1]]
    parts = [number.contiguous().view(dtype) for number, dtype in zip(numbers, dtypes, strict=False)]
    for shift in (0, 97):
        scale = torch.arange(512, dtype=torch.int32).add(shift).to(torch.uint8).view(256, 2)
        for forward in ("value", "hi"):
            tensor = TiledTensor([*parts, scale], form, forward)
            with native.using(isa):
                found = native.read(tensor)
            assert found is not None
            assert torch.equal(bits(found), bits(read(form, tensor.parts, forward)))


@every_strategy
def test_narrow_tiles_and_last_ones_less_high_are_read_as_defined(strategy: str) -> None:
    for shape, rows in SHAPES:
        tensor = any_batch(shape, rows, strategy).params[1]
        assert isinstance(tensor, TiledTensor)
        found = native.read(tensor)
        assert found is not None
        assert torch.equal(bits(found), bits(read(tensor.form, tensor.parts, "value")))


@pytest.mark.parametrize(
    "of",
    [Rounded(E5M2), Expansion(2, E5M2, scaled=True), Expansion(2, "e4m3fn"), Expansion(3, E5M2, scaled=True)],
    ids=str,
)
def test_tiles_of_other_numbers_step_and_are_read_eagerly(of: Rounded | Expansion) -> None:
    tensor = TiledTensor.of(values((128, 128), 0), Tiled(of, width=128))
    assert native.read(tensor) is None
    assert torch.equal(tensor.dequantize(), read(tensor.form, tensor.parts, "value"))
    layout = replace(layout_for((128, 128), 128, "fp8-3"), param=tensor.form)
    case = (layout, "fp32", torch.bfloat16, torch.device("cpu"))
    assert kernels.choose(*case, None) == "eager"
    with pytest.raises(ValueError, match=r"backend 'native' has no kernel for Layout\(param=Tiled"):
        kernels.choose(*case, "native")


@every_strategy
def test_tiles_that_the_kernels_do_not_know_are_left_to_the_eager_step(strategy: str) -> None:
    layout = layout_for((64, 96), 32, strategy)
    assert native.serves(layout, torch.bfloat16)
    assert isinstance(layout.param, Tiled)
    assert not native.serves(replace(layout, param=replace(layout.param, rows=256)), torch.bfloat16)
    assert not native.serves(replace(layout, param=replace(layout.param, columns=48)), torch.bfloat16)
    other = Tiled(Remainder(8, "e4m3fn"), width=96, columns=96)
    assert not native.serves(replace(layout, param=other), torch.bfloat16)
    if isinstance(layout.exp_avg, Tiled):
        assert not native.serves(replace(layout, exp_avg=replace(layout.exp_avg, rows=2)), torch.bfloat16)
        assert not native.serves(replace(layout, exp_avg=replace(layout.exp_avg, root=True)), torch.bfloat16)

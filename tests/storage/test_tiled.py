"""8-bit numbers beside a scale per tile: scales and values against exact rationals, and what must never happen."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from collage.storage import Blockwise, Expansion, Remainder, Rounded, Tiled
from comparing import bits as bits_of

FORMS = {
    "remainder": Tiled(Remainder(8, "e4m3fn", "stochastic"), 32, 32, width=96),
    "pair": Tiled(Expansion(2, "e4m3fn", "stochastic", True), 32, 32, width=96),
    "three": Tiled(Expansion(3, "e4m3fn", "nearest", True), 32, 32, width=96),
    "single": Tiled(Rounded("e4m3fn"), 32, 32, width=96),
    "e5m2": Tiled(Rounded("e5m2", "stochastic"), 32, 32, width=96),
    "root": Tiled(Rounded("e4m3fn", "stochastic"), 1, 32, True, 96),
    "root-three": Tiled(Expansion(3, "e4m3fn", "nearest", True), 1, 32, True, 96),
}
every_form = pytest.mark.parametrize("storage", FORMS.values(), ids=FORMS)
# Significand bits that a value near its tile's largest keeps at least.
KEPT = {"remainder": 11, "pair": 7, "three": 12, "single": 4, "e5m2": 2, "root": 2, "root-three": 11}
ROWS = 80


def new_parts(storage: Tiled, rows: int = ROWS) -> list[Tensor]:
    shape = torch.Size((rows, storage.width))
    return [torch.zeros(each.shape(shape), dtype=each.dtype) for each in storage.components(torch.bfloat16)]


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**16, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def stored(storage: Tiled, x: Tensor, seed: int = 0) -> list[Tensor]:
    parts = new_parts(storage, x.shape[0])
    flat = x.reshape(-1).clone()
    bits = draws(flat.numel(), seed) if storage.stochastic else None
    storage.store(flat, [part.view(-1) for part in parts], bits, torch.empty_like(flat))
    return parts


def loaded(storage: Tiled, parts: list[Tensor]) -> Tensor:
    return storage.load(parts, torch.empty(parts[0].shape, dtype=torch.float32))


def ordinary(storage: Tiled, spread: float = 2.0, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (rows, storage.width)
    x = torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))
    return x.square() if storage.root else x * 0.02


def tiles(storage: Tiled, x: Tensor) -> list[Tensor]:
    return [tile for band in x.split(storage.rows) for tile in band.split(storage.columns, 1)]


def values_per_tile(storage: Tiled, scale: Tensor) -> list[int]:
    return scale.flatten().int().tolist()


@every_form
def test_a_scale_is_the_least_power_of_two_that_cuts_nothing_off(storage: Tiled) -> None:
    x = ordinary(storage)
    top = Fraction(448 if storage.of.format.name == "e4m3fn" else 57344)  # type: ignore[union-attr]
    parts = stored(storage, x)
    for tile, code in zip(tiles(storage, x), values_per_tile(storage, parts[-1]), strict=True):
        largest = tile.abs().max()
        largest = Fraction((largest.double().sqrt().float() if storage.root else largest).item())
        scale = Fraction(2) ** (code - 127)
        assert scale / 2 * top < largest <= scale * top


@pytest.mark.parametrize("name", FORMS)
def test_values_are_kept_to_the_bits_that_the_components_have(name: str) -> None:
    storage = FORMS[name]
    x = ordinary(storage, 1.0)
    value = loaded(storage, stored(storage, x))
    largest = torch.cat([torch.full((tile.numel(),), tile.abs().max().item()) for tile in tiles(storage, x)])
    flat = torch.cat([tile.flatten() for tile in tiles(storage, x)])
    found = torch.cat([tile.flatten() for tile in tiles(storage, value)])
    near = flat.abs() > largest * 2.0**-8
    assert near.any()
    assert ((found - flat).abs()[near] <= flat.abs()[near] * 2.0 ** -(KEPT[name] - 1)).all()


@every_form
def test_a_load_and_a_store_change_no_value_whatever_the_draw(storage: Tiled) -> None:
    parts = stored(storage, ordinary(storage, 6.0))
    value = loaded(storage, parts)
    for seed in range(1, 4):
        again = stored(storage, value, seed)
        assert torch.equal(bits_of(loaded(storage, again)), bits_of(value))


def test_every_pair_and_every_scale_of_a_remainder_is_kept() -> None:
    """All 2^8 x 2^8 patterns, with scales from the smallest to the largest that a store gives."""
    storage = Tiled(Remainder(8, "e4m3fn", "stochastic"), 256, 256, width=256)
    hi = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(256, 1).expand(256, 256).contiguous()
    lo = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8).view(1, 256).expand(256, 256).contiguous()
    for scale in (1, 2, 28, 100, 127, 128, 200, 246):
        value = loaded(storage, [hi.view(torch.float8_e4m3fn), lo, torch.full((1, 1), scale, dtype=torch.uint8)])
        # The largest number goes on beyond itself in pairs that no store writes.
        top = 448 * 2.0 ** (scale - 127)
        value = value.clamp(-top, top)
        for bits in (draws(65536), torch.full((65536,), 2**16 - 1, dtype=torch.int32)):
            parts = new_parts(storage, 256)
            storage.store(value.flatten().clone(), [p.view(-1) for p in parts], bits, torch.empty(65536))
            assert parts[-1].item() == scale
            assert torch.equal(bits_of(loaded(storage, parts)), bits_of(value))


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_nan_and_spoils_no_other(storage: Tiled, bad: float) -> None:
    x = ordinary(storage)
    x[40, 50] = 0.0
    clean = loaded(storage, stored(storage, x))
    spoiled = x.clone()
    spoiled[40, 50] = bad
    value = loaded(storage, stored(storage, spoiled))
    assert value[40, 50].isnan()
    assert value.isnan().sum() == 1
    kept = ~value.isnan()
    # It counts for no scale.
    assert torch.equal(value[kept], clean[kept])


@every_form
def test_zeros_have_the_scale_one_and_clear_is_a_store_of_them(storage: Tiled) -> None:
    x = ordinary(storage)
    x[:32, :32] = 0.0
    parts = stored(storage, x)
    assert (loaded(storage, parts)[:32, :32] == 0).all()
    assert parts[-1][0, 0] == 127
    cleared = new_parts(storage)
    storage.clear(cleared)
    assert all(
        torch.equal(bits_of(a), bits_of(b)) for a, b in zip(cleared, stored(storage, torch.zeros_like(x)), strict=True)
    )


@every_form
@pytest.mark.parametrize("size", [2.0**-149, 2.0**-120, 1.6e38])
def test_the_ends_of_float32_neither_overflow_nor_vanish_into_nan(storage: Tiled, size: float) -> None:
    x = torch.full((32, 96), size)
    value = loaded(storage, stored(storage, x))
    assert value.isfinite().all()
    if size > 2.0**-149 or storage.root:
        assert ((value / size - 1).abs() < 0.6).all()


@pytest.mark.parametrize("name", ["root", "root-three"])
def test_nothing_positive_becomes_zero_in_a_root(name: str) -> None:
    storage = FORMS[name]
    x = torch.full((32, 96), 1e-30)
    x[:, 0] = 1.0
    assert (loaded(storage, stored(storage, x)) > 0).all()


def test_a_scale_that_grows_keeps_the_others_to_a_unit() -> None:
    storage = FORMS["remainder"]
    value = loaded(storage, stored(storage, ordinary(storage, 0.5)))
    value[0, 0] = 64.0
    kept = loaded(storage, stored(storage, value, 3))
    assert kept[0, 0] == 64.0
    # Elements of that tile are among the subnormals now: a unit is 2^-17 of the scale.
    assert ((kept - value).abs() <= 64.0 / 448 * 2 * 2.0**-17 + value.abs() * 2.0**-11).all()


@every_form
def test_pieces_store_what_the_whole_tensor_stores(storage: Tiled) -> None:
    x = ordinary(storage)
    whole, pieces = stored(storage, x), new_parts(storage)
    bits = draws(x.numel())
    components = storage.components(torch.bfloat16)
    for start in range(0, x.numel(), 32 * 96):
        end = min(start + 32 * 96, x.numel())
        value = x.view(-1)[start:end].clone()
        parts = [each.cut(part, start, end) for part, each in zip(pieces, components, strict=True)]
        storage.store(value, parts, bits[start:end] if storage.stochastic else None, torch.empty_like(value))
    assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(pieces, whole, strict=True))


@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((256, 768), 128),
        ((50257, 64), 64),
        ((100, 1000), 100),
        ((128,), None),
        ((4, 128), None),  # too small
        ((64, 1009), None),  # a prime
        ((2**20, 8192), 128),
    ],
)
def test_tiles_divide_a_row(shape: tuple[int, ...], columns: int | None) -> None:
    fitted = Tiled(Rounded("e4m3fn")).fitted(torch.Size(shape))
    assert (fitted and (fitted.columns, fitted.width)) == (columns and (columns, shape[1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tiled(Rounded("bf16")), "of e4m3fn or e5m2, got Rounded"),
        (lambda: Tiled(Rounded()), "of e4m3fn or e5m2"),
        (lambda: Tiled(Blockwise("root4")), "tiles hold Rounded, Expansion or Remainder"),
        (lambda: Tiled(Expansion(4, "e4m3fn", scaled=True)), r"2 or 3 components, got 4; .* such as Remainder\(16\)"),
        (lambda: Tiled(Rounded("e4m3fn"), 0), "at least 1 row .* got 0, 128"),
        (lambda: Tiled(Rounded("e4m3fn"), 1, 33), "even number of columns, got 1, 33"),
        (lambda: Tiled(Rounded("e4m3fn")).param_dtype(torch.float16), "keep parameters of torch.bfloat16, got"),
    ],
)
def test_what_no_tiles_can_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_scales_e5m2_overflows_and_e4m3_saturates() -> None:
    """Why tiles divide first: the formats' own ends."""
    for name, wanted in (("e5m2", math.inf), ("e4m3fn", 448.0)):
        part = torch.zeros(1, dtype=Rounded(name).components(torch.bfloat16)[0].dtype)
        Rounded(name).store(torch.tensor([1e6]), [part], None, torch.empty(1))
        assert part.float().item() == wanted
        storage = Tiled(Rounded(name), 1, 2, width=2)
        parts = [torch.zeros(1, 2, dtype=part.dtype), torch.zeros(1, 1, dtype=torch.uint8)]
        storage.store(torch.tensor([1e6, 1e6]), parts, None, torch.empty(2))
        assert ((loaded(storage, parts) / 1e6 - 1).abs() < 0.15).all()

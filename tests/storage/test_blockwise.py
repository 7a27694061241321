"""8-bit codes with a scale per block: operation by operation against exact rationals, and what must never happen."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from collage.storage import Blockwise
from comparing import bits as bits_of
from step_oracle import Arithmetic, nearest

FORMS = {
    f"{companding}-{rounding}": Blockwise(companding, 32, rounding)
    for companding in ("softsign", "root4")
    for rounding in ("nearest", "stochastic")
}
every_form = pytest.mark.parametrize("storage", FORMS.values(), ids=FORMS)
F = Arithmetic("fp32")
SMALLEST = {"softsign": 2.0**-118, "root4": 2.0**-94}


def new_parts(storage: Blockwise, count: int) -> list[Tensor]:
    codes, scales = storage.components(torch.bfloat16)
    return [torch.zeros(count, dtype=codes.dtype), torch.zeros(count // storage.block, dtype=scales.dtype)]


def draws(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**16, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def stored(storage: Blockwise, x: Tensor, seed: int = 0) -> list[Tensor]:
    parts = new_parts(storage, x.numel())
    storage.store(x.clone(), parts, draws(x.numel(), seed) if storage.stochastic else None, torch.empty_like(x))
    return parts


def loaded(storage: Blockwise, parts: list[Tensor]) -> Tensor:
    return storage.load(parts, torch.empty(parts[0].shape, dtype=torch.float32))


def spread(storage: Blockwise, count: int, low: float, high: float, seed: int = 0) -> Tensor:
    """Of magnitudes 2**low to 2**high; of both signs where the storage has them."""
    rng = random.Random(seed)
    sign = [rng.choice([-1, 1]) if storage.signed else 1 for _ in range(count)]
    return torch.tensor([s * 2 ** rng.uniform(low, high) for s in sign], dtype=torch.float64).float()


# ---- the definition ------------------------------------------------------------------------------------------------


def oracle_value(companding: str, code: int, scale: float) -> float:
    if companding == "softsign":
        return F.mul(F.div(float(code), 254.0 - abs(code)), scale)
    w = F.mul(float(code), nearest(1 / 255, "fp32"))
    w = F.mul(w, w)
    return F.mul(F.mul(w, w), scale)


def oracle_codes(storage: Blockwise, x: list[float], bits: list[int] | None) -> tuple[list[int], float]:
    """Codes and scale of one block."""
    largest = max(max(map(abs, x)), SMALLEST[storage.companding])
    if any(map(math.isnan, x)) or largest >= (2.0**127 if storage.signed else math.inf):
        return [0] * len(x), math.nan
    codes = []
    for i, value in enumerate(x):
        if storage.signed:
            t = min(F.mul(F.div(abs(value), F.add(abs(value), largest)), 254.0), 127.0)
        else:
            factor = F.div(255.0, F.sqrt(F.sqrt(largest)))
            t = min(F.mul(F.sqrt(F.sqrt(value)), factor), 255.0)
        code = near = round(t)
        if bits is not None and abs(t - near) > near * 2.0**-20:
            code = math.floor(F.add(t, bits[i] / 2**16))
        if not storage.signed and value > 0:
            code = max(code, 1)
        codes.append(-code if value < 0 else code)
    return codes, largest


@every_form
@pytest.mark.parametrize(
    ("low", "high"), [(-3, 0), (-30, 5), (-149, -100), (-149, -90), (90, 126), (0, 0.0001)], ids=lambda x: str(x)
)
def test_codes_scales_and_values_are_the_oracles(storage: Blockwise, low: float, high: float) -> None:
    x = spread(storage, 256, low, high)
    x[::17] = 0.0
    x[64:96] = 0.0
    codes, scales = stored(storage, x, 3)
    bits = draws(256, 3).tolist() if storage.stochastic else None
    for block in range(8):
        span = slice(32 * block, 32 * block + 32)
        wanted, scale = oracle_codes(storage, x[span].double().tolist(), None if bits is None else bits[span])
        assert codes[span].tolist() == wanted
        assert scales[block].item() == scale
    values = loaded(storage, [codes, scales]).double().tolist()
    assert values == [
        oracle_value(storage.companding, code, scales[i // 32].double().item()) for i, code in enumerate(codes.tolist())
    ]


@pytest.mark.parametrize(
    "storage", [FORMS["softsign-stochastic"], FORMS["root4-stochastic"]], ids=["softsign", "root4"]
)
def test_every_code_is_kept_with_every_kind_of_scale_whatever_the_draw(storage: Blockwise) -> None:
    """Nothing changes where nothing was updated: all codes, scales of every exponent that a store gives."""
    storage = Blockwise(storage.companding, 256)
    dtype = storage.components(torch.bfloat16)[0].dtype
    one = torch.arange(-127, 129) if storage.signed else torch.arange(256)
    one = torch.where(one > 127, 127, one) if storage.signed else one
    rng = random.Random(0)
    lowest, highest = (-118, 126) if storage.signed else (-94, 127)
    exponents = [e for e in range(lowest, highest + 1) for _ in range(4)]
    scales = torch.tensor([2.0**e * rng.uniform(1, 2 - 2**-23) for e in exponents], dtype=torch.float64).float()
    codes = one.repeat(len(scales)).to(dtype)
    for seed in (1, 2):
        again = stored(storage, loaded(storage, [codes, scales]), seed)
        assert torch.equal(again[1], scales)
        assert torch.equal(again[0], codes)
    # Draws that round up whenever anything does.
    parts = new_parts(storage, codes.numel())
    value = loaded(storage, [codes, scales])
    storage.store(value, parts, torch.full(codes.shape, 2**16 - 1, dtype=torch.int32), torch.empty_like(value))
    assert torch.equal(parts[0], codes)


def test_the_factor_of_a_code_gives_its_largest_one_exactly() -> None:
    storage = Blockwise("root4", 32)
    codes, scale = torch.full((32,), 255, dtype=torch.uint8), torch.tensor([0.1])
    assert (loaded(storage, [codes, scale]) == 0.1).all()


# ---- what must never happen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("value", [1e-3, 1e-12, 1e-30, 2.0**-149])
def test_nothing_positive_loads_as_zero_in_a_second_moment(rounding: str, value: float) -> None:
    storage = Blockwise("root4", 32, rounding)
    x = torch.full((32,), value)
    x[0] = 1.0
    for largest in (1.0, value):
        x[0] = largest
        assert (loaded(storage, stored(storage, x)) > 0).all()


@every_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**127])
def test_a_block_with_a_number_that_is_not_finite_is_nan_and_no_other_is(storage: Blockwise, bad: float) -> None:
    if not storage.signed and bad in (-math.inf, 2.0**127):
        pytest.skip("no second moment is negative, and 2**127 is one")
    x = spread(storage, 96, -3, 0)
    clean = stored(storage, x)
    x[40] = bad
    parts = stored(storage, x)
    assert parts[1].isnan().tolist() == [False, True, False]
    assert not parts[0][32:64].any()
    assert loaded(storage, parts)[32:64].isnan().all()
    for spoiled, whole in zip(parts, clean, strict=True):
        entries = len(whole) // 3
        assert torch.equal(spoiled[:entries], whole[:entries])
        assert torch.equal(spoiled[2 * entries :], whole[2 * entries :])
    # It stays so until other values are stored.
    assert stored(storage, loaded(storage, parts))[1].isnan().tolist() == [False, True, False]


@every_form
def test_a_block_whose_largest_number_grows_keeps_the_others_within_a_code(storage: Blockwise) -> None:
    x = spread(storage, 32, -2, 0, 5)
    value = loaded(storage, stored(storage, x))
    for grown in (2.0, 64.0):
        value[0] = grown
        kept = loaded(storage, stored(storage, value, 7))
        assert kept[0].item() == grown
        # The spacing of the codes around a share r of the largest number: of the companded value, 1/127 and 1/255.
        share = (value.double() / grown).abs()
        step = (1 + share) ** 2 / 254 if storage.signed else 4 * share**0.75 / 255
        width = 1.0 if storage.stochastic else 0.5
        assert ((kept.double() - value.double()).abs()[1:] <= width * (1.1 * step * grown)[1:] + 2.0**-20).all()


@every_form
def test_zeros_are_kept_and_clear_is_a_store_of_them(storage: Blockwise) -> None:
    parts, cleared = stored(storage, torch.zeros(64)), new_parts(storage, 64)
    cleared[0].fill_(3)
    storage.clear(cleared)
    assert all(torch.equal(a, b) for a, b in zip(parts, cleared, strict=True))
    assert not loaded(storage, parts).any()


@pytest.mark.parametrize("name", ["softsign-stochastic", "root4-stochastic"])
def test_the_mean_code_over_all_draws_is_the_companded_value(name: str) -> None:
    storage = Blockwise(FORMS[name].companding, 2**16)
    x = torch.full((2**16,), 0.3)
    x[0] = 1.0
    parts = new_parts(storage, 2**16)
    storage.store(x.clone(), parts, torch.arange(2**16, dtype=torch.int32), torch.empty_like(x))
    wanted = 254 * 0.3 / 1.3 if storage.signed else 255 * 0.3**0.25
    mean = parts[0][1:].double().mean().item()
    assert mean == pytest.approx(wanted, abs=2.0**-12)
    assert len(parts[0][1:].unique()) == 2


@pytest.mark.parametrize("companding", ["softsign", "root4"])
def test_a_small_change_moves_a_code_on_average_and_never_to_nearest(companding: str) -> None:
    """A decay of 2**-10 a step: rounded to nearest beside a constant largest number it stands still."""
    means = {}
    for rounding in ("nearest", "stochastic"):
        storage = Blockwise(companding, 1024, rounding)
        x = torch.full((1024 * 8,), 0.01)
        x[::1024] = 1.0
        parts = stored(storage, x)
        start = loaded(storage, parts)[1:1024].double().mean()
        for step in range(200):
            value = loaded(storage, parts) * (1 - 2.0**-10)
            value[::1024] = 1.0
            storage.store(
                value, parts, draws(value.numel(), step) if storage.stochastic else None, torch.empty_like(value)
            )
        kept = loaded(storage, parts).view(8, 1024)[:, 1:].double().mean()
        means[rounding] = (kept / start).item()
    assert means["nearest"] == 1.0
    assert means["stochastic"] == pytest.approx((1 - 2.0**-10) ** 200, rel=0.05)


# ---- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((64, 768), 128),
        ((1024, 976), 122),
        ((64, 1000), 100),
        ((100, 64), 64),
        ((64, 32, 3, 3), 96),
        ((64, 96), 96),
        ((40, 1009), None),  # a prime
        ((4096, 30), None),  # rows too short
        ((5000,), None),
        ((), None),
        ((4, 128), None),  # too small
        ((0, 128), None),
        ((33, 3 * 5 * 7 * 11), None),  # no even divisor
        ((2**20, 8192), 128),  # more than 2**32 elements
        ((2**21, 122 * 33), None),
    ],
)
def test_a_block_divides_a_row(shape: tuple[int, ...], block: int | None) -> None:
    fitted = Blockwise("softsign").fitted(torch.Size(shape))
    assert (fitted and fitted.block) == block


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blockwise("linear"), "companding must be 'softsign' or 'root4', got 'linear'"),
        (lambda: Blockwise("root4", 0), "an even number of elements, got 0"),
        (lambda: Blockwise("root4", 33), "an even number of elements, got 33"),
        (lambda: Blockwise("root4", rounding="up"), "'nearest' or 'stochastic', got 'up'"),
        (lambda: Blockwise("root4", format="bf16"), "follows from the companding"),
    ],
)
def test_what_no_blocks_can_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_pieces_store_what_the_whole_tensor_stores() -> None:
    for storage in FORMS.values():
        x = spread(storage, 320, -8, 2)
        whole, pieces = stored(storage, x), new_parts(storage, 320)
        bits = draws(320)
        for start in range(0, 320, 64):
            value = x[start : start + 64].clone()
            parts = [pieces[0][start : start + 64], pieces[1][start // 32 : start // 32 + 2]]
            storage.store(
                value, parts, bits[start : start + 64] if storage.stochastic else None, torch.empty_like(value)
            )
        assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(pieces, whole, strict=True))

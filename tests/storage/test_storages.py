"""What every storage promises. A new storage joins with one row of ``ROWS``."""

from __future__ import annotations

import math
import random
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from torch import Tensor

from collage.numerics import BF16, FORMATS, FP32, Format, format_of, is_normalized
from collage.storage import Expansion, Kahan, Master, Remainder, Rounded, Storage
from comparing import bits as bits_of
from step_oracle import nearest, stochastic, store_pair

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Row:
    """A storage and what it must be seen to do.

    Attributes:
        storage: the record.
        names: of its components as the parameter, then as the second moment.
        bytes: per element, for 16-bit parameters.
        kept_bits: significand bits that a store keeps at least (24: float32 is kept exactly), for bf16.
        keeps_components: whether storing what was loaded changes no component, not merely no value.
        extra_bits: significand bits kept in fp16 beyond those in bf16.
        dtypes: the 16-bit dtypes of parameters that it serves.
    """

    storage: Storage
    names: tuple[tuple[str, ...], tuple[str, ...]]
    bytes: float
    kept_bits: int
    keeps_components: bool = True
    extra_bits: int = 2
    dtypes: tuple[torch.dtype, ...] = HALF


def pairs(*suffixes: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    first, second = (tuple(role + suffix for suffix in ("", *suffixes)) for role in ("param", "exp_avg_sq"))
    return first, second


ROWS = {
    "rounded": Row(Rounded(), pairs(), 2, 8),
    "rounded-stochastic": Row(Rounded(rounding="stochastic"), pairs(), 2, 7),
    "rounded-fp32": Row(Rounded(FP32), pairs(), 4, 24),
    "rounded-e4m3": Row(Rounded("e4m3fn"), pairs(), 1, 4),
    "rounded-e5m2-stochastic": Row(Rounded("e5m2", "stochastic"), pairs(), 1, 2),
    "expansion-2": Row(Expansion(), pairs("_lo"), 4, 16),
    "expansion-2-stochastic": Row(Expansion(rounding="stochastic"), pairs("_lo"), 4, 15),
    "expansion-3": Row(Expansion(3), pairs("_lo", "_lo2"), 6, 24),
    "expansion-3-stochastic": Row(Expansion(3, rounding="stochastic"), pairs("_lo", "_lo2"), 6, 24),
    "expansion-4": Row(Expansion(4), pairs("_lo", "_lo2", "_lo3"), 8, 24),
    "expansion-2-fp32": Row(Expansion(2, FP32), pairs("_lo"), 8, 24),
    "expansion-2-e4m3": Row(Expansion(2, torch.float8_e4m3fn), pairs("_lo"), 2, 8),
    "kahan": Row(Kahan(), pairs("_lo"), 4, 16, keeps_components=False),
    "expansion-2-scaled": Row(Expansion(scaled=True), pairs("_lo"), 4, 16, extra_bits=5),
    "expansion-2-scaled-stochastic": Row(Expansion(2, None, "stochastic", True), pairs("_lo"), 4, 15, extra_bits=5),
    "remainder-16": Row(Remainder(16), pairs("_remainder"), 4, 24, dtypes=(torch.bfloat16,)),
    "remainder-8": Row(Remainder(8), pairs("_remainder"), 3, 16, extra_bits=3),
    "remainder-8-stochastic": Row(Remainder(8, None, "stochastic"), pairs("_remainder"), 3, 15, extra_bits=3),
    "remainder-4": Row(Remainder(4), pairs("_remainder"), 2.5, 12, extra_bits=3),
    "remainder-4-stochastic": Row(Remainder(4, None, "stochastic"), pairs("_remainder"), 2.5, 11, extra_bits=3),
    "master": Row(Master(), (("param", "master_param"), ("exp_avg_sq", "master_exp_avg_sq")), 6, 24),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
SERVED = {f"{name}-{format_of(dtype).name}": (row, dtype) for name, row in ROWS.items() for dtype in row.dtypes}
every_case = pytest.mark.parametrize(("row", "dtype"), SERVED.values(), ids=SERVED)


def leading(row: Row, dtype: torch.dtype) -> Format:
    return format_of(row.storage.components(dtype)[0].dtype)


def new_parts(storage: Storage, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.zeros(count // c.elements, dtype=c.dtype) for c in storage.components(dtype)]


def random_draws(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**16, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def stored(storage: Storage, x: Tensor, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    parts = new_parts(storage, dtype, x.numel())
    bits = random_draws(x.numel(), seed) if storage.stochastic else None
    storage.store(x.clone(), parts, bits, torch.empty_like(x))
    return parts


def loaded(storage: Storage, parts: list[Tensor]) -> Tensor:
    return storage.load(parts, torch.empty(parts[0].shape, dtype=torch.float32))


def ordinary(fmt: Format, count: int = 4096) -> Tensor:
    """float32 numbers well inside the normal range of a format, uneven ones and ties among them."""
    generator = torch.Generator().manual_seed(1)
    spread = min(6.0, math.log2(fmt.max) - 2)
    scale = torch.exp2((torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * spread)
    x = torch.randn(count, generator=generator, dtype=torch.float64) * scale
    ties = torch.arange(-64, 64, dtype=torch.float64) / 64 + 2.0 ** -torch.arange(128, dtype=torch.float64).remainder(
        24
    )
    return torch.cat([x, ties, torch.tensor([0.0, 1.0, -1.0, 2.0])]).float()


@every_case
def test_bytes_names_and_dtypes_are_those_of_the_real_tensors(row: Row, dtype: torch.dtype) -> None:
    storage = row.storage
    parts = new_parts(storage, dtype, 1024)
    assert sum(part.numel() * part.element_size() for part in parts) / 1024 == storage.bytes_per_element(dtype)
    assert storage.bytes_per_element(dtype) == row.bytes
    assert (storage.state_names("param", dtype), storage.state_names("exp_avg_sq", dtype)) == row.names
    if storage.format is None:
        assert storage.components(dtype)[0].dtype == dtype


@every_case
def test_what_was_stored_loads_within_the_bits_it_keeps(row: Row, dtype: torch.dtype) -> None:
    fmt = leading(row, dtype)
    x = ordinary(fmt)
    value = row.storage.exact(stored(row.storage, x, dtype))
    assert value.dtype == torch.float64
    kept = (
        row.kept_bits if dtype == torch.bfloat16 or row.storage.format is not None else row.kept_bits + row.extra_bits
    )
    # Components of a narrow exponent range underflow: half a smallest subnormal, a whole one when stochastic.
    floor = 0.0 if kept >= 24 and fmt.emin < -100 else fmt.smallest_subnormal
    relative = 0.0 if row.kept_bits >= 24 else 2.0**-kept
    assert ((value - x.double()).abs() <= (relative * x.double().abs()).clamp(min=floor)).all()


@every_case
def test_load_is_the_stored_value_rounded_once_to_float32(row: Row, dtype: torch.dtype) -> None:
    parts = stored(row.storage, ordinary(leading(row, dtype)), dtype)
    before = [bits_of(part).clone() for part in parts]
    out = torch.full(parts[0].shape, torch.nan)
    assert row.storage.load(parts, out) is out
    assert torch.equal(out, row.storage.exact(parts).float())
    assert all(torch.equal(bits_of(part), old) for part, old in zip(parts, before, strict=True))


@every_case
def test_storing_what_was_loaded_changes_nothing_whatever_the_draw(row: Row, dtype: torch.dtype) -> None:
    parts = stored(row.storage, ordinary(leading(row, dtype)), dtype)
    for seed in (1, 2):
        again = stored(row.storage, loaded(row.storage, parts), dtype, seed)
        assert torch.equal(row.storage.exact(again), row.storage.exact(parts))
        assert not row.storage.moved(again, parts).any() or not row.keeps_components
        if row.keeps_components:
            # The sign of a zero residual is not specified.
            assert all(torch.equal(a.double(), b.double()) for a, b in zip(again, parts, strict=True))


@every_case
def test_pieces_store_what_the_whole_tensor_stores(row: Row, dtype: torch.dtype) -> None:
    x = ordinary(leading(row, dtype), 1000)
    whole = stored(row.storage, x, dtype)
    pieces = new_parts(row.storage, dtype, x.numel())
    draws = random_draws(x.numel())
    for start in range(0, x.numel(), 64):
        span = slice(start, start + 64)
        value = x[span].clone()
        parts = [
            p[span.start // c.elements : span.stop // c.elements]
            for p, c in zip(pieces, row.storage.components(dtype), strict=True)
        ]
        row.storage.store(value, parts, draws[span] if row.storage.stochastic else None, torch.empty_like(value))
    assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(pieces, whole, strict=True))


@every_case
def test_moved_is_the_difference_and_zero_only_where_nothing_changed(row: Row, dtype: torch.dtype) -> None:
    x = ordinary(leading(row, dtype))
    before, after = (
        stored(row.storage, y, dtype) for y in (x, x * torch.where(torch.arange(x.numel()) % 2 == 0, 1, 1.1))
    )
    moved = row.storage.moved(after, before)
    assert moved.dtype == torch.float64
    assert torch.equal(moved, row.storage.exact(after) - row.storage.exact(before))
    if row.keeps_components and not row.storage.stochastic and row.bytes != 2.5:
        kept_copy = 1 if isinstance(row.storage, Master) else 0
        changed = torch.stack([a.double() != b.double() for a, b in zip(after, before, strict=True)][kept_copy:]).any(0)
        assert torch.equal(moved != 0, changed)


@every_case
def test_special_values_stand_in_the_leading_component_alone(row: Row, dtype: torch.dtype) -> None:
    fmt = leading(row, dtype)
    specials = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3e38, -3e38, 1.0]
    parts = stored(row.storage, torch.tensor(specials), dtype)
    hi = parts[0].double().tolist()
    value = loaded(row.storage, parts).tolist()
    top = fmt.max if fmt.saturates else torch.inf
    assert hi[:2] == [top, -top]
    assert math.isnan(hi[2])
    assert math.isnan(value[2])
    assert hi[3:5] == value[3:5] == [0.0, 0.0]
    if isinstance(row.storage, Master):
        assert value[:2] == [torch.inf, -torch.inf]
    else:
        assert value[:2] == [top, -top]
        for low in parts[1:]:
            assert not low[: 5 if len(low) == len(specials) else 2].any()
    if fmt.max < 3e38:
        assert hi[5:7] == [top, -top]


@every_row
def test_a_step_adds_the_update_to_the_value(row: Row) -> None:
    x = ordinary(leading(row, torch.bfloat16), 500)
    parts = stored(row.storage, x, torch.bfloat16)
    value, update = loaded(row.storage, parts), torch.full_like(x, 0.125)
    wanted = row.storage.exact(parts) + 0.125
    draws = random_draws(x.numel(), 5) if row.storage.stochastic else None
    row.storage.add(parts, value.clone(), update, draws, torch.empty_like(x))
    error = (row.storage.exact(parts) - wanted).abs()
    relative = 2.0 ** -(min(row.kept_bits, 23) - 1)
    # Kahan rounds the update itself, and the movement, to the format.
    absolute = 2.0**-7 * 0.125 if isinstance(row.storage, Kahan) else leading(row, torch.bfloat16).smallest_subnormal
    assert (error <= relative * wanted.abs() + absolute).all()


def test_a_storage_without_working_arithmetic_says_so() -> None:
    master, kahan = (new_parts(storage, torch.bfloat16, 4) for storage in (Master(), Kahan()))
    calls = (
        lambda: Master().working_add(master, master[0]),
        lambda: Master().working_average(master, 0.9, master[0]),
        lambda: Kahan().working_average(kahan, 0.9, kahan[0]),
    )
    for call in calls:
        with pytest.raises(TypeError, match="arithmetic='fp32'"):
            call()


def test_the_storages_with_working_arithmetic_are_those_to_nearest_in_the_parameters_own_format() -> None:
    able = [name for name, row in ROWS.items() if row.storage.has_working_arithmetic]
    assert able == ["rounded", "expansion-2", "expansion-3", "expansion-4", "kahan"]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_expansions_of_any_length_work_in_their_own_format(n: int, dtype: torch.dtype) -> None:
    parts = stored(Expansion(n), torch.tensor([1.0]), dtype)
    ulp = torch.finfo(dtype).eps
    for _ in range(8):
        Expansion(n).working_add(parts, torch.tensor([ulp / 16], dtype=dtype))
    assert Expansion(n).exact(parts).item() == 1 + ulp / 2
    Expansion(n).working_average(parts, 0.5, torch.tensor([0.25], dtype=dtype))
    assert Expansion(n).exact(parts).item() == 0.75 + ulp / 4


# ---- the pair, exhaustively ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("lead", [0x3F80, 0x3F81, 0x3FFF, 0xBF80, 0x4248, 0x0080, 0x0081, 0x7F7E])
def test_pairs_are_normalised_for_every_float32_under_a_bf16(lead: int, rounding: str) -> None:
    tails = torch.arange(2**16, dtype=torch.int64) + (lead << 16)
    x = torch.where(tails >= 2**31, tails - 2**32, tails).to(torch.int32).view(torch.float32)
    storage = Expansion(2, rounding=rounding)
    hi, lo = stored(storage, x, torch.bfloat16)
    assert torch.equal((hi.double() + lo.double()).float().to(torch.bfloat16), hi)
    assert is_normalized((hi, lo)).all()


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_pairs_are_the_oracles_also_at_ties_and_range_ends(fmt: str) -> None:
    rng = random.Random(0)
    info = torch.finfo(format_of(fmt).dtype)
    tie = 1 + info.eps / 2
    edges = [tie, tie - 2**-23, tie + 2**-23, tie + info.eps, 2 - info.eps / 2, -(2 - info.eps / 2), 2 - 2**-23]
    edges += [float(torch.tensor(info.max).float()), info.tiny, info.tiny * 1.01, info.smallest_normal / 3, 2.0**-24]
    xs = edges + [nearest(rng.choice([1, -1]) * 10 ** rng.uniform(-6, 4), "fp32") for _ in range(600)]
    x = torch.tensor(xs, dtype=torch.float64).float()
    for draws in (None, random_draws(len(xs))):
        parts = new_parts(Expansion(), format_of(fmt).dtype, len(xs))
        Expansion().store(x.clone(), parts, None if draws is None else draws.clone(), torch.empty_like(x))
        wanted = [store_pair(v, fmt, None if draws is None else int(draws[i])) for i, v in enumerate(x.tolist())]
        assert list(zip(*(p.double().tolist() for p in parts), strict=True)) == wanted


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float8_e4m3fn, torch.float8_e5m2])
def test_longer_expansions_are_normalised_too(n: int, rounding: str, dtype: torch.dtype) -> None:
    storage = Expansion(n, dtype, rounding)
    parts = stored(storage, ordinary(format_of(dtype)), torch.bfloat16)
    assert is_normalized(tuple(parts)).all()


# ---- unbiased ------------------------------------------------------------------------------------------------------

UNBIASED = {name: row for name, row in ROWS.items() if row.storage.stochastic and row.storage.format is None}


@pytest.mark.parametrize("row", UNBIASED.values(), ids=UNBIASED)
@pytest.mark.parametrize("x", [1.2345678, -0.031249998, 1 + 2**-8 - 2**-23, 3.0e-5, 2 - 2**-20, 255.99998, 1e-30])
def test_the_mean_over_all_draws_is_the_value_exactly(row: Row, x: float) -> None:
    x32 = torch.full((2**16,), x, dtype=torch.float64).float()
    parts = new_parts(row.storage, torch.bfloat16, 2**16)
    row.storage.store(x32.clone(), parts, torch.arange(2**16, dtype=torch.int32), torch.empty_like(x32))
    assert row.storage.exact(parts).mean().item() == x32[0].double().item()


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3fn", "e5m2"])
def test_a_stochastic_rounding_is_the_oracles(fmt: str) -> None:
    rng = random.Random(fmt)
    top = float(format_of(fmt).max)
    xs = [0.0, -0.0, 1.0, top, -top, *(nearest(10 ** rng.uniform(-6, 3), "fp32") for _ in range(500))]
    draws = random_draws(len(xs))
    x = torch.tensor(xs, dtype=torch.float64).float()
    parts = new_parts(Rounded(fmt, "stochastic"), torch.bfloat16, len(xs))
    Rounded(fmt, "stochastic").store(x.clone(), parts, draws.clone(), torch.empty_like(x))
    wanted = [stochastic(v, fmt, int(draws[i])) for i, v in enumerate(x.tolist())]
    assert torch.equal(parts[0].double(), torch.tensor(wanted, dtype=torch.float64))


# ---- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Rounded, lambda f: Expansion(2, f), Kahan, Master])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_format_may_be_given_by_record_dtype_or_name(make, fmt: Format) -> None:
    assert make(fmt) == make(fmt.dtype) == make(fmt.name)
    assert hash(make(fmt)) == hash(make(fmt.name))
    assert make(fmt) != make(None)
    assert make(fmt).format_for(torch.bfloat16) is fmt
    assert make(None).format_for(torch.bfloat16) is BF16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Expansion(1), "2, 3 or 4 components, got 1"),
        (lambda: Expansion(5), "got 5"),
        (lambda: Expansion(2, rounding="up"), "'nearest' or 'stochastic', got 'up'"),
        (lambda: Rounded(rounding="floor"), "got 'floor'"),
        (lambda: Rounded("bf17"), "bf17 is not a format"),
        (lambda: Kahan(torch.int8), "torch.int8 is not a format"),
        (lambda: Master(torch.float64), "allowed: bf16"),
    ],
)
def test_what_no_storage_can_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every_row
def test_storages_are_frozen(row: Row) -> None:
    with pytest.raises(FrozenInstanceError):
        row.storage.format = None  # type: ignore[misc]

"""A 16-bit number and the bits behind it: every pair of hi and remainder, every rounding, against exact rationals."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from collage.numerics import (
    BF16,
    E4M3FN,
    FP16,
    FP32,
    Format,
    check_extra,
    join_remainder,
    pack_nibbles,
    split_remainder,
    unpack_nibbles,
)
from comparing import bits as bits_of
from step_oracle import FORMATS as ORACLE
from step_oracle import SATURATING, spacing

CASES = [(BF16, 16), (BF16, 8), (BF16, 4), (BF16, 1), (FP16, 13), (FP16, 8), (FP16, 4), (FP16, 1)]
CASES += [(E4M3FN, 20), (E4M3FN, 16), (E4M3FN, 8), (E4M3FN, 1)]
INTEGERS = {1: torch.int8, 2: torch.int16}
every_case = pytest.mark.parametrize(("fmt", "extra"), CASES, ids=[f"{fmt.name}+{extra}" for fmt, extra in CASES])


def every_pattern(fmt: Format) -> Tensor:
    half = 2 ** (8 * fmt.bytes - 1)
    return torch.arange(-half, half, dtype=torch.int32).to(INTEGERS[fmt.bytes]).view(fmt.dtype)


def remainders(extra: int, most: int) -> list[int]:
    """All of them, or the ends and some of the others."""
    half = 2 ** (extra - 1)
    if 2 * half <= most:
        return list(range(-half, half))
    edges = {-half, -half + 1, -half // 2, -1, 0, 1, half // 2, half - 2, half - 1}
    return sorted(edges | set(random.Random(extra).sample(range(-half, half), most // 8)))


def wide_spacing(x: Fraction, fmt: str, extra: int) -> Fraction:
    """The distance of the numbers around x where the format has ``extra`` bits more."""
    return spacing(x, fmt) / 2**extra


def rounded(x: float, fmt: str, extra: int, draw: int | None) -> float:
    """By the definition: a multiple of the spacing at x, beyond the largest of which is infinity."""
    if not math.isfinite(x):
        return math.copysign(float(ORACLE[fmt][2]), x) if fmt in SATURATING and math.isinf(x) else x
    q = wide_spacing(Fraction(x), fmt, extra)
    steps = abs(Fraction(x)) / q
    whole = round(steps) if draw is None else math.floor(steps + Fraction(draw, 2**16))
    precision, _, largest = ORACLE[fmt]
    beyond = largest + Fraction(2) ** (math.floor(math.log2(largest)) - precision + 1)
    if fmt in SATURATING:
        return math.copysign(float(min(whole * q, largest)), x)
    return math.copysign(float(whole * q) if whole * q < beyond else math.inf, x)


def float32s(fmt: Format, count: int = 3000) -> Tensor:
    """Numbers of every magnitude of the format, ties of both roundings, and what is beyond it."""
    rng = random.Random(fmt.name)
    top, low = math.log2(fmt.max), math.log2(fmt.smallest_subnormal) - 12
    values = [rng.choice([-1, 1]) * 2 ** rng.uniform(max(low, -148), top) for _ in range(count)]
    patterns = torch.tensor([rng.randrange(2 ** (8 * fmt.bytes - 1)) for _ in range(count)], dtype=torch.int32)
    hi = patterns.to(INTEGERS[fmt.bytes]).view(fmt.dtype).float()
    ties = [float(h) + float(fmt.ulp(h)) * rng.choice([0.5, -0.5, 0.25]) for h in hi if torch.isfinite(h)]
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, fmt.max, -fmt.max, fmt.max * (1 + 2.0**-13), 3.4e38, 2.0**-149]
    return torch.tensor([*values, *ties, *special], dtype=torch.float64).float()


@every_case
def test_every_pair_is_the_number_between_the_neighbours_of_hi(fmt: Format, extra: int) -> None:
    hi = every_pattern(fmt)
    hi = hi[hi.float().isfinite() & (hi.float() != 0)]
    for lo in remainders(extra, 64):
        found = join_remainder(hi, torch.full(hi.shape, lo, dtype=torch.int32), extra).double()
        # A remainder goes toward the neighbour on its side, in 2**-extra of the way there.
        patterns = hi.view(INTEGERS[fmt.bytes]).int()
        neighbour = (patterns + (1 if lo >= 0 else -1)).to(INTEGERS[fmt.bytes]).view(fmt.dtype).double()
        top = math.copysign(1.0, lo) * 2.0 ** (fmt.emax - fmt.precision + 1)
        neighbour = torch.where(
            ~neighbour.isfinite(), hi.double() + torch.copysign(torch.tensor(top), hi.double()), neighbour
        )
        assert torch.equal(found, hi.double() + (neighbour - hi.double()) * (abs(lo) * 2.0**-extra))


@every_case
def test_every_pair_that_is_a_number_splits_into_itself(fmt: Format, extra: int) -> None:
    hi = every_pattern(fmt)
    for lo in remainders(extra, 256):
        remainder = torch.full(hi.shape, lo, dtype=torch.int32)
        value = join_remainder(hi, remainder, extra)
        again_hi, again_lo = split_remainder(value, fmt, extra)
        # No split gives a zero with a negative remainder, or what joins to nan or infinity with one.
        foreign = (hi.float() == 0) & (lo < 0) | ~value.isfinite()
        if fmt.saturates:
            beyond = value.abs() > fmt.max
            assert torch.equal(
                join_remainder(again_hi, again_lo, extra)[beyond].abs(), torch.full((int(beyond.sum()),), fmt.max)
            )
            foreign |= beyond
            value = torch.where(beyond, torch.copysign(torch.tensor(fmt.max), value), value)
        assert torch.equal(bits_of(again_hi)[~foreign], bits_of(hi)[~foreign])
        assert torch.equal(again_lo[~foreign], remainder[~foreign])
        back = join_remainder(again_hi, again_lo, extra)
        assert torch.equal(bits_of(back), bits_of(value)), "a foreign pair changes its value when it is stored again"
        assert not again_lo[value.isnan()].any()


@every_case
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_split_rounds_as_defined(fmt: Format, extra: int, stochastic: bool) -> None:
    x = float32s(fmt)
    draws = [random.Random(1).randrange(2**16) for _ in range(x.numel())] if stochastic else None
    hi, lo = split_remainder(x, fmt, extra, None if draws is None else torch.tensor(draws, dtype=torch.int32))
    value = join_remainder(hi, lo, extra)
    wanted = [
        rounded(v, fmt.name, extra, None if draws is None else draws[i]) for i, v in enumerate(x.double().tolist())
    ]
    assert torch.equal(bits_of(value.double()), bits_of(torch.tensor(wanted, dtype=torch.float64)))
    assert lo.dtype == torch.int32
    assert lo.min() >= -(2 ** (extra - 1))
    assert lo.max() < 2 ** (extra - 1)


@every_case
def test_hi_is_the_value_to_nearest_ties_away(fmt: Format, extra: int) -> None:
    x = float32s(fmt)
    hi, lo = split_remainder(x, fmt, extra)
    value = join_remainder(hi, lo, extra).double()
    finite = value.isfinite() & hi.float().isfinite()
    error = (value - hi.double()).abs()[finite]
    assert (error <= (fmt.ulp(value) / 2)[finite]).all()
    tie = error == (fmt.ulp(value) / 2)[finite]
    assert tie.any()
    assert (hi.double().abs()[finite] > value.abs()[finite])[tie].all()


def test_sixteen_bits_behind_bfloat16_are_float32_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, FP32.max, -FP32.max, 2.0**-149])])
    hi, lo = split_remainder(x, BF16, 16)
    assert lo.min() >= -(2**15)
    assert lo.max() < 2**15
    assert torch.equal(bits_of(join_remainder(hi, lo, 16)), bits_of(x))
    usual = x.to(torch.bfloat16)
    differs = (bits_of(usual) != bits_of(hi)).nonzero().flatten()
    # It differs from the usual cast at ties alone.
    assert (x[differs].view(torch.int32) & 0xFFFF == 0x8000).all()


@pytest.mark.parametrize(("fmt", "extra"), [(BF16, 8), (BF16, 4), (FP16, 8), (FP16, 4), (E4M3FN, 8)])
@pytest.mark.parametrize("x", [1.2345678, -0.031249998, 1 + 2**-8 - 2**-23, 3.0e-5, 1e-6, 2 - 2**-20, 255.99998])
def test_the_mean_over_all_draws_is_the_value_exactly(fmt: Format, extra: int, x: float) -> None:
    x32 = torch.full((2**16,), x, dtype=torch.float64).float()
    hi, lo = split_remainder(x32, fmt, extra, torch.arange(2**16, dtype=torch.int32))
    mean, wanted = join_remainder(hi, lo, extra).double().mean().item(), x32[0].double().item()
    # Among the subnormals of e4m3fn a float32 has more bits behind the last than a draw can weigh.
    assert abs(mean - wanted) <= (2.0 ** -(16 + 9 + extra) if fmt is E4M3FN and abs(x) < fmt.smallest_normal else 0)


def clamped(x: Tensor, fmt: Format, extra: int) -> tuple[Tensor, Tensor]:
    """A broken variant: hi first, and a remainder that cannot carry."""
    hi = x.to(fmt.dtype)
    units = (x.double() - hi.double()) / (fmt.ulp(hi) * 2.0**-extra)
    return hi, units.round().clamp(-(2 ** (extra - 1)), 2 ** (extra - 1) - 1).to(torch.int32)


def test_a_remainder_that_cannot_carry_would_not_pass() -> None:
    x = 1.0 + torch.arange(2**12, dtype=torch.float64).float() * 2**-19
    hi, lo = split_remainder(x, BF16, 8)
    assert ((join_remainder(hi, lo, 8) - x).abs() <= 2.0**-16).all()
    hi, lo = clamped(x, BF16, 8)
    assert not ((join_remainder(hi, lo, 8) - x).abs() <= 2.0**-16).all()


def test_nibbles_pack_in_order_and_come_back() -> None:
    values = torch.tensor([-8, 7, 0, -1, 3, -4], dtype=torch.int32)
    packed = pack_nibbles(values)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0x78, 0xF0, 0xC3]
    assert torch.equal(unpack_nibbles(packed), values)
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(pack_nibbles(unpack_nibbles(every)), every)


@pytest.mark.parametrize(("fmt", "extra"), [(BF16, 0), (BF16, 17), (FP16, 16), (FP16, 14), (FP32, 8), (E4M3FN, 21)])
def test_more_bits_than_float32_has_are_refused(fmt: Format, extra: int) -> None:
    with pytest.raises(ValueError, match=rf"remainder of {extra} bits behind {fmt.name}.*allowed"):
        check_extra(fmt, extra)


def test_only_float32_is_split() -> None:
    with pytest.raises(TypeError, match=r"from float32, got torch.float64"):
        split_remainder(torch.zeros(2, dtype=torch.float64), BF16, 8)

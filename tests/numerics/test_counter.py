"""The random stream: pinned, uniform, uncorrelated in every direction of its key. The streams are fixed, none flaky."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collage.numerics import draw, keys, random_bits, words

COUNT = 2**18
# Of some thousand standard normal scores, none should lie beyond 5.
LIMIT = 5.0


def reference_word(index: int, key: tuple[int, int]) -> int:
    """The word function on Python's integers."""
    mask = 2**32 - 1
    x = index ^ key[0]
    x = (x ^ (x >> 17)) * 0xED5AD4BB & mask
    x = (x ^ (x >> 11)) + key[1] & mask
    x = x * 0xAC4C1B51 & mask
    x = (x ^ (x >> 15)) * 0x31848BAB & mask
    return x ^ (x >> 14)


def centred(bits: Tensor) -> Tensor:
    """Draws as numbers of mean 0 and variance 1."""
    return (bits.double() - (2**16 - 1) / 2) / math.sqrt((2**32 - 1) / 12)


def correlation_score(a: Tensor, b: Tensor) -> float:
    """The correlation of two streams of draws in its standard deviations."""
    return (centred(a) * centred(b)).mean().item() * math.sqrt(len(a))


def uniformity_score(cells: Tensor, count: int) -> float:
    """Chi-square of ``count`` equally likely cells, as a standard normal score."""
    seen = torch.bincount(cells, minlength=count).double()
    expected = len(cells) / count
    chi_square = ((seen - expected) ** 2 / expected).sum().item()
    return (chi_square - (count - 1)) / math.sqrt(2 * (count - 1))


def joint_score(a: Tensor, b: Tensor, bits: int = 6) -> float:
    """Whether the leading bits of two streams are independent."""
    shift = 16 - bits
    return uniformity_score(((a >> shift) << bits) + (b >> shift), 4**bits)


def int32(value: int) -> int:
    """The int32 with these 32 bits."""
    return value - 2**32 if value >= 2**31 else value


def test_the_stream_never_changes():
    assert keys(0, 0, 0, 0) == (0x9B93B094, 0xCBD37AD2)
    assert keys(1, 2, 3, 4, 5) == (0x50B0A242, 0xBE609735)
    assert random_bits(0, 0, 1, 0, 4).tolist() == [51794, 6659, 1890, 7639]
    assert random_bits(0, 0, 1, 0, 4, number=1).tolist() == [26584, 27489, 6088, 22965]
    assert random_bits(0, 0, 1, 0, 4, number=2).tolist() == [47405, 8697, 39091, 46495]
    assert random_bits(7, 3, 100, 2**32 - 2, 4).tolist() == [40147, 55528, 51469, 13147]
    assert random_bits(-1, 1, 2**40, 2**40, 3, number=5).tolist() == [52130, 16069, 30671]


@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))
@settings(max_examples=300)
def test_words_equal_pythons_integers(index, key):
    word = words(torch.tensor([int32(index)], dtype=torch.int32), key)
    assert word.dtype == torch.int32
    assert word.item() % 2**32 == reference_word(index, key)
    assert draw(word, 0).item() == reference_word(index, key) & 0xFFFF
    assert draw(word, 1).item() == reference_word(index, key) >> 16


def test_buffers_receive_the_same_words_and_the_index_is_kept():
    index = torch.arange(1000, dtype=torch.int32)
    out, scratch = torch.empty_like(index), torch.empty_like(index)
    want = words(index, (1, 2))
    assert words(index, (1, 2), out=out, scratch=scratch) is out
    assert torch.equal(out, want)
    assert torch.equal(index, torch.arange(1000, dtype=torch.int32))
    for number in (0, 1):
        assert torch.equal(draw(want, number, out=scratch), draw(want, number))


def test_words_are_a_bijection_of_the_index():
    index = torch.arange(-(2**20), 2**20, dtype=torch.int32)
    assert len(words(index, keys(0, 0, 1, 0)).unique()) == 2**21


def test_draws_are_uniform_in_their_high_and_their_low_bits():
    scores = []
    for seed, ordinal, step in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (12345, 7, 999), (2**63, 300, 10**6)):
        for number in range(4):
            bits = random_bits(seed, ordinal, step, 0, COUNT, number)
            assert 0 <= bits.min().item() < bits.max().item() < 2**16
            scores += [uniformity_score(bits >> (16 - k), 2**k) for k in (1, 4, 8, 12)]
            scores += [uniformity_score(bits & (2**k - 1), 2**k) for k in (1, 4, 8, 12)]
            scores.append(centred(bits).mean().item() * math.sqrt(COUNT))
    assert max(map(abs, scores)) < LIMIT


LAGS = (1, 2, 3, 4, 7, 8, 16, 64, 128, 256, 512, 768, 1000, 1024, 2048, 3072, 4096, 12288, 50257, 65536)


@pytest.mark.parametrize("number", [0, 1])
def test_draws_of_elements_any_distance_apart_are_independent(number):
    """Rows of matrices are such distances; a two-round mixer fails here by hundreds of deviations."""
    scores = []
    for ordinal in range(6):
        bits = random_bits(0, ordinal, 1, 0, COUNT, number)
        for lag in LAGS:
            scores += [joint_score(bits[:-lag], bits[lag:]), correlation_score(bits[:-lag], bits[lag:])]
    assert max(map(abs, scores)) < LIMIT


def neighbours(change: str) -> list[Tensor]:
    """Streams whose keys differ in one part alone."""
    base = {"seed": 0, "ordinal": 0, "step": 1, "number": 0, "start": 0}
    values = {"start": [k << 32 for k in range(8)]}.get(change, list(range(8)))
    return [random_bits(**{**base, change: value}, count=COUNT) for value in values]


@pytest.mark.parametrize("change", ["seed", "ordinal", "step", "number", "start"])
def test_streams_that_differ_in_one_part_of_the_key_are_independent(change):
    """``number`` 0 and 1 are two halves of one word; ``start`` differs by multiples of 2**32."""
    scores = []
    for a, b in combinations(neighbours(change), 2):
        scores += [correlation_score(a, b), joint_score(a, b), correlation_score(a[:-1], b[1:])]
    assert max(map(abs, scores)) < LIMIT


def test_parts_of_the_key_do_not_stand_in_for_each_other():
    """Seed 0 with ordinal 1 is not seed 1 with ordinal 0, and so on."""
    made = {
        keys(s, o, t, w, h) for s in range(6) for o in range(6) for t in range(6) for w in range(3) for h in range(3)
    }
    assert len(made) == 6 * 6 * 6 * 3 * 3
    assert len({key for pair in made for key in pair}) == 2 * len(made)


def test_seeds_are_taken_modulo_two_to_the_sixty_four():
    assert keys(-1, 0, 0, 0) == keys(2**64 - 1, 0, 0, 0)
    assert keys(2**64, 0, 0, 0) == keys(0, 0, 0, 0)


def flips(a: Tensor, b: Tensor) -> Tensor:
    """How often each of the 32 bits differs."""
    return torch.stack([(((a ^ b) >> j) & 1).double().mean() for j in range(32)])


def test_every_bit_of_the_index_and_of_the_keys_turns_half_of_the_bits_over():
    index = torch.arange(2**15, dtype=torch.int32) * 40503
    key = keys(0, 0, 1, 0)
    base = words(index, key)
    for bit in range(32):
        flipped = words(index ^ int32(1 << bit), key)
        # The mixer's own bias is below one part in 32; a linear one would show 0, 1 or a quarter.
        assert (flips(base, flipped) - 0.5).abs().max() < 1 / 32
    for bit in range(32):
        changed = words(index, keys(0, 0, 1 ^ (1 << bit), 0))
        assert (flips(base, changed) - 0.5).abs().max() < 1 / 32


def test_pieces_of_a_stream_are_the_stream():
    whole = random_bits(3, 4, 5, 1000, 5000, 1)
    for cuts in ((1000, 2500, 6000), (1000, 1001, 1002, 5999, 6000)):
        pieces = [random_bits(3, 4, 5, a, b - a, 1) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole)


def test_the_index_crosses_thirty_two_bits():
    start = 2**32 - 1000
    whole = random_bits(0, 0, 1, start, 2000)
    assert torch.equal(whole[:1000], random_bits(0, 0, 1, start, 1000))
    assert torch.equal(whole[1000:], random_bits(0, 0, 1, 2**32, 1000))
    assert not torch.equal(whole[1000:], random_bits(0, 0, 1, 0, 1000))
    assert torch.equal(random_bits(0, 0, 1, 2**31 - 5, 10), random_bits(0, 0, 1, 2**31 - 100, 200)[95:105])


def test_no_elements_have_no_bits():
    assert random_bits(0, 0, 1, 0, 0).shape == (0,)


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), random_bits(0, 0, 1, 0, 100)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(random_bits(0, 0, 1, 0, 100), first)

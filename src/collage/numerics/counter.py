"""Random bits that are a pure function of their key: the generator behind every stochastic rounding.

The bits of an element depend on (seed, ordinal of the parameter, its step, the element's global index, the draw) and on
nothing else: not on the device, the backend, the shard, the replica, the order of calls or any global generator. A
resumed or resharded run therefore draws what it would have drawn.

The host mixes (seed, ordinal, step, word, high half of the index) into two 32-bit keys with the finaliser of splitmix64
(Steele, Lea and Flood 2014). Each element mixes the low half of its index with them in three rounds of xor-shift and
multiplication modulo 2**32 (constants of the hash-prospector search), the second key entering between the rounds. Two
rounds are not enough: the draws of elements one row apart (3072, say) then depend on each other within a step. All is
integer arithmetic on 32 bits, so vector units and GPUs give the same bits without wide products.

Each 32-bit word serves two draws of 16 bits, the low half first: 16 bits are exactly what rounding float32 to bfloat16
discards.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = 2**64 - 1
DRAW_BITS = 16


def _mix64(z: int) -> int:
    """The finaliser of splitmix64: a bijection on 64-bit integers."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def as_int32(value: int) -> int:
    """The int32 number that has these 32 bits."""
    return value - 2**32 if value >= 2**31 else value


_FIRST = as_int32(0xED5AD4BB)
_SECOND = as_int32(0xAC4C1B51)
_THIRD = as_int32(0x31848BAB)


def keys(seed: int, ordinal: int, step: int, word: int, high: int = 0) -> tuple[int, int]:
    """The two 32-bit keys of one stream.

    Args:
        seed: the run's seed, any integer; taken modulo 2**64.
        ordinal: which parameter of the optimizer.
        step: the parameter's step.
        word: which 32-bit word of an element: draw // 2.
        high: the bits above the low 32 of the element's index.

    Returns:
        Two integers in [0, 2**32).
    """
    # The seed is mixed by itself: seed ^ ordinal alone would give (0, 1) and (1, 0) one stream.
    state = _mix64(seed & _MASK64)
    for part in (ordinal, step, word, high):
        state = _mix64(state ^ (part & _MASK64))
    state = _mix64(state)
    return state & 0xFFFFFFFF, state >> 32


def words(index: Tensor, key: tuple[int, int], out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
    """One 32-bit random word per element, as the bits of an int32.

    Args:
        index: int32 tensor: the low 32 bits of each element's global index.
        key: from :func:`keys`.
        out: int32 tensor of the same shape that receives the words, or None.
        scratch: int32 tensor of the same shape for intermediates, or None.

    Returns:
        int32 tensor of the shape of ``index``. A bijection of the index for a fixed key.
    """
    x = torch.bitwise_xor(index, as_int32(key[0]), out=out)
    t = torch.empty_like(x) if scratch is None else scratch
    _xorshift(x, 17, t)
    x.mul_(_FIRST)
    _xorshift(x, 11, t)
    x.add_(as_int32(key[1]))
    x.mul_(_SECOND)
    _xorshift(x, 15, t)
    x.mul_(_THIRD)
    return _xorshift(x, 14, t)


def _xorshift(x: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """``x ^= x >> shift`` as unsigned numbers; torch shifts the sign in, so it is masked off."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)
    return x.bitwise_xor_(scratch)


def draw(word: Tensor, number: int, out: Tensor | None = None) -> Tensor:
    """The 16 bits of draw ``number`` out of the word ``number // 2``, in [0, 2**16), int32."""
    if number % 2 == 0:
        return torch.bitwise_and(word, 0xFFFF, out=out)
    shifted = torch.bitwise_right_shift(word, DRAW_BITS, out=out)
    return torch.bitwise_and(shifted, 0xFFFF, out=out)


def random_bits(seed: int, ordinal: int, step: int, start: int, count: int, number: int = 0) -> Tensor:
    """The draws of elements ``start`` to ``start + count - 1``: int32 on the CPU, in [0, 2**16).

    The plain form of the generator; the kernels call its parts on kept buffers.
    """
    parts = []
    while count > 0:
        high, low = start >> 32, start & 0xFFFFFFFF
        length = min(count, 2**32 - low)
        # The sum wraps round in 32 bits, as an unsigned index does.
        index = torch.arange(length, dtype=torch.int32).add_(as_int32(low))
        parts.append(draw(words(index, keys(seed, ordinal, step, number // 2, high)), number))
        start, count = start + length, count - length
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)

"""A 16-bit number and the bits that follow it, as an integer: exact float32, or as much of it as is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.numerics import (
    check_extra,
    format_of,
    join_remainder,
    pack_nibbles,
    split_remainder,
    unpack_nibbles,
)
from collage.storage.contract import Component, FormatLike, Parts, Storage, check_rounding, row_length

_DTYPES = {16: torch.int16, 8: torch.int8, 4: torch.uint8}


@dataclass(frozen=True)
class Remainder(Storage):
    """hi in a 16-bit format, and in ``role_remainder`` the bits that follow it (:mod:`collage.numerics.remainders`).

    With 16 bits behind bfloat16 the value is a float32, every one of which is held exactly. With fewer bits it is
    rounded to so many more than hi has, by default stochastically, so that updates below its last bit are kept on
    average. hi is the value rounded to nearest, ties away from zero. Two remainders of 4 bits share a byte.

    Attributes:
        bits: of the remainder: 16 (bfloat16 alone), 8 or 4.
        format: see :class:`Storage`.
        rounding: of the last bit: "nearest" or "stochastic"; without effect on 16 bits, which drop nothing.
    """

    bits: int = 16
    format: FormatLike = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounding(self.rounding)
        if self.bits not in _DTYPES:
            raise ValueError(f"bits must be 16, 8 or 4, got {self.bits}")

    @property
    def stochastic(self) -> bool:
        """Whether a store takes random bits."""
        return self.rounding == "stochastic"

    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """``role`` and ``role_remainder``.

        Raises:
            ValueError: more bits than float32 has behind the format.
        """
        fmt = self.format_for(dtype)
        check_extra(fmt, self.bits)
        shared = 2 if self.bits == 4 else 1
        return (Component("{role}", fmt.dtype), Component("{role}_remainder", _DTYPES[self.bits], shared))

    def fitted(self, shape: torch.Size) -> Remainder | None:
        """None for 4 bits where the elements of a row do not pair up."""
        return None if self.bits == 4 and row_length(shape) % 2 else self

    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """Exact."""
        hi, packed = parts
        lo = unpack_nibbles(packed).view(hi.shape) if self.bits == 4 else packed
        return out.copy_(join_remainder(hi, lo, self.bits))

    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """Rounds to the last bit of the remainder, then splits."""
        hi, lo = split_remainder(value, format_of(parts[0]), self.bits, bits)
        parts[0].copy_(hi)
        parts[1].copy_(pack_nibbles(lo).view(parts[1].shape) if self.bits == 4 else lo)

    def exact(self, parts: Parts) -> Tensor:
        """The value, which is a number of float32."""
        return self.load(parts, torch.empty_like(parts[0], dtype=torch.float32)).to(torch.float64)

"""8-bit numbers beside a power of two that a tile of elements shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from collage.numerics import BF16, E4M3FN, E5M2, Format, round_nearest, sqrt_rn
from collage.storage.contract import Component, FormatLike, Parts, Storage, row_length
from collage.storage.expansion import Expansion
from collage.storage.remainder import Remainder
from collage.storage.rounded import Rounded

# A tile is at least _LEAST elements wide; a smaller tensor than _SMALL is not worth one.
_LEAST, _SMALL = 32, 4096
# Scales are kept as E8M0 has them: the exponent plus _BIAS. Those of ordinary tensors are far from _LOWEST, below which
# values become subnormal in their format instead.
_BIAS, _LOWEST = 127, -126


@dataclass(frozen=True)
class Tiled(Storage):
    """Another storage of a float8 format for values divided by a power of two per tile, which stands in ``role_scale``.

    The power is the least one that brings the tile's largest finite magnitude to at most the format's largest number
    (rounded up: nothing is cut off), kept as uint8 as E8M0 has it, exponent + 127; it is 1 for a tile of zeros.
    Division by it and multiplication with it are exact. A number that is not finite is nan, and spoils no other.

    Attributes:
        of: the storage of the divided values: :class:`Rounded`, :class:`Expansion` of up to 3 components or
            :class:`Remainder`, of e4m3fn or e5m2.
        rows: height of a tile, in rows. A tensor's last tiles may be less high.
        columns: width of a tile. 128 becomes the largest even divisor of the row's length for a given shape
            (:meth:`fitted`).
        root: whether the square root of the value is what is kept: for numbers >= 0 of which none that is positive may
            become 0.
        width: elements of a row of the tensors; 0 until :meth:`fitted` has seen their shape.
    """

    of: Storage
    rows: int = 128
    columns: int = 128
    root: bool = False
    width: int = 0

    def __post_init__(self) -> None:
        kinds = (Rounded, Expansion, Remainder)
        if not isinstance(self.of, kinds) or self.of.format not in (E4M3FN, E5M2):
            raise ValueError(f"tiles hold Rounded, Expansion or Remainder of e4m3fn or e5m2, got {self.of!r}")
        if isinstance(self.of, Expansion) and self.of.n > 3:
            raise ValueError(
                f"an expansion in tiles has 2 or 3 components, got {self.of.n}; for more bits take a storage without "
                "tiles, such as Remainder(16)"
            )
        if self.rows < 1 or self.columns < 2 or self.columns % 2:
            raise ValueError(
                f"a tile has at least 1 row and an even number of columns, got {self.rows}, {self.columns}"
            )

    @property
    def format(self) -> FormatLike:  # type: ignore[override]
        """That of the numbers."""
        return self.of.format

    @property
    def _number(self) -> Format:
        assert isinstance(self.of.format, Format)
        return self.of.format

    @property
    def stochastic(self) -> bool:
        """Whether a store takes random bits."""
        return self.of.stochastic

    @property
    def borne(self) -> bool:
        """A parameter in tiles bears all of them: none of the numbers is the parameter's value."""
        return True

    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """Those of the numbers, then ``role_scale``."""
        scale = Component("{role}_scale", torch.uint8, self.columns, self.rows, self.width)
        return (*self.of.components(dtype), scale)

    def param_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bfloat16, whose exponents the scales cover; no other."""
        if dtype != torch.bfloat16:
            raise ValueError(f"tiles of {self._number.name} keep parameters of torch.bfloat16, got {dtype}")
        return dtype

    def fitted(self, shape: torch.Size) -> Tiled | None:
        """With the largest even number of columns up to this one that divides the row's length; None if that is too
        small, or the tensor is."""
        if len(shape) < 2 or prod(shape) < _SMALL:
            return None
        width = row_length(shape)
        columns = next((n for n in range(self.columns, _LEAST - 1, -1) if width % n == 0 and n % 2 == 0), None)
        # The keys of random bits change every 2**32 elements, which no row of tiles may cross.
        if columns is None or (prod(shape) > 2**32 and 2**32 % (self.rows * width)):
            return None
        return replace(self, columns=columns, width=width)

    def clear(self, parts: Parts) -> None:
        """Zeros, as a store of them would leave them."""
        for part in parts[:-1]:
            part.view(torch.uint8).zero_()
        parts[-1].fill_(_BIAS)

    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """Exact, but for the square, which is rounded to float32."""
        self.of.load(parts[:-1], out)
        for tiles, exponent in self._tiles(out, parts[-1].view(-1)):
            tiles.mul_(_power(exponent.to(torch.int32)))
        return out.mul_(out) if self.root else out

    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """Makes the scale of each tile from its largest finite magnitude, divides, and stores the quotients."""
        least = torch.where(value > 0, self._least, 0.0) if self.root else None
        if self.root:
            value.copy_(sqrt_rn(value))
        torch.abs(value, out=scratch).nan_to_num_(nan=0.0, posinf=0.0)
        scales = parts[-1].view(-1)
        for tiles, exponent in self._tiles(scratch, scales):
            exponent.copy_(self._exponent(tiles.amax((1, 3), keepdim=True)))
        for tiles, exponent in self._tiles(value, scales):
            tiles.mul_(_power(2 * _BIAS - exponent.to(torch.int32)))
        value.masked_fill_(value.isinf(), torch.nan)
        if least is not None:
            torch.maximum(value, least, out=value)
        self.of.store(value, parts[:-1], bits, scratch)

    def _exponent(self, largest: Tensor) -> Tensor:
        """ceil(log2(largest / largest number of the format)) + 127 as the pattern of a float32 has it: the largest
        number's significand and anything below it carry into no exponent."""
        fmt = self._number
        significand = int(fmt.max / 2.0**fmt.emax * 2**23) - 2**23
        exponent = ((largest.view(torch.int32) + (2**23 - 1 - significand)) >> 23) - fmt.emax
        exponent = exponent.clamp_(min=_LOWEST + _BIAS)
        return torch.where(largest == 0, _BIAS, exponent)

    @property
    def _least(self) -> float:
        """The smallest positive number that the divided values are kept as."""
        scaled = isinstance(self.of, Expansion) and self.of.scaled
        steps = self.of.n - 1 if isinstance(self.of, Expansion) and scaled else 0
        return self._number.smallest_subnormal * 2.0 ** -(self._number.precision * steps)

    def _tiles(self, flat: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of whole rows of tiles, then of a last one that is less high, as [rows of tiles, rows, tiles, columns];
        and of their scales, as [rows of tiles, 1, tiles, 1]."""
        width = self.width or self.columns
        across = width // self.columns
        flat = flat.view(-1)
        whole = flat.numel() // (self.rows * width)
        for begin, height, count in ((0, self.rows, whole), (whole, flat.numel() // width - whole * self.rows, 1)):
            if height and count:
                start = begin * self.rows * width
                tiles = flat[start : start + count * height * width].view(count, height, across, self.columns)
                yield tiles, scales[begin * across : (begin + count) * across].view(count, 1, across, 1)

    def exact(self, parts: Parts) -> Tensor:
        """The value, of which a root has no more bits than float64 holds twice."""
        value = self.of.exact(parts[:-1]).contiguous()
        for tiles, exponent in self._tiles(value, parts[-1].reshape(-1)):
            tiles.mul_(_power(exponent.to(torch.int32)).to(torch.float64))
        return value.mul_(value) if self.root else value

    def seen(self, parts: Parts) -> Tensor:
        """The value rounded to bfloat16."""
        value = self.load(parts, torch.empty_like(parts[0], dtype=torch.float32))
        return round_nearest(value, BF16).to(torch.float64)


def _power(exponent: Tensor) -> Tensor:
    """2**(exponent - 127) as float32; exponents from 1 to 254."""
    return (exponent << 23).view(torch.float32)

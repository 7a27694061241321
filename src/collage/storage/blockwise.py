"""Eight bits per element and a scale per block of elements: for moments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from collage.numerics import FP32, sqrt_rn
from collage.storage.contract import Component, FormatLike, Parts, Storage, check_rounding, row_length

# A block is an even number of elements, at least _LEAST; a smaller tensor than _SMALL is not worth one.
_LEAST, _SMALL = 32, 4096
# Codes within this share of an integer are that integer: what a load and a store without an update between them make
# of a code is off by less than 8 units of float32's last bit, and no moment of a decay rate below 1 - 2**-18 sticks.
_SNAP = 2.0**-20
# Nearest float32 to 1/255; times 255 it is 1.
_INVERSE_255 = 0x808081 / 2**31


@dataclass(frozen=True)
class Blockwise(Storage):
    """Two components: 8-bit codes, and in ``role_scale`` the largest magnitude of each block, in float32.

    The codes are spaced as the quantity needs it (its *companding*):

    - ``softsign``, for numbers of both signs: |x| = s |q| / (254 - |q|), q in [-127, 127] (int8).
    - ``root4``, for numbers >= 0: x = s (q / 255)**4, q in [0, 255] (uint8); no positive number has the code 0, for
      the second moment is divided by.

    In both the largest magnitude s of a block is held exactly, so that a load and a store without an update between
    them change nothing. Rounded to nearest, a moving average whose relative change in a step is less than half a code
    stands still; rounded stochastically it goes on, on average. A block with a number that is not finite (or, for
    softsign, beyond 2**127) has the scale nan and is nan as a whole.

    Attributes:
        companding: "softsign" or "root4".
        block: elements per scale, even: consecutive ones of a row. 128 becomes the largest divisor of the row's length
            for a given shape (:meth:`fitted`).
        rounding: of the codes: "nearest" or "stochastic".
    """

    companding: str
    block: int = 128
    rounding: str = "stochastic"
    format: FormatLike = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounding(self.rounding)
        if self.companding not in ("softsign", "root4"):
            raise ValueError(f"companding must be 'softsign' or 'root4', got {self.companding!r}")
        if self.block < 2 or self.block % 2:
            raise ValueError(f"block must be an even number of elements, got {self.block}")
        if self.format is not None:
            raise ValueError(f"the codes' format follows from the companding; format must be None, got {self.format}")

    @property
    def stochastic(self) -> bool:
        """Whether a store takes random bits."""
        return self.rounding == "stochastic"

    @property
    def signed(self) -> bool:
        """Whether it holds numbers below 0."""
        return self.companding == "softsign"

    @property
    def smallest_scale(self) -> float:
        """The scale of a block without a larger number: the smallest code's value is then a normal float32 still."""
        return 2.0**-118 if self.signed else 2.0**-94

    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """``role``: the codes; ``role_scale``."""
        codes = torch.int8 if self.signed else torch.uint8
        return (Component("{role}", codes), Component("{role}_scale", torch.float32, self.block))

    def fitted(self, shape: torch.Size) -> Blockwise | None:
        """With the largest even block up to this one that divides the row's length, so that no block crosses a row (a
        parameter sharded along its first dimension has whole blocks); None if that is too small, or the tensor is."""
        if len(shape) < 2 or prod(shape) < _SMALL:
            return None
        row = row_length(shape)
        found = (block for block in range(self.block, _LEAST - 1, -1) if row % block == 0 and block % 2 == 0)
        if prod(shape) > 2**32:
            # The keys of random bits change every 2**32 elements; no block crosses that either.
            found = (block for block in found if 2**32 % block == 0)
        block = next(found, None)
        return None if block is None else replace(self, block=block)

    def clear(self, parts: Parts) -> None:
        """Zeros, as a store of them would leave them."""
        parts[0].zero_()
        parts[1].fill_(self.smallest_scale)

    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """Each operation rounded to float32."""
        out.copy_(parts[0])
        if self.signed:
            out.div_(254.0 - out.abs())
        else:
            out.mul_(_INVERSE_255).mul_(out).mul_(out)
        out.view(-1, self.block).mul_(parts[1].reshape(-1, 1))
        return out

    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """Scales each block by its largest magnitude and rounds to codes."""
        size = torch.abs(value, out=scratch)
        largest = size.view(-1, self.block).amax(1, keepdim=True).clamp_(min=self.smallest_scale)
        finite = largest < 2.0**127 if self.signed else largest <= FP32.max
        largest = torch.where(finite, largest, torch.nan)
        parts[1].copy_(largest.view(parts[1].shape))
        code = self._codes(size, largest, bits)
        if self.signed:
            code = torch.copysign(code, value, out=code)
        else:
            code = torch.maximum(code, (value > 0).to(torch.float32), out=code)
        # nan in a block that is.
        parts[0].copy_(torch.nan_to_num(code, nan=0.0, out=code))

    def _codes(self, size: Tensor, largest: Tensor, bits: Tensor | None) -> Tensor:
        """Magnitudes of the codes, whole numbers as float32, nan where ``largest`` is; ``size`` is lost."""
        rows = size.view(-1, self.block)
        if self.signed:
            exact = rows.div_(rows + largest).mul_(254.0).clamp_(max=127.0)
        else:
            # Not 255 / tensor: torch makes a multiplication with the reciprocal of that.
            factor = torch.full_like(largest, 255.0).div_(sqrt_rn(sqrt_rn(largest)))
            exact = sqrt_rn(sqrt_rn(rows)).mul_(factor).clamp_(max=255.0)
        near = exact.round()
        if bits is None:
            return near.view(size.shape)
        drawn = (bits.view_as(exact) * 2.0**-16).add_(exact).floor_()
        return torch.where((exact - near).abs_() <= near * _SNAP, near, drawn).view(size.shape)

    def exact(self, parts: Parts) -> Tensor:
        """What :meth:`load` gives: codes have no value of their own beside it."""
        return self.load(parts, torch.empty_like(parts[0], dtype=torch.float32)).to(torch.float64)

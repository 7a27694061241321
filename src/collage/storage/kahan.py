"""A number and what was lost so far: compensated summation (Kahan 1965), all in the format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.numerics import format_of, round_into, round_nearest
from collage.storage.contract import Component, FormatLike, Parts, Storage, operand


@dataclass(frozen=True)
class Kahan(Storage):
    """Two components, p and c, updated as ``c' = RN(c + u); p' = RN(p + c'); c = RN(c' - RN(p' - p))``.

    The value is p + c. Unlike an expansion's lo, c is not kept below half a unit of p by construction, and its rounding
    loses updates below half a unit of c.
    """

    format: FormatLike = None

    @property
    def has_working_arithmetic(self) -> bool:
        """In the parameter's own format."""
        return self.format is None

    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """``role`` and ``role_lo``."""
        fmt = self.format_for(dtype)
        return (Component("{role}", fmt.dtype), Component("{role}_lo", fmt.dtype))

    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """``RN32(p + c)``."""
        return out.copy_(parts[1]).add_(operand(parts[0]))

    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """p to nearest, c what is left of it; used where a value, not an update, comes in."""
        hi, lo = parts
        round_into(value, hi)
        round_into(value.sub_(operand(hi)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0), lo)

    def exact(self, parts: Parts) -> Tensor:
        """``p + c``."""
        return parts[0].to(torch.float64) + parts[1].to(torch.float64)

    def moved(self, new: Parts, old: Parts) -> Tensor:
        """Sum of the components' own differences."""
        low = new[1].to(torch.float64) - old[1].to(torch.float64)
        return low + (new[0].to(torch.float64) - old[0].to(torch.float64))

    def add(self, parts: Parts, value: Tensor, update: Tensor, bits: Tensor | None, scratch: Tensor) -> None:
        """The rule above, with the float32 ``update`` in its first rounding."""
        hi, lo = parts
        round_into(update.add_(operand(lo)), lo)
        value.copy_(hi)
        round_into(scratch.copy_(lo).add_(operand(hi)), hi)
        # RN(p' - p): what the parameter really moved, in the format.
        moved = scratch.copy_(hi).sub_(value)
        update.copy_(round_nearest(moved, format_of(hi)))
        round_into(value.copy_(lo).sub_(update), lo)

    def working_add(self, parts: Parts, update: Tensor) -> None:
        """The rule above."""
        buffers = [torch.empty(parts[0].shape, dtype=torch.float32, device=parts[0].device) for _ in range(3)]
        self.add(parts, buffers[0], buffers[1].copy_(update), None, buffers[2])

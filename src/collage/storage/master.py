"""A low-precision copy for the model beside the float32 value: what mixed precision keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.numerics import round_into
from collage.storage.contract import Component, FormatLike, Parts, Storage


@dataclass(frozen=True)
class Master(Storage):
    """Two components: the model's own, rounded to nearest, and ``master_param`` in float32, which is the value."""

    format: FormatLike = None

    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """The copy and the master."""
        return (
            Component("{role}", self.format_for(dtype).dtype),
            Component("master_{role}", torch.float32),
        )

    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """Exact."""
        return out.copy_(parts[1])

    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """The master takes the value as it is, the copy its rounding."""
        parts[1].copy_(value)
        round_into(value, parts[0])

    def exact(self, parts: Parts) -> Tensor:
        """The master."""
        return parts[1].to(torch.float64)

"""One number per element, rounded on every store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.numerics import add_rn, mul_scalar, round_into, round_stochastic_into
from collage.storage.contract import Component, FormatLike, Parts, Storage, check_rounding


@dataclass(frozen=True)
class Rounded(Storage):
    """One component: what does not fit into it is lost, or (stochastic) kept on average.

    Attributes:
        format: see :class:`Storage`.
        rounding: "nearest" (ties to even) or "stochastic".
    """

    format: FormatLike = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounding(self.rounding)

    @property
    def stochastic(self) -> bool:
        """Whether a store takes random bits."""
        return self.rounding == "stochastic"

    @property
    def has_working_arithmetic(self) -> bool:
        """To nearest, in the parameter's own format."""
        return not self.stochastic and self.format is None

    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """The number itself."""
        return (Component("{role}", self.format_for(dtype).dtype),)

    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """Exact."""
        return out.copy_(parts[0])

    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """Rounds once."""
        if bits is None:
            round_into(value, parts[0])
        else:
            round_stochastic_into(value, parts[0], bits, scratch)

    def exact(self, parts: Parts) -> Tensor:
        """The number."""
        return parts[0].to(torch.float64)

    def working_add(self, parts: Parts, update: Tensor) -> None:
        """``RN(p + u)``."""
        parts[0].copy_(add_rn(parts[0], update))

    def working_average(self, parts: Parts, beta: float, addend: Tensor) -> None:
        """``RN(RN(beta * v) + a)``; beta stays in high precision."""
        parts[0].copy_(add_rn(mul_scalar(parts[0], beta), addend))

"""An unevaluated sum of numbers of one format: hi + lo (+ ...), non-overlapping (paper section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.numerics import (
    E4M3FN,
    E5M2,
    FP16,
    format_of,
    from_wide,
    grow,
    mul,
    round_into,
    round_stochastic_into,
)
from collage.storage.contract import Component, FormatLike, Parts, Storage, check_rounding, operand

# Formats with so few exponents that a residual of theirs has no room for its bits.
_NARROW = (FP16, E4M3FN, E5M2)


@dataclass(frozen=True)
class Expansion(Storage):
    """``components`` numbers of one format whose exact sum is the value.

    The value is rounded to the last component's grid first and split after, so that what is stored is normalised
    (hi = RN(hi + lo), ties included) and a load and a store without an update between them change nothing.

    To nearest, an update below half a unit of the last component is lost, however often it comes; stochastic rounding
    of that component alone keeps it on average, for no memory.

    Attributes:
        n: number of components, 2 to 4.
        format: see :class:`Storage`.
        rounding: of the last component: "nearest" or "stochastic".
        scaled: whether each component of float16 is kept times 2**11 against the one before it (of e4m3fn times 2**4,
            of e5m2 times 2**3), which makes it as large: an unscaled float16 lo is subnormal from hi = 1/4 down, and
            its last bit is 2**-24 for every smaller hi. Other formats have the room and are not scaled.
    """

    n: int = 2
    format: FormatLike = None
    rounding: str = "nearest"
    scaled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounding(self.rounding)
        if self.n not in (2, 3, 4):
            raise ValueError(f"an expansion has 2, 3 or 4 components, got {self.n}")

    @property
    def stochastic(self) -> bool:
        """Whether a store takes random bits."""
        return self.rounding == "stochastic"

    @property
    def has_working_arithmetic(self) -> bool:
        """With the last component to nearest, in the parameter's own format, unscaled."""
        return not (self.stochastic or self.scaled) and self.format is None

    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """``role``, ``role_lo``, and for longer expansions ``role_lo2``, ``role_lo3``."""
        names = ["{role}", "{role}_lo", "{role}_lo2", "{role}_lo3"][: self.n]
        return tuple(Component(name, self.format_for(dtype).dtype) for name in names)

    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """``RN32(hi + RN32(lo + ...))``: exact for what a store from float32 wrote."""
        out.copy_(parts[-1])
        for part in reversed(parts[:-1]):
            if self.scaled:
                out.mul_(1.0 / self._factor(parts))
            out.add_(operand(part))
        return out

    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """Rounds to the grid of the last component, then splits. A non-finite value stands in hi alone."""
        self._round(value, parts, bits, scratch)
        # The rounded sum is a number of float32, since each component is a multiple of the last unit of ``value``;
        # splitting it again settles the ties of hi that rounding lo made.
        total = self.load(parts, out=scratch)
        if self.n > 2 and not self.scaled:
            return self._write(parts, from_wide(total, format_of(parts[0]), self.n))
        for part in parts[:-1]:
            round_into(total, part)
            self._subtract_(total, part)
            self._scale_(total, parts)
        round_into(total, parts[-1])

    def _round(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """Rounds greedily, component by component."""
        for part in parts[:-1]:
            round_into(value, part)
            self._subtract_(value, part)
            self._scale_(value, parts)
        if bits is None:
            round_into(value, parts[-1])
        else:
            round_stochastic_into(value, parts[-1], bits, scratch)

    def _factor(self, parts: Parts) -> float:
        """What a component is kept times against the one before it: a power of two."""
        fmt = format_of(parts[-1])
        return 2.0**fmt.precision if self.scaled and fmt in _NARROW else 1.0

    def _scale_(self, value: Tensor, parts: Parts) -> Tensor:
        """``value`` as lo is kept. Exact: a residual is far from overflow."""
        return value.mul_(self._factor(parts)) if self.scaled else value

    @staticmethod
    def _subtract_(value: Tensor, part: Tensor) -> None:
        """What ``part`` leaves of ``value``; nothing where they are infinite or nan. Exact."""
        value.sub_(operand(part)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def exact(self, parts: Parts) -> Tensor:
        """The sum, from the smallest component up."""
        total = parts[-1].to(torch.float64)
        for part in reversed(parts[:-1]):
            total = total / self._factor(parts) + part.to(torch.float64)
        return total

    def moved(self, new: Parts, old: Parts) -> Tensor:
        """Sum of the components' own differences: a change far below hi is not rounded away by hi."""
        total = new[-1].to(torch.float64) - old[-1].to(torch.float64)
        for after, before in zip(reversed(new[:-1]), reversed(old[:-1]), strict=True):
            total = total / self._factor(new) + (after.to(torch.float64) - before.to(torch.float64))
        return total

    def working_add(self, parts: Parts, update: Tensor) -> None:
        """``grow``."""
        self._write(parts, grow(tuple(parts), update))

    def working_average(self, parts: Parts, beta: float, addend: Tensor) -> None:
        """``grow(mul(v, expansion(beta)), a)``."""
        factor = from_wide(beta, format_of(parts[0]), self.n)
        factor = tuple(component.to(parts[0].device) for component in factor)
        self._write(parts, grow(mul(tuple(parts), factor), addend))

    @staticmethod
    def _write(parts: Parts, value: tuple[Tensor, ...]) -> None:
        for part, component in zip(parts, value, strict=True):
            part.copy_(component)

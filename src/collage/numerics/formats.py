"""Floating-point formats as records, and the quantities that follow from them.

One policy holds for every function of this package:

- *nan* goes to nan; the bit pattern of a nan is not specified.
- *Overflow*: a format with infinities (``bfloat16``, ``float16``, ``float32``, ``float8_e5m2``) overflows to
  infinity as IEEE 754 has it; one without (``float8_e4m3fn``) saturates: what lies beyond its largest finite
  number, infinities included, becomes that number with its sign.
- *Subnormals* are kept, never flushed. ``torch.set_flush_denormal(True)`` breaks this and is not supported.
- *Signed zeros* are kept by rounding; the sign of a zero *residual* is not specified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A binary floating-point format that has a torch dtype.

    Attributes:
        name: the field's short name (``bf16``, ``e4m3fn``, ...).
        dtype: the torch dtype that holds it.
        precision: bits of the significand, the hidden one included (``p``).
        emin: exponent of the smallest normal number, ``2**emin``.
        emax: exponent of the largest binade.
        max: the largest finite number.
        has_inf: whether overflow gives infinity; if not, it saturates at ``max``.
    """

    name: str
    dtype: torch.dtype
    precision: int
    emin: int
    emax: int
    max: float
    has_inf: bool

    @property
    def unit_roundoff(self) -> float:
        """``u = 2**-p``: the bound of the relative error of rounding to nearest, for normal results."""
        return 2.0**-self.precision

    @property
    def smallest_normal(self) -> float:
        """``2**emin``."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """``2**(emin - p + 1)``: the spacing of the subnormal numbers."""
        return 2.0 ** (self.emin - self.precision + 1)

    @property
    def saturates(self) -> bool:
        """Whether overflow gives the largest finite number instead of infinity."""
        return not self.has_inf

    @property
    def bytes(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which one operation on numbers of this format is done before it is rounded once.

        Its precision is at least ``2p + 2``, so that the two roundings of +, -, *, / and sqrt give what a single one
        would (Figueroa 1995); the product of two numbers of the format is exact in it.
        """
        return torch.float64 if self.dtype == torch.float32 else torch.float32

    def ulp(self, x: Tensor) -> Tensor:
        """Spacing of the format's numbers in the binade of ``x``.

        Args:
            x: tensor of any floating dtype and shape.

        Returns:
            float64 tensor of the same shape: ``2**(max(floor(log2 |x|), emin) - p + 1)``; the smallest subnormal for
            0, nan for nan and infinities. Exact.
        """
        x = x.to(torch.float64)
        # frexp gives a fraction in [.5, 1), one exponent above floor(log2 |x|), and exponent 0 for 0.
        exponent = torch.where(x == 0, self.emin, torch.frexp(x).exponent).clamp(min=self.emin + 1) - self.precision
        # A power of two from its exponent field: torch.ldexp goes through pow in the default dtype.
        spacing = ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
        return torch.where(torch.isfinite(x), spacing, torch.full_like(x, torch.nan))


BF16 = Format("bf16", torch.bfloat16, 8, -126, 127, (2 - 2**-7) * 2.0**127, True)
FP16 = Format("fp16", torch.float16, 11, -14, 15, (2 - 2**-10) * 2.0**15, True)
FP32 = Format("fp32", torch.float32, 24, -126, 127, (2 - 2**-23) * 2.0**127, True)
E4M3FN = Format("e4m3fn", torch.float8_e4m3fn, 4, -6, 8, 448.0, False)
E5M2 = Format("e5m2", torch.float8_e5m2, 3, -14, 15, 57344.0, True)

FORMATS: tuple[Format, ...] = (BF16, FP16, FP32, E4M3FN, E5M2)
_BY_DTYPE = {fmt.dtype: fmt for fmt in FORMATS}
_BY_NAME = {fmt.name: fmt for fmt in FORMATS}


def format_of(kind: Tensor | torch.dtype | str | Format) -> Format:
    """The record of a tensor's, a dtype's or a name's format.

    Raises:
        ValueError: no record has this dtype or name.
    """
    if isinstance(kind, Format):
        return kind
    if isinstance(kind, Tensor):
        kind = kind.dtype
    found = _BY_NAME.get(kind) if isinstance(kind, str) else _BY_DTYPE.get(kind)
    if found is None:
        allowed = ", ".join(f"{fmt.name} ({fmt.dtype})" for fmt in FORMATS)
        raise ValueError(f"{kind} is not a format known here; allowed: {allowed}")
    return found

"""Formats, rounding, error-free transforms, expansions: pure functions on tensors, on which everything else stands."""

from __future__ import annotations

from collage.numerics.counter import draw, keys, random_bits, words
from collage.numerics.eft import (
    add_rn,
    div_rn,
    fast_two_sum,
    mul_rn,
    split,
    sqrt_rn,
    sub_rn,
    two_prod,
    two_sum,
)
from collage.numerics.expansions import (
    Expansion,
    add,
    div,
    from_wide,
    grow,
    is_normalized,
    mul,
    renormalize,
    scale,
    sqrt,
    to_wide,
)
from collage.numerics.formats import BF16, E4M3FN, E5M2, FORMATS, FP16, FP32, Format, format_of
from collage.numerics.rounding import (
    is_representable,
    round_into,
    round_nearest,
    round_stochastic,
    round_stochastic_into,
    round_ties_away,
)
from collage.numerics.scalars import add_scalar, div_scalar, mul_scalar

__all__ = [
    "BF16",
    "E4M3FN",
    "E5M2",
    "FORMATS",
    "FP16",
    "FP32",
    "Expansion",
    "Format",
    "add",
    "add_rn",
    "add_scalar",
    "div",
    "div_rn",
    "div_scalar",
    "draw",
    "fast_two_sum",
    "format_of",
    "from_wide",
    "grow",
    "is_normalized",
    "is_representable",
    "keys",
    "mul",
    "mul_rn",
    "mul_scalar",
    "random_bits",
    "renormalize",
    "round_into",
    "round_nearest",
    "round_stochastic",
    "round_stochastic_into",
    "round_ties_away",
    "scale",
    "split",
    "sqrt",
    "sqrt_rn",
    "sub_rn",
    "to_wide",
    "two_prod",
    "two_sum",
    "words",
]

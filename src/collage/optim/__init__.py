"""Optimizers over storages, and the table of strategies."""

from collage.optim import convert
from collage.optim.adamw import AdamW, Observer, StepRow
from collage.optim.compensated import Compensated
from collage.optim.fp8 import GradientRelease, join_tiles, split_tiles, to_fp8_
from collage.optim.lowprecision import to_low_precision
from collage.optim.strategies import Strategy, resolve, strategies

__all__ = [
    "AdamW",
    "Compensated",
    "GradientRelease",
    "Observer",
    "StepRow",
    "Strategy",
    "convert",
    "join_tiles",
    "resolve",
    "split_tiles",
    "strategies",
    "to_fp8_",
    "to_low_precision",
]

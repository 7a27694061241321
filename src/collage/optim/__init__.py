"""Optimizers over storages, and the table of strategies."""

from collage.optim import convert
from collage.optim.adamw import AdamW, Observer, StepRow
from collage.optim.compensated import Compensated
from collage.optim.lowprecision import to_low_precision
from collage.optim.strategies import Strategy, resolve, strategies

__all__ = [
    "AdamW",
    "Compensated",
    "Observer",
    "StepRow",
    "Strategy",
    "convert",
    "resolve",
    "strategies",
    "to_low_precision",
]

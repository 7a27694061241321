"""Optimizers over storages, and the table of strategies."""

from collage.optim.adamw import AdamW, Observer, StepRow
from collage.optim.lowprecision import to_low_precision
from collage.optim.strategies import Strategy, resolve, strategies

__all__ = ["AdamW", "Observer", "StepRow", "Strategy", "resolve", "strategies", "to_low_precision"]

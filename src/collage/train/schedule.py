"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math

from collage.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of `step`, from 1: a linear rise to `lr` over the warm-up, then down to `min_lr` at the last.

    The schedule `constant` stays at `lr` instead.
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / (config.steps - warmup)
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_lr + (config.lr - config.final_lr) * left

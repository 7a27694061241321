"""What `collage recipes` shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich import box
from rich.table import Table

from collage.train.config import TrainConfig, option
from collage.train.recipes import CONTINUING

COLUMNS: tuple[tuple[str, Callable[[TrainConfig], str]], ...] = (
    ("recipe", lambda c: str(c.recipe)),
    ("model", lambda c: c.model),
    ("batch", lambda c: f"{c.batch_size:,} x {c.seq_len:,}"),
    ("steps", lambda c: f"{c.steps:,}"),
    ("learning rate", lambda c: f"{c.lr:g} to {c.final_lr:g}, {c.schedule}, warm-up {c.warmup_steps:,}"),
    ("betas", lambda c: " ".join(f"{beta:g}" for beta in c.betas)),
    ("eps", lambda c: f"{c.eps:g}"),
    ("decay", lambda c: f"{c.weight_decay:g}"),
    ("clip", lambda c: f"{c.clip:g}"),
    ("tokenizer", lambda c: c.tokenizer),
    ("goes on from", lambda c: CONTINUING.get(str(c.recipe), "")),
)


def table(configs: Mapping[str, TrainConfig]) -> Table:
    """A row for each recipe."""
    made = Table(box=box.SIMPLE)
    for heading, _ in COLUMNS:
        made.add_column(heading, overflow="fold")
    for config in configs.values():
        made.add_row(*(show(config) for _, show in COLUMNS))
    return made


def settings_table(config: TrainConfig) -> Table:
    """Every setting of a recipe, with the option that changes it."""
    made = Table("option", "value", box=box.SIMPLE)
    for name, value in config.to_json().items():
        made.add_row(
            option(name), "unset" if value is None else " ".join(map(str, value)) if name == "betas" else str(value)
        )
    return made

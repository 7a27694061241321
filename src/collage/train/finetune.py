"""What `collage finetune` runs: the settings that it has unless told otherwise, and the table of several runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from collage.train.classification import read_pretrained
from collage.train.compare import Plan, read_json
from collage.train.config import OWN_TASK, TrainConfig, UserError
from collage.train.glue import read_examples

EPOCHS = 3.0
DEFAULTS: dict[str, Any] = {
    "batch_size": 32,
    "seq_len": 128,
    "lr": 2e-5,
    "schedule": "linear",
    "min_lr": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "log_every": 10,
}
"""BERT's settings for GLUE (Devlin et al. 2019, arXiv 1810.04805, section 4.1 and appendix A.3); a tenth of the steps
are its warm-up."""


def settings(given: Mapping[str, Any], epochs: float | None = None) -> dict[str, Any]:
    """The settings of a new run of fine-tuning: `given`, and for those left out BERT's for GLUE.

    Args:
        given: settings; "pretrained" is needed.
        epochs: passes over the train set, if the steps aren't given.

    Raises:
        UserError: the model or the examples can't be used, or both steps and epochs are given.
    """
    if epochs is not None and "steps" in given:
        raise UserError(
            f"--epochs and --steps both say how long to train, got {epochs:g} and {given['steps']}; give one"
        )
    if epochs is not None and not epochs > 0:
        raise UserError(f"epochs must be > 0, got {epochs:g}")
    filled = {**DEFAULTS, **given}
    filled["task"] = given.get("task") or OWN_TASK
    # Checked before the model and the examples are read.
    config = TrainConfig.from_json(filled)
    count = len(read_examples(config).train)
    epoch = math.ceil(count / config.batch_size)
    steps = given.get("steps") or max(1, math.ceil((epochs or EPOCHS) * count / config.batch_size))
    source = read_pretrained(Path(str(config.pretrained)))
    own = {"steps": steps, "warmup": steps // 10, "eval_every": epoch, "checkpoint_every": epoch}
    own |= {"model": _model_type(source.path), "tokenizer": "the model's own", "pretrained": str(source.path.resolve())}
    return {**filled, **own, **{name: given[name] for name in own if name in given and name != "pretrained"}}


def _model_type(path: Path) -> str:
    return str(read_json(path / "config.json").get("model_type"))


# ---- several runs ----------------------------------------------------------------------------------------------


def rows(plan: Plan) -> list[dict[str, Any]]:
    """A row for each strategy, over its finished runs: figures with mean, sample standard deviation and values."""
    finals: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in plan.strategies}
    bytes_per_param: dict[str, float] = {}
    for run in plan.runs():
        if run.finished:
            record = read_json(run.folder / "run.json")
            finals[run.config.strategy].append(record["final"])
            bytes_per_param[run.config.strategy] = record["bytes_per_param"]
    return [_row(strategy, found, bytes_per_param[strategy]) for strategy, found in finals.items() if found]


def _row(strategy: str, finals: Sequence[Mapping[str, Any]], bytes_per_param: float) -> dict[str, Any]:
    names = finals[0]["metrics"]
    return {
        "strategy": strategy,
        "seeds": len(finals),
        "metrics": {name: _spread([final["metrics"][name] for final in finals]) for name in names},
        "validation_loss": _spread([final["validation_loss"] for final in finals]),
        "edq_ratio": _spread([final["edq_ratio"] for final in finals]),
        "lost_fraction": _spread([final["lost_fraction"] for final in finals]),
        "bytes_per_param": bytes_per_param,
    }


def _spread(values: list[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; null where a value is missing, or for the latter where there is but one."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return {
        "mean": fmean(known) if whole else None,
        "spread": stdev(known) if whole and len(known) > 1 else None,
        "values": values,
    }


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for the terminal."""
    names = list(found[0]["metrics"]) if found else []
    made = Table("strategy", "seeds", *names, "validation loss", "EDQ ratio", "bytes/param", box=box.SIMPLE)
    for row in found:
        figures = [*(row["metrics"][name] for name in names), row["validation_loss"], row["edq_ratio"]]
        made.add_row(row["strategy"], str(row["seeds"]), *map(_text, figures), f"{row['bytes_per_param']:.4g}")
    return made


def _text(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "–"
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.4f}"
    return f"{figure['mean']:.4f}{spread}"

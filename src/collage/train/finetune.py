"""What `collage finetune` runs: the settings that it has unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collage.train.classification import read_pretrained
from collage.train.compare import read_json
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

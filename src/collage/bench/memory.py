"""`collage bench memory`: the peak of real training steps beside what `collage plan` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import collage
from collage.bench.contenders import own_contenders
from collage.bench.timing import Watcher
from collage.bench.training import COMPUTING, STEPPING, Setup, peaks
from collage.plan.memory import Planner, Settings
from collage.plan.models import Subject
from collage.train.products import products


@dataclass(frozen=True)
class Case:
    """One model, strategy and way to train it.

    Attributes:
        subject: the model.
        strategy: name of the strategy.
        checkpointing: whether blocks are computed again in the backward.
        settings: the rest; its products are those of the device.
    """

    subject: Subject
    strategy: str
    checkpointing: bool
    settings: Settings

    @property
    def name(self) -> str:
        """For people who watch."""
        how = ", checkpointing" if self.checkpointing else ""
        return f"{self.strategy}, {self.settings.attention}{how}"

    @property
    def setup(self) -> Setup:
        """How it is trained."""
        (own,) = own_contenders([self.strategy], [None], torch.bfloat16)
        return Setup(self.subject, self.settings, self.checkpointing, own.dtype, own.build, self.strategy)


def settings_here(device: torch.device, strategy: str, micro_batch: int, attention: str) -> Settings:
    """How a device trains a strategy: with matrix products as `collage train` makes them there."""
    dtype = collage.strategies()[strategy].param_dtype(torch.bfloat16)
    return Settings(micro_batch=micro_batch, attention=attention, products=products(device, dtype))


def measure(cases: Sequence[Case], device: torch.device, watcher: Watcher) -> list[dict[str, Any]]:
    """A row for every case: bytes planned and measured, of both halves of a step and of the whole."""
    planners: dict[tuple[int, Settings], Planner] = {}
    rows = []
    for case in cases:
        watcher.warming(case.name)
        planner = planners.setdefault((id(case.subject), case.settings), Planner(case.subject, case.settings))
        phases = planner.needs(collage.strategies()[case.strategy], case.checkpointing).phases(
            case.settings.micro_batch
        )
        planned = {COMPUTING: max(phases["forward"], phases["backward"]), STEPPING: phases["step"]}
        rows.append(_row(case, planned, peaks(case.setup, device)))
    return rows


def _row(case: Case, planned: dict[str, int], found: dict[str, int]) -> dict[str, Any]:
    peak, real = max(planned.values()), max(found.values())
    return {
        "model": case.subject.label,
        "parameters": case.subject.count,
        "strategy": case.strategy,
        "seq_len": case.subject.seq_len,
        "micro_batch": case.settings.micro_batch,
        "attention": case.settings.attention,
        "checkpointing": case.checkpointing,
        "products": case.settings.products,
        "planned_bytes": peak,
        "measured_bytes": real,
        "error": peak / real - 1,
        "computing": {"planned_bytes": planned[COMPUTING], "measured_bytes": found[COMPUTING]},
        "stepping": {"planned_bytes": planned[STEPPING], "measured_bytes": found[STEPPING]},
    }

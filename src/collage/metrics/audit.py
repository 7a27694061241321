"""Watching an optimizer: on chosen steps, how much of the intended update was kept, and where it was lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from collage.kernels import SUMS
from collage.metrics.records import Record, record
from collage.optim import AdamW, StepRow


class Report(TypedDict):
    """An audited step: in total, per parameter group, per named module."""

    total: Record
    groups: list[Record]
    modules: dict[str, Record]


class Audit:
    """Receives the sums of every ``every``-th step. Made by :func:`audit`.

    Attributes:
        every: steps between audited ones; may be changed at any time.
        steps: numbers of the steps audited so far.
    """

    def __init__(self, optimizer: AdamW, every: int, model: nn.Module | None) -> None:
        _check_every(every)
        self.every = every
        self.steps: list[int] = []
        self._optimizer = optimizer
        self._names = {} if model is None else {id(param): name for name, param in model.named_parameters()}
        self._rows: Sequence[StepRow] = ()
        optimizer.add_observer(self)

    def wants(self, step: int) -> bool:
        """Whether the step with this number (from 1) is audited."""
        _check_every(self.every)
        return step % self.every == 0

    def record(self, step: int, rows: Sequence[StepRow]) -> None:
        """Keeps an audited step's sums, on their device; the optimizer calls it."""
        self.steps.append(step)
        self._rows = rows

    @property
    def last(self) -> Report | None:
        """The report of the last audited step, or None before the first."""
        return self.report() if self.steps else None

    def report(self) -> Report:
        """The figures of the last audited step; see :mod:`collage.metrics.records`.

        Modules are named after the parameters: by ``model.named_parameters()`` if the audit was given a model, else by
        the names that the optimizer was given; parameters without either count in the total and their group only.

        Raises:
            RuntimeError: no step has been audited yet.
        """
        if not self.steps:
            raise RuntimeError(
                f"no step has been audited yet: with every={self.every} the first is step {self.every}. Take steps "
                "first, or make the audit with a smaller `every`"
            )
        groups: dict[int, list[StepRow]] = {}
        modules: dict[str, list[StepRow]] = {}
        for row in self._rows:
            groups.setdefault(row.group, []).append(row)
            name = self._names.get(id(row.param), row.name)
            if name is not None:
                modules.setdefault(name.rpartition(".")[0] or name, []).append(row)
        every_group = range(len(self._optimizer.param_groups))
        return Report(
            total=self._record(self._rows),
            groups=[self._record(groups.get(index, ())) for index in every_group],
            modules={name: self._record(rows) for name, rows in modules.items()},
        )

    def detach(self) -> None:
        """Stops watching; what has been recorded stays."""
        self._optimizer.remove_observer(self)

    def _record(self, rows: Iterable[StepRow]) -> Record:
        rows = list(rows)
        sums = [row.sums.to("cpu", torch.float64) for row in rows]
        total = torch.stack(sums).sum(0) if sums else torch.zeros(len(SUMS), dtype=torch.float64)
        return record(self.steps[-1], total, sum(row.param.numel() for row in rows))


def _check_every(every: int) -> None:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer >= 1, got {every!r}")


def audit(optimizer: Optimizer, every: int = 50, model: nn.Module | None = None) -> Audit:
    """Audits every ``every``-th step of an optimizer from the very step it takes; other steps cost nothing.

    Args:
        optimizer: a :class:`collage.AdamW`, or a wrapper that holds one as ``.optimizer`` (Accelerate's).
        every: steps between audited ones, >= 1; step numbers that it divides are audited.
        model: names the modules in the report; not needed where the optimizer was given named parameters.

    Returns:
        The audit: ``.report()`` after an audited step, ``.last``, ``.detach()``.

    Raises:
        TypeError: the optimizer is not a collage optimizer.
        ValueError: ``every`` is not a positive integer.
    """
    inner: Any = optimizer
    while not isinstance(inner, AdamW) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, AdamW):
        raise TypeError(
            f"the audit takes its sums from collage's own step, got {type(optimizer).__name__}; construct "
            "collage.AdamW (strategy='plain' steps as a low-precision torch.optim.AdamW does)"
        )
    return Audit(inner, every, model)

"""Watching an optimizer: on chosen steps, how much of the intended update was kept, and where it was lost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from collage.metrics.copies import Row, Rows
from collage.metrics.records import Record, record_of
from collage.metrics.schedules import learning_rates
from collage.metrics.verdict import Facts, forecast, verdict
from collage.metrics.watch import Watch
from collage.optim import AdamW, StepRow
from collage.optim.strategies import LOW_PRECISION, layout_of, resolve


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

    def __init__(
        self,
        optimizers: Sequence[Any],
        every: int,
        model: nn.Module | None,
        *,
        details: bool = False,
        memory: int | None = None,
        window: int = 1,
    ) -> None:
        _check_every(every)
        self.every = every
        self.steps: list[int] = []
        self._optimizers = optimizers
        self._names = {} if model is None else {id(param): name for name, param in model.named_parameters()}
        self._rows: list[list[Row]] = [[] for _ in optimizers]
        self._lr: float | Tensor = 0.0
        self._own = {index: _Own(self, index) for index, each in enumerate(optimizers) if isinstance(each, AdamW)}
        for index, own in self._own.items():
            optimizers[index].add_observer(own)
        self._watches = [
            Watch(each, self.wants, partial(self._seen, index), memory, window)
            for index, each in enumerate(optimizers)
            if details or index not in self._own
        ]

    def wants(self, step: int) -> bool:
        """Whether the step with this number (from 1) is audited."""
        _check_every(self.every)
        return step % self.every == 0

    def _seen(self, index: int, step: int, rows: Rows) -> None:
        """Keeps what was seen from outside; the sums of a step that gives them count more."""
        if index in self._own:
            summed = {id(row.param): row.sums for row in self._rows[index]}
            for row in rows:
                row.sums = summed.get(id(row.param), row.sums)
        self.keep(index, step, rows)

    def keep(self, index: int, step: int, rows: Rows) -> None:
        """Keeps an audited step of one of the optimizers."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        self._rows[index] = list(rows)
        lr = self._optimizers[0].param_groups[0].get("lr", 0.0)
        # Read when a verdict asks for it: a tensor may be on another device.
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr

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
        step = self.steps[-1]
        return Report(
            total=record_of(step, [row for each in self._rows for row in each]),
            groups=[
                record_of(step, [row for row in each if row.group == index])
                for each, optimizer in zip(self._rows, self._optimizers, strict=True)
                for index in range(len(optimizer.param_groups))
            ],
            modules={name: record_of(step, [row for _, row in each]) for name, each in self._modules().items()},
        )

    def verdict(self, schedule: Any = None, last_step: int | None = None) -> list[str]:
        """What the last audited step means, in plain words, with the remedy: a line for each module that loses, the
        worst first; one line if none does.

        Args:
            schedule: the learning-rate schedule: step (from 1) -> learning rate, or a torch scheduler that is ready
                for the next step. With it, a last line says after which step bare weights of the parameters' dtype
                would stop learning, if they would: the updates are taken as those of the audited step, times the
                learning rate.
            last_step: the run's last step; needed with ``schedule``.

        Raises:
            RuntimeError: no step has been audited yet.
            ValueError: a schedule without ``last_step``.
        """
        report = self.report()
        named = self._modules() or {"all parameters": [(i, row) for i, rows in enumerate(self._rows) for row in rows]}
        records = {name: report["modules"].get(name, report["total"]) for name in named}
        worst = sorted(named, key=lambda name: 1.0 if (kept := records[name]["edq_ratio"]) is None else kept)
        lines = [line for name in worst if (line := verdict(name, records[name], self._facts(named[name]))) is not None]
        if not lines:
            ratio = report["total"]["edq_ratio"]
            lines = ["no update to judge" if ratio is None else f"nothing is lost: EDQ ratio {ratio:.3f}"]
        if schedule is not None:
            if last_step is None:
                raise ValueError("verdict(schedule) needs last_step, the number of the run's last step")
            lines += self._forecast(report, schedule, last_step)
        return lines

    def _forecast(self, report: Report, schedule: Any, last_step: int) -> list[str]:
        step, histogram = self.steps[-1], report["total"].get("update_ulps")
        low = [row for each in self._rows for row in each if row.param.dtype in LOW_PRECISION]
        now = float(self._lr)
        if histogram is None or not low or not now:
            return []
        rates = learning_rates(schedule, step + 1, last_step)
        line = forecast(histogram, [rate / now for rate in rates], step + 1, low[0].param.dtype)
        return [] if line is None else [line]

    def _facts(self, rows: list[tuple[int, Row]]) -> Facts:
        """Of the first of these parameters: a module's share an optimizer and, nearly always, a dtype."""
        index, row = rows[0]
        optimizer = self._optimizers[index]
        group = optimizer.param_groups[row.group]
        layout = layout_of(group["strategy"], row.param) if isinstance(optimizer, AdamW) else None
        betas = group.get("betas", (None, group.get("beta2")))
        state = getattr(optimizer, "state", {}).get(row.param, {})
        return Facts(
            dtype=row.param.dtype,
            strategy=None if layout is None else resolve(group["strategy"]).name,
            adam="exp_avg_sq" in state or "state2" in state,
            drawn=layout is not None and layout.param.stochastic,
            beta2=None if betas[1] is None else float(betas[1]),
        )

    def _modules(self) -> dict[str, list[tuple[int, Row]]]:
        """The rows of each named module, each with its optimizer's index."""
        modules: dict[str, list[tuple[int, Row]]] = {}
        for index, rows in enumerate(self._rows):
            for row in rows:
                name = self._names.get(id(row.param), row.name)
                if name is not None:
                    modules.setdefault(name.rpartition(".")[0] or name, []).append((index, row))
        return modules

    def detach(self) -> None:
        """Stops watching; what has been recorded stays."""
        for index, own in self._own.items():
            self._optimizers[index].remove_observer(own)
        for watch in self._watches:
            watch.detach()


class _Own:
    """Takes the sums of collage's own optimizer from the very step, on their device."""

    def __init__(self, audit: Audit, index: int) -> None:
        self._audit, self._index = audit, index

    def wants(self, step: int) -> bool:
        return self._audit.wants(step)

    def record(self, step: int, rows: Sequence[StepRow]) -> None:
        kept = [Row(each.group, each.param, each.name, each.param.numel(), sums=each.sums) for each in rows]
        self._audit.keep(self._index, step, kept)


def _check_every(every: int) -> None:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer >= 1, got {every!r}")


def audit(
    optimizer: Any,
    every: int = 50,
    model: nn.Module | None = None,
    *,
    details: bool = False,
    memory: int | None = 1 << 30,
    window: int = 1,
) -> Audit:
    """Audits every ``every``-th step of an optimizer; the run has the same bits with and without.

    A :class:`collage.AdamW` gives the sums of the very step. Any other optimizer is watched from outside: parameters,
    gradients and state are copied before an audited step, the step is replayed on the copies in float64 with the
    optimizer's own rule, and what was stored is compared with what came out. Nothing is held afterwards. Served are
    torch's optimizers in all their implementations, :class:`collage.Compensated`, torch-optimi, torchao, bitsandbytes
    (Adam, AdamW, SGD) and DeepSpeedCPUAdam; any other ``torch.optim.Optimizer`` is tried with its own ``step``, and the
    replay counts if it explains what was stored. Where there is none, ``report()["total"]["replayed"]`` is False,
    ``"reasons"`` says why, and unchanged elements and displacement are what is left to see.

    Args:
        optimizer: an optimizer; a wrapper that holds one as ``.optimizer`` (Accelerate's, Lightning's); a container of
            several as ``.optimizers`` (torchtitan's), or a list of them.
        every: steps between audited ones, >= 1; step numbers that it divides are audited.
        model: names the modules in the report; not needed where the optimizer was given named parameters.
        details: of a :class:`collage.AdamW`, also the figures that come from outside the step; other optimizers always
            have them.
        memory: bytes that the copies of an audited step may take. Beyond, evenly spaced runs of each parameter's
            elements stand for all. None: no bound.
        window: steps over which the displacement is taken where there is no replay, up to the audited one.

    Returns:
        The audit: ``.report()`` after an audited step, ``.last``, ``.detach()``.

    Raises:
        TypeError: it is no optimizer and holds none.
        ValueError: ``every``, ``memory`` or ``window`` is not a positive integer.
    """
    for name, value in (("window", window), ("memory", 1 if memory is None else memory)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    found = inner_optimizers(optimizer)
    return Audit(found, every, model, details=details, memory=memory, window=window)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers that step."""
    members = optimizer if isinstance(optimizer, (list, tuple)) else getattr(optimizer, "optimizers", None)
    if isinstance(members, (list, tuple)) and members:
        return [inner for member in members for inner in inner_optimizers(member)]
    within = getattr(optimizer, "optimizer", None)
    if (
        within is not None
        and not isinstance(optimizer, AdamW)
        and (hasattr(within, "step") or hasattr(within, "optimizer"))
    ):
        return inner_optimizers(within)
    if not isinstance(optimizer, Optimizer) and not all(hasattr(optimizer, name) for name in ("step", "param_groups")):
        raise TypeError(
            f"the audit takes an optimizer, or what holds one as .optimizer, got {type(optimizer).__name__} without "
            "step and param_groups"
        )
    return [optimizer]

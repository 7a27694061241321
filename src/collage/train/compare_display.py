"""What a comparison shows: a bar for each run on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from collage.train.compare import Outcome, Planned

PLAIN_LINES = 4
"""Lines for each run where there are no bars."""

TOGETHER = "together"


def figures_text(figures: dict[str, Any]) -> str:
    """The latest figures of a run in one line."""
    parts = (("loss", "loss {:.3f}"), ("tokens_per_s", "{:,.0f} tokens/s"), ("edq_ratio", "EDQ ratio {:.3f}"))
    return "  ".join(form.format(figures[key]) for key, form in parts if figures.get(key) is not None)


class CompareDisplay:
    """Shows runs as they go; a `collage.train.compare.Watcher`."""

    def __init__(self, planned: Sequence[Planned], console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        for each in planned:
            task = self._bars.add_task(each.name, total=each.config.steps, figures="waiting", start=False)
            self._tasks[each.name] = task
        steps = sum(each.config.steps for each in planned)
        self._together = self._bars.add_task(TOGETHER, total=steps, figures="")

    def __enter__(self) -> CompareDisplay:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line, above the bars if there are some."""
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def started(self, planned: Planned) -> None:
        """A run begins."""
        self._bars.start_task(self._tasks[planned.name])
        self._bars.update(self._tasks[planned.name], figures="starting")
        if self._bars.disable:
            self.say(f"{planned.name}: {'going on' if planned.started else 'starting'}")

    def progressed(self, planned: Planned, figures: dict[str, Any]) -> None:
        """A run has these latest figures."""
        step, steps = figures.get("step", 0), planned.config.steps
        if not step:
            return
        before = self._done.get(planned.name, 0)
        self._advance(planned, step)
        self._bars.update(self._tasks[planned.name], figures=figures_text(figures))
        if self._bars.disable and step * PLAIN_LINES // steps > before * PLAIN_LINES // steps:
            self.say(f"{planned.name}: step {step}/{steps}  {figures_text(figures)}")

    def _advance(self, planned: Planned, step: int) -> None:
        self._done[planned.name] = step
        self._bars.update(self._tasks[planned.name], completed=step)
        self._bars.update(self._together, completed=sum(self._done.values()))

    def ended(self, outcome: Outcome) -> None:
        """A run is over."""
        planned = outcome.planned
        if outcome.status == "finished":
            self._advance(planned, planned.config.steps)
        else:
            self._bars.update(self._tasks[planned.name], figures=outcome.status)
        if outcome.status == "failed":
            self.say(f"{planned.name} failed; the last lines of {planned.folder}/output.log:", "bold red")
            for line in outcome.output:
                self.say(f"  {line}")
        elif self._bars.disable:
            self.say(f"{planned.name}: {outcome.status}")

    def stopping(self) -> None:
        """The runs were asked to save and leave."""
        self.say("stopping: each run takes its step to the end and saves a checkpoint")

"""What a benchmark shows: a bar while it runs, a table at the end, the lists of shapes and peers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from collage.bench import peers
from collage.bench.columns import COLUMNS, Row, heading, left_out, shown_columns
from collage.bench.contenders import torch_contenders
from collage.bench.shapes import SHAPES

REDRAW = 0.5
"""Seconds between two drawings of the bar while rounds run."""


def duration(seconds: float) -> str:
    """`2 min 5 s`."""
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


class BenchDisplay:
    """Shows how a benchmark goes; a Watcher of `collage.bench.timing` and of `collage.bench.precision`.

    Without a terminal: a line for each phase.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._bars.add_task("building", total=None)
        self._drawn = 0.0

    def __enter__(self) -> BenchDisplay:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warming(self, name: str) -> None:
        """A contender is built and makes its first steps."""
        self._bars.update(self._task, description=f"warming up {name}", total=None, refresh=True)

    def planned(self, seconds: float) -> None:
        """The rounds that come next take about so long."""
        self.say(f"rounds: about {duration(seconds)}")
        self._bars.reset(self._task, description="rounds", total=seconds)

    def expects(self, steps: int) -> None:
        """So many steps are to come, over all runs."""
        self._bars.reset(self._task, description="building", total=steps)

    def begins(self, what: str) -> None:
        """A run begins that is made of steps."""
        self._bars.update(self._task, description=what, refresh=True)
        if not self.console.is_terminal:
            self.say(what)

    def stepped(self) -> None:
        """A step of all contenders is over."""
        self.took_turn("", 1.0)

    def took_turn(self, name: str, seconds: float) -> None:
        """A turn is over."""
        # Drawn between turns, never by a thread of its own: that would take time from the turn that is running.
        now = time.monotonic()
        due = now - self._drawn > REDRAW
        self._bars.update(self._task, advance=seconds, refresh=due)
        self._drawn = now if due else self._drawn


def show(result: dict[str, Any], console: Console) -> None:
    """The table of a result for each of its sets of shapes, and what was left out."""
    room = console.options.update(width=1000)
    for name in dict.fromkeys(row["shapes"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["shapes"] == name]
        table = _table(rows, narrow=False)
        fits = console.measure(table, options=room).maximum <= console.width
        console.print(table if fits else _table(rows, narrow=True))
        for line in left_out(rows):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row], *, narrow: bool) -> Table:
    table = Table(title=heading(rows), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = shown_columns(rows, narrow)
    for column in columns:
        table.add_column(column.heading, justify="left" if column is COLUMNS[0] else "right", no_wrap=True)
    for row in rows:
        if row["rounds"]:
            style = {"collage": "bold", "null": "dim"}.get(row["kind"])
            table.add_row(*(column.show(row) for column in columns), style=style)
    return table


def show_lists(device: torch.device, dtype: torch.dtype, console: Console) -> None:
    """The sets of shapes, and the peers with their versions, or why they cannot run here."""
    shapes = Table("shapes", "parameters", "tensors", "what", box=box.SIMPLE_HEAD, pad_edge=False)
    for each in SHAPES.values():
        shapes.add_row(each.name, f"{each.parameters:,}", f"{len(each.shapes):,}", each.summary)
    others = Table("peer", "version", "optimizers", "on this machine", box=box.SIMPLE_HEAD, pad_edge=False)
    own = "; ".join(each.name.removeprefix("torch ") for each in torch_contenders(dtype))
    others.add_row("torch", str(torch.__version__), own, "can run")
    for peer in peers.PEERS:
        variants = "; ".join(variant.name for variant in peer.variants)
        others.add_row(peer.name, peer.installed() or "–", variants, peer.unavailable(device) or "can run")
    console.print(shapes)
    console.print(others)


def describe(sets: Sequence[str], contenders: int, rounds: int, budget: float, threads: int) -> str:
    """What a run is about to do, in a sentence."""
    return (
        f"{contenders} contenders on {', '.join(sets)}, {threads} {'thread' if threads == 1 else 'threads'}, {rounds} "
        f"interleaved rounds (fewer for what takes more than {budget:g} s): about {duration(contenders * budget)} per "
        "set at most, and the time that peers take to compile"
    )

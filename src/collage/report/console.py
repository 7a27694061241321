"""The report on a terminal: Rich's table, and a sentence for each strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from collage.report.columns import COLUMNS, cells
from collage.report.page import warnings
from collage.report.verdicts import verdict


def table(summary: Mapping[str, Any]) -> Table:
    """The figures of all strategies as a table."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(COLUMNS):
        made.add_column(column.heading, justify="right" if index else "left", vertical="bottom")
    for row in summary["strategies"]:
        made.add_row(*cells(row))
    return made


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the table, what is to be known before reading it, and a sentence for each strategy."""
    for warning in warnings(summary):
        console.print(warning, style="yellow", markup=False, highlight=False)
    console.print(table(summary))
    for row in summary["strategies"]:
        console.print(verdict(row), markup=False, highlight=False)

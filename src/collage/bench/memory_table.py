"""The columns of `collage bench memory`, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from collage.bench.columns import Column, Row


def gigabytes(count: float) -> str:
    """Bytes in GB (10^9) with three decimals."""
    return f"{count / 1e9:.3f}"


def _error(row: Row) -> str:
    return f"{100 * row['error']:+.2f} %"


COLUMNS = (
    Column("strategy", "strategy", lambda row: str(row["strategy"])),
    Column("attention", "attention", lambda row: str(row["attention"])),
    Column("checkpointing", "checkpointing", lambda row: "yes" if row["checkpointing"] else "no"),
    Column("planned GB", "planned_bytes", lambda row: gigabytes(row["planned_bytes"])),
    Column("measured GB", "measured_bytes", lambda row: gigabytes(row["measured_bytes"])),
    Column("error", "error", _error),
)
MEANINGS = (
    ("planned", "the peak of a step by `collage plan`, with matrix products as this device makes them"),
    ("measured", "the largest sum of bytes that torch had allocated at a time, over two steps"),
    ("error", "planned to measured"),
)


def heading(rows: list[Row]) -> str:
    """The model and its batch."""
    row = rows[0]
    return (
        f"{row['model']}: {row['parameters']:,} parameters, micro-batch {row['micro_batch']} of {row['seq_len']} tokens"
    )


def show(result: Mapping[str, Any], console: Console) -> None:
    """The table of a result."""
    rows = result["rows"]
    table = Table(title=heading(rows), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column.heading, justify="left" if column is COLUMNS[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(column.show(row) for column in COLUMNS))
    console.print(table)
    worst = max((abs(row["error"]) for row in rows), default=0.0)
    console.print(f"largest error: {100 * worst:.2f} %", highlight=False, markup=False)

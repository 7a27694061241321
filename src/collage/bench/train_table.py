"""The columns of `collage bench train`, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from collage.bench.columns import Column, Row, milliseconds
from collage.report.wording import MISSING, plain


def _gigabytes(key: str) -> Column:
    heading = {"peak_bytes": "peak GB", "planned_peak_bytes": "planned GB"}[key]
    return Column(heading, key, lambda row: MISSING if row[key] is None else f"{row[key] / 1e9:.2f}")


COLUMNS = (
    Column("contender", "contender", lambda row: str(row["contender"])),
    Column("ms", "ms_p50", lambda row: milliseconds(row["ms_p50"])),
    Column("p10", "ms_p10", lambda row: milliseconds(row["ms_p10"]), True),
    Column("p90", "ms_p90", lambda row: milliseconds(row["ms_p90"]), True),
    Column("tokens/s", "tokens_per_s", lambda row: plain(row["tokens_per_s"], ",.0f")),
    Column("x best", "ratio", lambda row: plain(row["ratio"], ".2f")),
    Column("x unfused", "ratio_to_unfused", lambda row: plain(row["ratio_to_unfused"], ".2f")),
    _gigabytes("peak_bytes"),
    _gigabytes("planned_peak_bytes"),
    Column("largest", "max_micro_batch", lambda row: f"{row['max_micro_batch']:,}"),
    Column("rounds", "rounds", lambda row: str(row["rounds"]), True),
)
MEANINGS = (
    (
        "ms, p10, p90",
        "milliseconds of a whole training step (forward, backward, clipping, optimizer): the median of its rounds, and "
        "the tenth and ninetieth percentile",
    ),
    ("tokens/s", "tokens of the step over the median"),
    (
        "x best",
        "median of the per-round ratios to the faster of two ways: torch's fused AdamW on float32 masters of a "
        "bfloat16 model, and autocast with float32 parameters and fused AdamW",
    ),
    ("x unfused", "the same to AdamW on float32 masters as a Python loop over the parameters"),
    ("peak GB", "the most bytes (10^9) that torch had allocated at a time, measured in a process of its own"),
    ("planned GB", "the same by `collage plan`"),
    ("largest", "the micro-batch that fits into the memory that may be used, by `collage plan`"),
)


def heading(rows: Sequence[Row]) -> str:
    """The model and its batch."""
    row = rows[0]
    again = ", checkpointing" if row["checkpointing"] else ""
    return (
        f"{row['model']}: {row['parameters']:,} parameters, micro-batch {row['micro_batch']} of {row['seq_len']} "
        f"tokens, {row['attention']} attention{again}"
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """What ratios are taken to, what was not timed, and how much memory may be used."""
    best = next((row["best"] for row in rows if row["best"]), None)
    lines = [f"best mixed-precision baseline: {best}"] if best else ["no mixed-precision baseline was timed"]
    lines.append(f"memory that may be used: {rows[0]['memory_bytes'] / 1e9:.1f} GB")
    lines += [f"{row['status']}: {row['contender']}: {row['reason']}" for row in rows if row["status"] != "timed"]
    apart = [row["contender"] for row in rows if row["rounds"] and best and not row["same_rounds"]]
    return [*lines, f"not in the same rounds as the best baseline: {', '.join(apart)}"] if apart else lines


def models(result: Mapping[str, Any]) -> list[list[Row]]:
    """The rows of each model."""
    names = dict.fromkeys(row["model"] for row in result["rows"])
    return [[row for row in result["rows"] if row["model"] == name] for name in names]


def show(result: Mapping[str, Any], console: Console) -> None:
    """The table of each model, and what was left out."""
    for rows in models(result):
        table = Table(title=heading(rows), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        columns = [column for column in COLUMNS if not (column.wide and console.width < 110)]
        for column in columns:
            table.add_column(column.heading, justify="left" if column is COLUMNS[0] else "right", no_wrap=True)
        for row in rows:
            if row["rounds"]:
                table.add_row(*(column.show(row) for column in columns), style="bold" if row["strategy"] else None)
        console.print(table)
        for note in notes(rows):
            console.print(note, highlight=False, markup=False, soft_wrap=True)

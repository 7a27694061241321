"""The columns of every table of a benchmark, each once, and the lines about what was not timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collage.report.wording import MISSING, plain

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: `show(row)` is the text of its cell; `key` is the entry of a row that it needs; `wide` ones are left
    out where there is little room."""

    heading: str
    key: str
    show: Callable[[Row], str]
    wide: bool = False


def _figure(heading: str, key: str, form: str, wide: bool = False) -> Column:
    return Column(heading, key, lambda row: plain(row[key], form), wide)


def milliseconds(value: float | None) -> str:
    """Three digits, whatever the size."""
    if value is None:
        return MISSING
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _share(row: Row) -> str:
    return MISSING if row["null_share"] is None else f"{row['null_share']:.2f}"


COLUMNS = (
    Column("contender", "contender", lambda row: str(row["contender"])),
    Column("ms", "ms_p50", lambda row: milliseconds(row["ms_p50"])),
    Column("p10", "ms_p10", lambda row: milliseconds(row["ms_p10"]), True),
    Column("p90", "ms_p90", lambda row: milliseconds(row["ms_p90"]), True),
    Column("host ms", "host_ms", lambda row: milliseconds(row["host_ms"])),
    _figure("x torch", "ratio", ".2f"),
    _figure("x joined", "ratio_to_joined", ".2f"),
    _figure("B moved", "bytes_moved_per_param", ".3g"),
    _figure("GB/s", "gb_per_s", ".1f", True),
    Column("of null", "null_share", _share),
    _figure("state B", "state_bytes_per_param", ".3g"),
    Column("rounds", "rounds", lambda row: str(row["rounds"]), True),
)
MEANINGS = (
    ("ms, p10, p90", "milliseconds of one step: the median of its rounds, and the tenth and ninetieth percentile"),
    (
        "host ms",
        "what the call takes on the host, least of three while warming up. The GPU is kept busy for longer before each "
        "timed step, as the backward does in training: its milliseconds are its own",
    ),
    ("x torch", "median of the per-round ratios to torch's fused AdamW on the same low-precision parameters"),
    ("x joined", "the same ratio to the contender's own step on the same elements in one tensor"),
    (
        "B moved",
        "the least number of bytes per parameter that a step in these formats reads and writes, the gradient included",
    ),
    ("GB/s", "those bytes over the median time"),
    (
        "of null",
        "share of the speed of a kernel that only reads and writes back as many streams of the same sizes, timed in "
        "the same rounds (median of per-round ratios)",
    ),
    ("state B", "bytes per parameter kept between steps, parameter and gradient apart, counted on the tensors"),
    (
        "null 222+2",
        "such a kernel by itself: three streams of 2-byte items in place, one only read, each a single tensor of all "
        "elements",
    ),
    ("copy", "torch's copy of 2-byte items from one tensor to another"),
    ("rounds", "timed steps; slow contenders take part in fewer rounds, spread evenly"),
)


def heading(rows: Sequence[Row]) -> str:
    """The title of a table: the set of shapes and its size."""
    count = rows[0]["tensors"]
    tensors = f"{count:,} tensor" if count == 1 else f"{count:,} tensors"
    return f"{rows[0]['shapes']}: {rows[0]['parameters']:,} parameters in {tensors}"


def shown_columns(rows: Sequence[Row], narrow: bool = False) -> list[Column]:
    """The columns that hold something in these rows; in a narrow place without the wide ones."""
    used = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    return [column for column in used if not (narrow and column.wide)]


def left_out(rows: Sequence[Row]) -> list[str]:
    """A line for every row that was not timed, or not to the end, or has no share of its null kernel."""
    lines = [f"{row['status']}: {row['contender']}: {row['reason']}" for row in rows if row["status"] != "timed"]
    reasons = dict.fromkeys(row["null_reason"] for row in rows if row["rounds"] and row["null_reason"])
    return lines + [f"no share of a null kernel: {reason}" for reason in reasons if reason]

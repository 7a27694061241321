"""A plan as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from collage.bench.columns import Column, Row
from collage.report.wording import MISSING


def size(count: float | None) -> str:
    """Bytes in the unit that leaves one to four digits before the point: `26.9 GB`, 10^9 bytes each."""
    if count is None:
        return MISSING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return f"{count:,.0f} B"


def show(result: Mapping[str, Any], console: Console) -> None:
    """The table, what is not planned, and what fits with the strategy asked for."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(_title(result))
    rows = [row for row in result["strategies"] if row["reason"] is None]
    if result["shards"] > 1 and rows:
        say(_gathered(next((row for row in rows if row["strategy"] == result["strategy"]), rows[0])))
    table = _table(result, rows, narrow=False)
    fits = console.measure(table, options=console.options.update(width=1000)).maximum <= console.width
    console.print(table if fits else _table(result, rows, narrow=True))
    say(
        "bytes on each device; kept: what the forward leaves to the backward; ckpt: each block recomputed in the "
        f"backward; largest: the micro-batch that fits into {size(result['memory_bytes'])}"
    )
    for row in result["strategies"]:
        if row["reason"]:
            say(f"not planned: {row['strategy']}: {row['reason']}")
    say(_verdict(result))


def _gathered(row: Mapping[str, Any]) -> str:
    around = row["gathered_bytes"]
    return (
        "in the peak, beside its shard, a device holds what FSDP2 has gathered: embeddings and head, the block at "
        "work and the next one, and in the backward whole gradients of embeddings, head and one block: "
        f"{size(around['forward'])} in the forward, {size(around['backward'])} in the backward"
    )


def _title(result: Mapping[str, Any]) -> str:
    model, shards = result["model"], result["shards"]
    where = "one device" if shards == 1 else f"each of {shards:,} devices"
    gradients = "" if result["grad_dtype"] == "model" else ", float32 gradients"
    return (
        f"{model['name']}: {model['parameters']:,} parameters in {result['dtype']}{gradients}, on {where}, "
        f"micro-batch {result['micro_batch']} of {result['seq_len']} tokens, {result['attention']} attention"
        + (", gradients accumulate" if result["accumulate"] else "")
        + (f", products in {result['products']}" if result["products"] != "native" else "")
    )


def _table(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, narrow: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = [column for column in _COLUMNS if not (narrow and column.wide)]
    table.add_column("strategy", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        asked = row["strategy"] == result["strategy"]
        name = f"> {row['strategy']}" if asked else f"  {row['strategy']}"
        table.add_row(name, *(column.show(row) for column in columns), style="bold" if asked else "")
    return table


def _cell(heading: str, key: str, part: str | None = None, wide: bool = False) -> Column:
    def show(row: Row) -> str:
        value = (row[part] if part else row)[key]
        return f"{value:,}" if key == "max_micro_batch" else size(value)

    return Column(heading, key, show, wide)


_COLUMNS = (
    Column("B/param", "bytes_per_param", lambda row: f"{row['bytes_per_param']:.3g}"),
    _cell("weights", "params_bytes", wide=True),
    _cell("gradients", "gradients_bytes", wide=True),
    _cell("states", "states_bytes"),
    _cell("kept", "activations_bytes", "without_checkpointing", wide=True),
    _cell("peak", "peak_bytes", "without_checkpointing"),
    _cell("largest", "max_micro_batch", "without_checkpointing"),
    _cell("kept\nckpt", "activations_bytes", "with_checkpointing", wide=True),
    _cell("peak\nckpt", "peak_bytes", "with_checkpointing"),
    _cell("largest\nckpt", "max_micro_batch", "with_checkpointing"),
)


def _verdict(result: Mapping[str, Any]) -> str:
    row = next(each for each in result["strategies"] if each["strategy"] == result["strategy"])
    if row["reason"]:
        return f"{row['strategy']} can't be planned in {result['dtype']}"
    said = []
    for key, text in (("without_checkpointing", "without checkpointing"), ("with_checkpointing", "with it")):
        part = row[key]
        most = part["max_micro_batch"]
        fits = f"micro-batches up to {most:,} fit" if most else "no micro-batch fits"
        said.append(
            f"{text} {fits} (micro-batch {result['micro_batch']} peaks at {size(part['peak_bytes'])} in the "
            f"{part['peak_phase']})"
        )
    return f"{row['strategy']} in {size(result['memory_bytes'])}: {'; '.join(said)}"

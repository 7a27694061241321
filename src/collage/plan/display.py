"""A plan as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

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
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    say(_title(result))
    rows = [row for row in result["strategies"] if row["reason"] is None]
    if result["shards"] > 1 and rows:
        asked = next((row for row in rows if row["strategy"] == result["strategy"]), rows[0])
        around = asked["gathered_bytes"]
        say(
            "in the peak, beside its shard, a device holds what FSDP2 has gathered: embeddings and head, the block at "
            "work and the next one, in the backward whole gradients of these and of one block: "
            f"{size(around['forward'])}, {size(around['backward'])}"
        )
    console.print(_table(result, rows))
    for row in result["strategies"]:
        if row["reason"]:
            say(f"not planned: {row['strategy']}: {row['reason']}")
    say(_verdict(result))


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


def _table(result: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    headings = ["B/param", "weights", "gradients", "states"]
    headings += ["kept", "peak", "largest", "kept ckpt", "peak ckpt", "largest ckpt"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        asked = row["strategy"] == result["strategy"]
        cells = [f"{row['bytes_per_param']:.3g}"]
        cells += [size(row[f"{part}_bytes"]) for part in ("params", "gradients", "states")]
        for key in ("without_checkpointing", "with_checkpointing"):
            part = row[key]
            cells += [size(part["activations_bytes"]), size(part["peak_bytes"]), f"{part['max_micro_batch']:,}"]
        table.add_row(
            f"> {row['strategy']}" if asked else f"  {row['strategy']}", *cells, style="bold" if asked else ""
        )
    table.caption = (
        "bytes on each device; kept: what the forward leaves to the backward; ckpt: each block recomputed in the "
        f"backward; largest: the micro-batch that fits into {size(result['memory_bytes'])}"
    )
    table.caption_justify = "left"
    return table


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

"""The commands `collage bench memory` and `collage bench train`, which train a whole model."""

from __future__ import annotations

from typing import Annotated

import typer

from collage.bench.arguments import Device, JsonFile, Threads, given_command, write_rows
from collage.plan.arguments import Family, Heads, Hidden, Intermediate, KvHeads, Layers, Model, Seq, Vocab
from collage.train.extras import need

MEASURED = "What is measured"

MEMORY = (
    "Measure the peak memory of real training steps beside what `collage plan` says of them.\n\n"
    "Every strategy makes two whole steps (forward, backward, clipping, optimizer), with and without recomputing each "
    "block in the backward. On a CPU every allocation of torch is counted, on a GPU its allocator tells."
)
"""In paragraphs of one line: Typer keeps the line breaks of a docstring."""


def memory(
    model: Model = None,
    hidden: Hidden = None,
    layers: Layers = None,
    heads: Heads = None,
    vocab: Vocab = None,
    kv_heads: KvHeads = None,
    intermediate: Intermediate = None,
    family: Family = None,
    seq: Seq = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences of a forward pass.", rich_help_panel=MEASURED)] = 1,
    strategies: Annotated[
        str, typer.Option(help="Precision strategies, separated by commas.", rich_help_panel=MEASURED)
    ] = "plus,mixed,fp32",
    attention: Annotated[
        str, typer.Option(help="sdpa, eager or both, separated by commas.", rich_help_panel=MEASURED)
    ] = "sdpa",
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the peak memory of real training steps beside what `collage plan` says of them."""
    need("train")
    from rich.console import Console

    from collage.bench.display import BenchDisplay
    from collage.bench.memory import Case, measure, settings_here
    from collage.bench.memory_table import show
    from collage.bench.options import check_writable, names, parse_device, parse_strategies, use_threads
    from collage.bench.results import MEMORY as KIND
    from collage.bench.results import facts, of_run
    from collage.plan.options import check_attention, check_micro_batch, subject

    if json_file is not None:
        check_writable(json_file)
    check_micro_batch(micro_batch)
    shape = {"hidden": hidden, "layers": layers, "heads": heads, "vocab": vocab, "kv_heads": kv_heads}
    trained = subject(model, {**shape, "intermediate": intermediate, "family": family}, seq)
    where = parse_device(device)
    cases = [
        Case(trained, strategy, again, settings_here(where, strategy, micro_batch, how))
        for how in map(check_attention, names(attention, "--attention"))
        for strategy in parse_strategies(strategies)
        for again in (False, True)
    ]
    console = Console()
    with use_threads(threads), BenchDisplay(console) as display:
        known = facts(KIND, ["transformers"], where, given_command())
        rows = measure(cases, where, display)
    result = {**known, "rows": [{**row, **of_run(known)} for row in rows]}
    show(result, console)
    write_rows(result, json_file, console)

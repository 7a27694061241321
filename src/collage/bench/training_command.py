"""The commands `collage bench memory` and `collage bench train`, which train a whole model."""

from __future__ import annotations

from typing import Annotated

import typer

from collage.bench.arguments import HOW, Device, JsonFile, Threads, given_command, write_rows
from collage.plan.arguments import Family, Heads, Hidden, Intermediate, KvHeads, Layers, Model, Seq, Vocab
from collage.train.extras import need

MEASURED, TIMED = "What is measured", "What is timed"

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


TRAIN = (
    "Time whole training steps: every strategy beside the ways to train in mixed precision with torch alone.\n\n"
    "A step is forward, backward, clipping and optimizer, on fresh weights and one batch. Arms take turns in the "
    "rounds of one process, where they fit into memory together. Ratios are to the faster of two mixed-precision "
    "baselines (fused AdamW on float32 masters of a bfloat16 model; autocast with float32 parameters and fused AdamW) "
    "and to the unfused one, a Python loop. What does not fit is skipped, with the bytes that the plan says.\n\n"
    "Without options: gpt-10m on a CPU, all GPT sizes of the paper on a GPU."
)
CPU_MODELS, GPU_MODELS = "gpt-10m", "gpt-125m,gpt-1.3b,gpt-2.7b,gpt-6.7b"


def train(
    models: Annotated[
        str | None,
        typer.Option(
            help="Models of `collage train`, separated by commas. Unset: gpt-10m on a CPU, the paper's GPT sizes on a "
            "GPU.",
            rich_help_panel=TIMED,
        ),
    ] = None,
    strategies: Annotated[
        str, typer.Option(help="Precision strategies, separated by commas.", rich_help_panel=TIMED)
    ] = "plain,light,plus,exact,compact,mixed",
    seq: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence. Unset: 256 on a CPU, 2048 on a GPU.", rich_help_panel=TIMED),
    ] = None,
    micro_batch: Annotated[int, typer.Option(help="Sequences of a step.", rich_help_panel=TIMED)] = 4,
    attention: Annotated[
        str | None, typer.Option(help="sdpa or eager. Unset: as `collage train` takes it.", rich_help_panel=TIMED)
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute each block in the backward.", rich_help_panel=TIMED)
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, at least 1.", rich_help_panel=HOW)] = 20,
    budget: Annotated[
        float, typer.Option(help="Seconds for the rounds of one arm, but five rounds at least.", rich_help_panel=HOW)
    ] = 30.0,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What may be in use at a time, such as 40GB. Unset: most of what is free.", rich_help_panel=HOW
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time whole training steps: every strategy beside the ways to train in mixed precision with torch alone."""
    need("train")
    from rich.console import Console

    from collage.bench.display import BenchDisplay
    from collage.bench.options import check_writable, make_train_plan, parse_device, use_threads
    from collage.bench.results import TRAIN as KIND
    from collage.bench.results import facts, of_run
    from collage.bench.train import run
    from collage.bench.train_table import show

    if json_file is not None:
        check_writable(json_file)
    where = parse_device(device)
    plan = make_train_plan(
        models=models or (CPU_MODELS if where.type == "cpu" else GPU_MODELS),
        strategies=strategies,
        seq=seq or (256 if where.type == "cpu" else 2048),
        micro_batch=micro_batch,
        attention=attention,
        checkpointing=checkpointing,
        device=where,
        rounds=rounds,
        budget=budget,
        memory=memory,
    )
    console = Console()
    with use_threads(threads), BenchDisplay(console) as display:
        known = facts(KIND, ["transformers"], where, given_command())
        rows = run(plan, display)
    result = {**known, "rounds": rounds, "budget_s": budget, "rows": [{**row, **of_run(known)} for row in rows]}
    show(result, console)
    write_rows(result, json_file, console)

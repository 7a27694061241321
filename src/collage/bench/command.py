"""The commands `collage bench ...`. Each imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from collage.bench.arguments import HOW, Device, JsonFile, Threads, given_command, write_rows
from collage.bench.training_command import MEMORY, TRAIN, memory, train
from collage.train.extras import need

WHAT, MEASURED = "What is timed", "What is measured"

bench = typer.Typer(
    help="Time the optimizer step beside its peers, measure what it delivers, and make pages of the results.",
    no_args_is_help=True,
)


STEP = (
    "Time one optimizer step: every strategy and backend beside every installed peer, on the same work.\n\n"
    "Contenders take turns in the rounds of one process, so that ratios hold even where the machine is disturbed. "
    "Shown for each: quantiles of the time, the ratio to torch's fused AdamW on the same parameters, bytes moved, the "
    "share of the speed of a kernel that only moves those bytes, bytes of state.\n\n"
    "Without options: all strategies and peers on 10 million parameters, two to four minutes on two cores; the first "
    "time longer, as some peers compile.\n\n"
    "On a machine that does other work at the same time, set OMP_WAIT_POLICY=passive: OpenMP's idle threads otherwise "
    "spin and take the cores from each other."
)
"""In paragraphs of one line: Typer keeps the line breaks of a docstring."""


@bench.command(help=STEP)
def step(
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Precision strategies, separated by commas. Unset: all of collage.strategies().",
            rich_help_panel=WHAT,
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Backends of these strategies, separated by commas: native (CPU), triton (GPU), eager (the "
            "definition, in plain torch operations: slow). Unset: all that can run on the device.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="all, none, or names separated by commas (see --list). A peer that is not installed or fails keeps a "
            "row with the reason. torch's fused AdamW, to which ratios are taken, always takes part.",
            rich_help_panel=WHAT,
        ),
    ] = "all",
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Sets of parameter shapes, separated by commas (see --list), timed one after the other. Unset: 10m "
            "on a CPU, gpt-125m,llama-1b-whole on a GPU.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bf16 or fp16: of the low-precision parameters and gradients.", rich_help_panel=WHAT)
    ] = "bf16",
    list_: Annotated[
        bool,
        typer.Option("--list", help="Show the sets of shapes and the peers, and time nothing.", rich_help_panel=WHAT),
    ] = False,
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Annotated[
        int,
        typer.Option(help="Interleaved rounds, a step of each contender in each; at least 2.", rich_help_panel=HOW),
    ] = 40,
    budget: Annotated[
        float,
        typer.Option(
            help="Seconds for the rounds of one contender: what is too slow for all rounds takes part in fewer, but in "
            "five at least.",
            rich_help_panel=HOW,
        ),
    ] = 4.0,
    memory: Annotated[
        float | None,
        typer.Option(
            help="GB that may be in use at a time. Contenders that do not fit together are timed in groups, each with "
            "the reference. Unset: most of what is free.",
            rich_help_panel=HOW,
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time one optimizer step: every strategy and backend beside every installed peer, on the same work."""
    need("bench")
    from rich.console import Console

    from collage.bench.display import BenchDisplay, describe, show, show_lists
    from collage.bench.options import check_writable, make_plan, parse_device, parse_dtype, use_threads
    from collage.bench.results import record, step_facts
    from collage.bench.step import run

    console = Console()
    if list_:
        show_lists(parse_device(device), parse_dtype(dtype), console)
        return
    if json_file is not None:
        check_writable(json_file)
    plan = make_plan(
        strategies=strategies,
        backends=backends,
        peers=peers,
        shapes=shapes,
        device=parse_device(device),
        dtype=parse_dtype(dtype),
        rounds=rounds,
        budget=budget,
        memory=memory,
    )
    with use_threads(threads) as used, BenchDisplay(console) as display:
        able = 1 + sum(not contender.unavailable for contender in plan.contenders)
        display.say(describe([each.name for each in plan.shapes], able, rounds, budget, used))
        known = step_facts(plan, given_command())
        result = record(run(plan, display), known)
    show(result, console)
    write_rows(result, json_file, console)


PRECISION = (
    "Measure what every strategy and every installed peer really delivers.\n\n"
    "Displacement: how far the weights go under noisy gradients of a constant mean, as a share of what AdamW in "
    "float64 does on the same gradients, for weights around 1 and around .02 and three learning rates. Weight decay "
    "alone, as a share of the exact decay. The stored second moment over the exact moving average, at three values of "
    "beta2, after gradients have become three times smaller.\n\n"
    "What counts is the value that the optimizer holds, its corrections and master copies included; parameters and "
    "gradients are bfloat16 (float16 and float32 where a strategy is for these).\n\n"
    "Without options: all strategies and peers on 131,072 elements, 10 to 15 minutes on one core, most of it for a few "
    "slow peers; with --peers none two minutes. The time is in proportion to --steps and, above some 10,000, to "
    "--elements."
)


@bench.command(help=PRECISION)
def precision(
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Precision strategies, separated by commas. Unset: all of collage.strategies().",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="all, none, or names separated by commas (see collage bench step --list). A peer that is not "
            "installed or fails keeps a row with the reason.",
            rich_help_panel=MEASURED,
        ),
    ] = "all",
    elements: Annotated[
        int,
        typer.Option(help="Of the tensor, in rows of 128: a multiple of 256, at least 4096.", rich_help_panel=MEASURED),
    ] = 2**17,
    steps: Annotated[
        int,
        typer.Option(
            help="Of the displacement and the decay, at least 10; of the second moment 6 / (1 - beta2), but at most "
            "three times as many.",
            rich_help_panel=MEASURED,
        ),
    ] = 1000,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what every strategy and every installed peer really delivers."""
    need("bench")
    from rich.console import Console

    from collage.bench.delivered import show
    from collage.bench.display import BenchDisplay
    from collage.bench.options import check_writable, make_precision_plan, parse_device, use_threads
    from collage.bench.precision import measure
    from collage.bench.results import PRECISION as KIND
    from collage.bench.results import distributions, facts, precision_record

    console = Console()
    if json_file is not None:
        check_writable(json_file)
    plan = make_precision_plan(
        strategies=strategies, peers=peers, device=parse_device(device), elements=elements, steps=steps
    )
    with use_threads(threads), BenchDisplay(console) as display:
        display.expects(plan.all_steps)
        known = facts(KIND, distributions(plan.contenders), plan.device, given_command())
        result = precision_record(*measure(plan, display), plan, known)
    show(result, console)
    write_rows(result, json_file, console)


bench.command(help=TRAIN)(train)
bench.command(help=MEMORY)(memory)


@bench.command()
def page(
    folder: Annotated[
        Path, typer.Argument(metavar="[RESULTS_DIR]", help="Folder of files that --json wrote.", show_default=True)
    ] = Path("benchmarks/results"),
) -> None:
    """Make README.md, precision.md and plots from the results in a folder."""
    need("report")
    from collage.bench.page import write_page

    typer.echo(f"page: {write_page(folder)}")

"""The command `collage plan`. It imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from collage.plan.arguments import Family, Heads, Hidden, Intermediate, KvHeads, Layers, Model, Seq, Vocab
from collage.train.extras import need

TRAINING, MEMORY, FILES = "Training", "Memory", "Files"

PLAN = (
    "Say what a model needs of memory on each device, for every strategy, without allocating it.\n\n"
    "Parameters, gradients and states are counted on the storages of each strategy; activations by a real forward and "
    "backward of transformers' model on tensors without memory. Shown with and without recomputing each block in the "
    "backward (activation checkpointing): what the forward keeps, the peak of a step, and the largest micro-batch that "
    "fits into --memory.\n\n"
    "For example: collage plan --model gpt-125m --strategy plus --shards 8 --seq 2048 --micro-batch 4"
)
"""In paragraphs of one line: Typer keeps the line breaks of a docstring."""


def plan(
    model: Model = None,
    hidden: Hidden = None,
    layers: Layers = None,
    heads: Heads = None,
    vocab: Vocab = None,
    kv_heads: KvHeads = None,
    intermediate: Intermediate = None,
    family: Family = None,
    seq: Seq = None,
    micro_batch: Annotated[
        int, typer.Option(help="Sequences of a forward pass on each device.", rich_help_panel=TRAINING)
    ] = 1,
    strategy: Annotated[
        str, typer.Option(help="The strategy that is marked; all are shown.", rich_help_panel=TRAINING)
    ] = "plus",
    shards: Annotated[
        int,
        typer.Option(
            help="Devices that share parameters, gradients and states (FSDP2). 1: one device, or each one of DDP.",
            rich_help_panel=TRAINING,
        ),
    ] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of the model: bfloat16 or float16.", rich_help_panel=TRAINING)
    ] = "bfloat16",
    grad_dtype: Annotated[
        str,
        typer.Option(help="Of the gradients: model (the weights' format) or float32.", rich_help_panel=TRAINING),
    ] = "model",
    reduce_dtype: Annotated[
        str | None,
        typer.Option(
            help="In which gradients are added over the shards. Unset: the gradients' own.", rich_help_panel=TRAINING
        ),
    ] = None,
    accumulate: Annotated[
        bool,
        typer.Option(
            "--accumulate", help="Several micro-batches a step: gradients stay meanwhile.", rich_help_panel=TRAINING
        ),
    ] = False,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Which of both is the result in --json and the last line: with every block recomputed.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    attention: Annotated[
        str,
        typer.Option(
            help="sdpa: fused, keeps no scores. eager: keeps them, quadratic in --seq.", rich_help_panel=TRAINING
        ),
    ] = "sdpa",
    products: Annotated[
        str,
        typer.Option(
            help="native: by instructions for the format. float32: operands are copied to float32, as on CPUs "
            "without such.",
            rich_help_panel=TRAINING,
        ),
    ] = "native",
    memory: Annotated[
        str, typer.Option(help="Of a device: 80GB (10^9 bytes each) or 80GiB (2^30).", rich_help_panel=MEMORY)
    ] = "80GB",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows, in bytes, to this file.", rich_help_panel=FILES)
    ] = None,
) -> None:
    """Say what a model needs of memory on each device, for every strategy, without allocating it."""
    need("train")
    from rich.console import Console

    from collage.plan import options
    from collage.plan.display import show
    from collage.plan.result import make
    from collage.train.runfiles import write_json

    options.check_strategy(strategy)
    room = options.parse_memory(memory)
    how = options.settings(
        shards=shards,
        micro_batch=micro_batch,
        dtype=dtype,
        grad_dtype=grad_dtype,
        reduce_dtype=reduce_dtype,
        accumulate=accumulate,
        attention=attention,
        products=products,
    )
    shape = {"hidden": hidden, "layers": layers, "heads": heads, "vocab": vocab, "kv_heads": kv_heads}
    subject = options.subject(model, {**shape, "intermediate": intermediate, "family": family}, seq)
    console = Console()
    with console.status(f"tracing {subject.label}"):
        result = make(subject, how, strategy, room, checkpointing, shlex.join(["collage", *sys.argv[1:]]))
    show(result, console)
    if json_file is not None:
        write_json(json_file, result)
        console.print(f"rows: {json_file}", markup=False, highlight=False, soft_wrap=True)

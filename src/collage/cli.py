"""The command `collage`. A command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from collage.train.config import (
    SOURCES,
    TASK_SETTINGS,
    RunFailed,
    TrainConfig,
    UserError,
    unknown_settings,
)
from collage.train.extras import need

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("the command collage needs typer; remedy: pip install 'torch-collage[train]'") from error

from collage.bench.command import bench
from collage.plan.command import PLAN, plan
from collage.report.command import report, show_report
from collage.report.finetune_command import finetune
from collage.train.options import config_options
from collage.train.running import COMPARED, FILES, make_runs, train_one
from collage.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from collage.metrics.moved import Difference

app = typer.Typer(
    help="Train wholly in low precision, and see what each update loses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command(help=PLAN)(plan)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"torch-collage {__version__}")
        raise typer.Exit


@app.callback()
def _collage(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Train wholly in low precision, and see what each update loses."""


@app.command()
@config_options(without=TASK_SETTINGS)
def train(
    settings: dict[str, Any],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the run; it gets run.json, metrics.jsonl and checkpoints.", rich_help_panel=FILES),
    ] = Path("runs/train"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in --out: every later step has the bits of a run that never stopped.",
            rich_help_panel=FILES,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help='Settings from a JSON file (the "config" of a run.json); options given beside it count more.',
            rich_help_panel=FILES,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the run's record (run.json) to this file as well.", rich_help_panel=FILES),
    ] = None,
    corpus: Annotated[Path | None, typer.Option(hidden=True, help="A prepared corpus, in place of --data.")] = None,
) -> None:
    """Train one model with one strategy.

    Without options: a small GPT with the strategy 'plus', on the Python standard library's sources.
    With --recipe NAME: a whole configuration, such as one of the paper's; options beside it count more.
    With --from CHECKPOINT: a run that continues another one, with this strategy.
    """
    need("train")
    from collage.train.continuation import continued
    from collage.train.data import with_data
    from collage.train.runfiles import resume_config

    if config is not None:
        settings = {**_read_settings(config), **settings}
    resolved = resume_config(out, settings) if resume else TrainConfig.from_json(continued(with_data(settings)))
    train_one(resolved, out, resume, corpus, json_file)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--config must be a readable JSON file, got {path}: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config must hold a JSON object of settings, got a {type(settings).__name__} in {path}")
    # Only what the file says: filled with defaults it would contradict the settings of a run to be resumed.
    unknown_settings(settings)
    return settings


@app.command()
@config_options(without=("strategy", "seed", "fsdp", "reduce_dtype", *TASK_SETTINGS))
def compare(
    settings: dict[str, Any],
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Strategies, separated by commas. [default: plain,light,plus,mixed]", rich_help_panel=COMPARED
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Seeds 0 to N-1, each with every strategy. [default: 3]", rich_help_panel=COMPARED),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Runs at the same time, sharing the cores. Unset: on a CPU one for each core with one thread, on an "
            "accelerator one.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the comparison; it gets a folder for each run, and the report.", rich_help_panel=FILES
        ),
    ] = Path("runs/compare"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the comparison in --out: finished runs are kept, the others continue. Strategies and "
            "seeds may be added.",
            rich_help_panel=FILES,
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result (compare.json) to this file as well.", rich_help_panel=FILES),
    ] = None,
) -> None:
    """Train one model with several strategies, from the same weights on the same batches, and report on them.

    Without options: a small GPT with plain, light, plus and mixed, on the Python standard library's sources.
    With --recipe NAME: a whole configuration, such as one of the paper's; options beside it count more.
    With --from CHECKPOINT: all strategies branch from one checkpoint, and a low learning rate tells them apart.
    """
    need("train")
    need("report")
    from collage.report.wording import learning_rates
    from collage.report.write import report_on_compare
    from collage.train.compare import make_plan, share_machine

    plan, jobs = share_machine(make_plan(settings, strategies, seeds, out, resume=resume), jobs)
    start = ""
    if plan.config.from_checkpoint is not None:
        start = f"all continue from {plan.config.from_checkpoint}, {learning_rates(plan.config.to_json())}"
    make_runs(plan, jobs, "compare", start, lambda known: show_report(report_on_compare(out, **known), json_file))


app.command()(finetune)


@app.command()
@config_options(only=("recipe", "text_column", "corpus_bytes", "tokenizer", "vocab_size", "model"))
def data(
    settings: dict[str, Any],
    source: Annotated[
        str | None,
        typer.Argument(
            help=f"{SOURCES}. Unset: the Python standard library's own sources.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the corpus.", rich_help_panel=FILES)] = Path("corpus"),
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that tokenize. Unset: one for each core.", rich_help_panel=FILES),
    ] = None,
    shard_bytes: Annotated[
        int,
        typer.Option(
            help="Text in a shard. What is cut off loses the shard that it was making, and no more.",
            rich_help_panel=FILES,
        ),
    ] = 2**27,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Build nothing: read the corpus in --out and compare its hashes.", rich_help_panel=FILES
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write what the corpus is to this file.", rich_help_panel=FILES)
    ] = None,
) -> None:
    """Tokenize a text once and keep it on disk; `collage train --data OUT` and `compare` then map it into memory.

    The corpus may be larger than memory. A build that was cut off, by Ctrl-C or anything else, goes on when the same
    command is given again, to the same bytes. --model says whose special tokens a trained vocabulary gets.
    """
    need("train")
    from collage.train.build import run_command
    from collage.train.runfiles import write_json

    if source is not None:
        settings["data"] = source
    info = run_command(settings, out, workers=workers, shard_bytes=shard_bytes, check_only=check)
    if json_file is not None:
        write_json(json_file, info)


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show every setting of this recipe. Unset: a line for each recipe.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the settings, by recipe, to this file as well.")
    ] = None,
) -> None:
    """The recipes that --recipe names: models and settings of the paper, and small siblings of them."""
    need("train")
    from rich.console import Console

    from collage.train.recipe_table import settings_table, table
    from collage.train.recipes import RECIPES, recipe
    from collage.train.runfiles import write_json

    configs = {each: recipe(each) for each in (RECIPES if name is None else [name])}
    Console().print(table(configs) if name is None else settings_table(configs[name]))
    if json_file is not None:
        write_json(json_file, {each: config.to_json() for each, config in configs.items()})


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/checkpoints/step-000300 of a run with --fsdp.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Make a sharded checkpoint one of whole files: model.safetensors, which transformers loads, and the optimizer.

    Needs memory for the whole checkpoint. To resume, or to continue with --from, no merging is needed.
    """
    need("train")
    from collage.train import checkpoints

    try:
        checkpoints.merge(checkpoint, out)
    except OSError as error:
        raise RunFailed(f"the merged checkpoint can't be written to {out}: {error}") from error
    typer.echo(f"merged {checkpoint} into {out}")


app.command()(report)


@app.command()
def audit(
    first: Annotated[Path, typer.Argument(metavar="CHECKPOINT_A", help="The earlier checkpoint: a file or a folder.")],
    second: Annotated[Path, typer.Argument(metavar="CHECKPOINT_B", help="The later one, of the same training.")],
    every_tensor: Annotated[bool, typer.Option("--all", help="List every tensor, not the kinds alone.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Tell which weights did not move between two checkpoints of any training.

    Reads safetensors and torch files, shards with their index, transformers' folders, torch.distributed.checkpoint
    folders and runs of `collage train`, one tensor at a time.
    """
    need("train")
    from rich.console import Console

    from collage.metrics.moved import difference
    from collage.train.runfiles import write_json
    from collage.train.weightfiles import open_weights

    found = difference(open_weights(first), open_weights(second))
    _show_difference(found, every_tensor, Console())
    if json_file is not None:
        write_json(json_file, found.to_json())


def _show_difference(found: Difference, every_tensor: bool, console: Console) -> None:
    from rich.table import Table

    from collage.metrics.moved import summed

    table = Table(box=None, header_style="bold")
    for name in ("layers", "tensors", "still", "elements", "unchanged", "moved by", "of their norm"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    for kind, tensors in found.kinds().items():
        for name, rows in [(kind, tensors), *((f"  {each.name}", [each]) for each in tensors if every_tensor)]:
            figures = summed(rows)
            share, relative = figures["unchanged_fraction"], figures["relative_displacement"]
            table.add_row(
                name,
                str(figures["tensors"]),
                str(figures["still"]),
                f"{figures['elements']:,}",
                "-" if share is None else f"{100 * share:.2f} %",
                f"{figures['displacement']:.3g}",
                "-" if relative is None else f"{relative:.2g}",
            )
    console.print(table)
    for line in found.verdict():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for names, where in (
        (found.only_first, "are in the first alone"),
        (found.only_second, "are in the second alone"),
        (found.reshaped, "have other shapes"),
    ):
        if names:
            console.print(f"{len(names)} tensors {where}, the first: {names[0]}", markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can mend is printed without a traceback.

    Exit codes: 0, 1 for a run that failed, 2 for wrong use, 130 for a run that was stopped.
    """
    try:
        app(arguments)
    except UserError as error:
        print(f"collage: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"collage: {error}", file=sys.stderr)
        sys.exit(1)

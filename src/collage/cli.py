"""The command `collage`. A command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from collage.train.config import RunFailed, TrainConfig, UserError
from collage.train.extras import need

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("the command collage needs typer; remedy: pip install 'torch-collage[train]'") from error

from collage.train.options import config_options

app = typer.Typer(
    help="Train wholly in low precision, and see what each update loses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FILES = "Files"


@app.callback()
def _collage() -> None:
    """Train wholly in low precision, and see what each update loses."""


@app.command()
@config_options()
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
    """
    need("train")
    from collage.train.loop import train as run_training
    from collage.train.runfiles import resume_config, write_json

    if config is not None:
        settings = {**_read_settings(config), **settings}
    resolved = resume_config(out, settings) if resume else TrainConfig.from_json(settings)
    run = run_training(resolved, out, resume=resume, corpus=corpus, command=_command())
    if run["status"] == "finished":
        typer.echo(_result(run))
    if json_file is not None:
        write_json(json_file, run)
    if run["status"] == "interrupted":
        raise typer.Exit(130)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--config must be a readable JSON file, got {path}: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config must hold a JSON object of settings, got a {type(settings).__name__} in {path}")
    return TrainConfig.from_json(settings).to_json()


def _result(run: dict[str, Any]) -> str:
    final = run["final"]
    figures = {"validation loss": final["validation_loss"], "EDQ ratio": final["edq_ratio"]}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
    return f"{run['name']}: finished {final['step']} steps in {run['wall_time_s']:.0f} s, {shown}"


def _command() -> str:
    return shlex.join(["collage", *sys.argv[1:]])


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

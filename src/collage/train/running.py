"""What the commands that train have in common: making one run, or the runs of a comparison."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from collage.train.config import RunFailed, TrainConfig

if TYPE_CHECKING:
    from collage.train.compare import Plan

FILES, COMPARED = "Files", "Comparison"
"""Panels of options."""


def command_line() -> str:
    """How this process was started."""
    return shlex.join(["collage", *sys.argv[1:]])


def train_one(config: TrainConfig, out: Path, resume: bool, corpus: Path | None, json_file: Path | None) -> None:
    """Make one run and say how it ended."""
    from collage.train.loop import train as run_training
    from collage.train.runfiles import write_json

    run = run_training(config, out, resume=resume, corpus=corpus, command=command_line())
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process speaks for all
    if run["status"] == "finished":
        typer.echo(_result(run))
    if json_file is not None:
        write_json(json_file, run)
    if run["status"] == "interrupted":
        raise typer.Exit(130)


def _result(run: dict[str, Any]) -> str:
    final = run["final"]
    figures = {"validation loss": final["validation_loss"], **final.get("metrics", {}), "EDQ ratio": final["edq_ratio"]}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
    return f"{run['name']}: finished {final['step']} steps in {run['wall_time_s']:.0f} s, {shown}"


def make_runs(plan: Plan, jobs: int, command: str, start: str, conclude: Callable[[dict[str, Any]], None]) -> None:
    """Make the runs of a plan that are left, `jobs` at the same time, and hand what is known of them to `conclude`."""
    from rich.console import Console

    from collage.train.compare import note_end, prepare, run_all
    from collage.train.compare_display import CompareDisplay

    count, left = len(plan.runs()), plan.left()
    display = CompareDisplay(left, Console())
    started = time.monotonic()
    known = prepare(plan, command_line())
    if left:
        before = f" ({count - len(left)} finished before)" if len(left) < count else ""
        display.say(f"{count} runs{before}, {min(jobs, len(left))} at the same time, in {plan.out}")
        if start:
            display.say(start)
    outcomes = run_all(left, plan.corpus, jobs, display) if left else []
    known |= {"jobs": jobs, "wall_time_s": known["wall_time_s"] + (time.monotonic() - started if left else 0.0)}

    failed = known["failed"] = [outcome.to_json() for outcome in outcomes if outcome.status == "failed"]
    stopped = any(outcome.status in ("interrupted", "not started") for outcome in outcomes)
    if stopped or len(plan.left()) == count:
        note_end(plan, "interrupted" if stopped else "incomplete", known)
    else:
        conclude(known)
    remedy = f"go on with: {shlex.join(['collage', command, '--out', str(plan.out), '--resume'])}"
    if stopped:
        display.say(f"stopped; {count - len(plan.left())} of {count} runs have finished; {remedy}")
        raise typer.Exit(130)
    if failed:
        names = ", ".join(each["name"] for each in failed)
        raise RunFailed(f"{len(failed)} of {count} runs failed: {names}; once the cause is mended, {remedy}")

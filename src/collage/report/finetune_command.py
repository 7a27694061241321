"""The command `collage finetune`, which ends in a report where it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from collage.report.command import show_report
from collage.train.config import TASK, TrainConfig, UserError, setting_names
from collage.train.extras import need
from collage.train.options import config_options
from collage.train.running import COMPARED, FILES, make_runs, train_one

# Text, model and vocabulary of fine-tuning are those of its task and its checkpoint.
_OF_TEXT = (
    "recipe",
    "model",
    "data",
    "tokenizer",
    "vocab_size",
    "text_column",
    "stream",
    "corpus_bytes",
    "eval_batches",
)
FINETUNED = [name for name in setting_names() if name not in (*_OF_TEXT, "from_checkpoint")]


@config_options(only=FINETUNED)
def finetune(
    settings: dict[str, Any],
    data: Annotated[
        str | None,
        typer.Option(
            help="The folder of the task as GLUE's download has it, or the one above it; for examples of your own a "
            "CSV, TSV or JSONL file, or a folder with train and validation (dev, valid) ones. Unset: from the hub.",
            rich_help_panel=TASK,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the train set, in place of --steps. [default: 3]", rich_help_panel=TASK),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            help="Compare these strategies, separated by commas. Unset: one run, with --strategy.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="With --strategies: seeds 0 to N-1, each with every one. [default: 3]", rich_help_panel=COMPARED
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="With --strategies: runs at the same time, sharing the cores.", rich_help_panel=COMPARED),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run, or of the comparison.", rich_help_panel=FILES)] = Path(
        "runs/finetune"
    ),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with what --out holds, a run or a comparison.", rich_help_panel=FILES),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write run.json, or the comparison's compare.json, to this file as well.",
            rich_help_panel=FILES,
        ),
    ] = None,
) -> None:
    """Fine-tune a pre-trained model on a task of GLUE, or on labelled examples of your own.

    --from names the model and --data the folder of GLUE's download (DIR/SST-2/train.tsv or DIR/train.tsv), or a CSV,
    TSV or JSONL file; without --data the task is loaded from the Hugging Face hub. With --strategies several are
    compared, each from the same weights on the same batches.
    """
    need("train")
    need("finetune")
    settings |= {} if data is None else {"data": data}
    from collage.train.compare import COMPARE_FILE

    if strategies is not None or (resume and (out / COMPARE_FILE).exists()):
        _compare_fine_tuned(settings, epochs, strategies, seeds, jobs, out, resume, json_file)
        return
    for name, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value is not None:
            raise UserError(f"{name} is for --strategies, got {value} without it; one run has --strategy and --seed")
    from collage.train import finetune as finetuning
    from collage.train.runfiles import resume_config

    if resume:
        _refuse_epochs(epochs)
        config = resume_config(out, settings)
    else:
        config = TrainConfig.from_json(finetuning.settings(settings, epochs))
    train_one(config, out, resume, None, json_file)


def _refuse_epochs(epochs: float | None) -> None:
    if epochs is not None:
        raise UserError("--epochs is for a new run, got it with --resume; leave it out")


def _compare_fine_tuned(
    settings: dict[str, Any],
    epochs: float | None,
    strategies: str | None,
    seeds: int | None,
    jobs: int | None,
    out: Path,
    resume: bool,
    json_file: Path | None,
) -> None:
    need("report")
    from collage.report.write import report_on_compare
    from collage.train import finetune as finetuning
    from collage.train.compare import COMPARE_FILE, make_plan, share_machine

    for name in ("strategy", "seed"):
        if name in settings:
            raise UserError(f"--{name} is for one run, got it with --strategies; leave one of them out")
    if resume and (out / COMPARE_FILE).exists():
        _refuse_epochs(epochs)
    else:
        settings = finetuning.settings(settings, epochs)
    plan, jobs = share_machine(make_plan(settings, strategies, seeds, out, resume=resume), jobs)
    start = f"all from {plan.config.pretrained}, on {plan.config.task}"
    make_runs(plan, jobs, "finetune", start, lambda known: show_report(report_on_compare(out, **known), json_file))

"""What is said of a row of figures: the columns of every table, each once, and a sentence in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collage.report.groups import BASELINE
from collage.train.display import conversion_text

MISSING = "–"
MEGABYTE = 1e6

Row = Mapping[str, Any]


def plain(value: float | None, form: str = ".4f") -> str:
    """`value` in the format `form`, or a dash for None."""
    return MISSING if value is None else format(value, form)


def with_spread(value: float | None, spread: float | None, form: str = ".4f") -> str:
    """`value ± spread`; the value alone where there is no spread."""
    return plain(value, form) if value is None or spread is None else f"{value:{form}} ± {spread:.4f}"


def signed(value: float, spread: float | None) -> str:
    """A difference with its sign, and its spread where there is one; 0 where it rounds to nothing."""
    return with_spread(value, spread, "+.4f") if abs(value) >= 0.00005 else with_spread(0.0, spread, ".0f")


def percent(share: float | None) -> str:
    """A share as a percentage: two significant digits below one, `0` for none at all."""
    if share is None:
        return MISSING
    if share == 0.0:
        return "0"
    hundredths = 100.0 * share
    return f"{hundredths:.1f}" if hundredths >= 0.95 else f"{hundredths:.2g}" if hundredths >= 0.01 else "< 0.01"


def megabytes(count: float | None) -> str:
    """A number of bytes in MB (10^6 bytes)."""
    if count is None:
        return MISSING
    return f"{count / MEGABYTE:,.0f}" if count >= 100 * MEGABYTE else f"{count / MEGABYTE:.2f}"


def _difference(row: Row) -> str:
    if row["strategy"] == BASELINE:
        return "0"
    difference = row.get(f"difference_from_{BASELINE}")
    return signed(difference["mean"], difference["spread"]) if difference else MISSING


@dataclass(frozen=True)
class Column:
    """One column: `show(row)` is the text of its cell."""

    heading: str
    explanation: str
    show: Callable[[Row], str]


COLUMNS = (
    Column(
        "strategy",
        "How the weights and the optimizer's two moving averages are stored. Everything else is the same.",
        lambda row: row["label"],
    ),
    Column(
        "validation loss",
        "Mean cross-entropy, in nats per token (per example where runs fine-tune), on what was not trained on; less "
        "is better. The mean over the seeds ± their sample standard deviation (with one seed there is no ±).",
        lambda row: with_spread(row["validation_loss"], row["validation_loss_spread"]),
    ),
    Column(
        f"minus {BASELINE}",
        f"Validation loss minus that of the strategy {BASELINE} at the same seed, so from the same initial "
        "weights and the same batches: the mean of these differences ± their standard deviation. A plus sign "
        f"means worse than {BASELINE}.",
        _difference,
    ),
    Column(
        "perplexity",
        "e to the power of the validation loss: as unsure as a choice among so many equally likely tokens.",
        lambda row: plain(row["perplexity"], ".3f"),
    ),
    Column(
        "EDQ ratio",
        "Effective descent: how far the stored weights moved in the intended direction, as a share of the "
        "intended way. 1 means that nothing is lost. The mean over the audited steps of the last tenth of the "
        "run, where the learning rate is small.",
        lambda row: plain(row["edq_ratio"]),
    ),
    Column(
        "lost updates %",
        "Share of the weights whose stored value did not change in a step although it should have. Over the "
        "same steps as the EDQ ratio.",
        lambda row: percent(row["lost_fraction"]),
    ),
    Column(
        "lost, hi %",
        "The same for hi, the weight as the model computes with it. The small updates that light, plus and mixed "
        "keep beside hi show here as lost and are not: they reach hi once they add up.",
        lambda row: percent(row["lost_fraction_hi"]),
    ),
    Column(
        "lost v %",
        "Share of the entries of v, the moving average of squared gradients, that stood still in a step "
        "although they should have changed; v sets the size of each step. Over the same steps.",
        lambda row: percent(row["v_lost_fraction"]),
    ),
    Column(
        "bytes/param",
        "Bytes kept for each parameter: weight, gradient, both moving averages, and what the strategy adds.",
        lambda row: plain(row["bytes_per_param"], ".4g"),
    ),
    Column(
        "state MB",
        "Measured size of the optimizer's state (both moving averages and what the strategy adds, without "
        "weights and gradients); 1 MB is a million bytes.",
        lambda row: megabytes(row["state_bytes"]),
    ),
    Column(
        "peak MB",
        "The largest memory that the run's process held on its device; on a CPU this includes Python and its "
        "libraries, which outweigh a small model.",
        lambda row: megabytes(row["peak_memory_bytes"]),
    ),
    Column(
        "tokens/s",
        "Tokens trained per second, the median over the steps. Runs that were made at the same time on the "
        "same cores slow each other down, so read it as an order of magnitude.",
        lambda row: plain(row["tokens_per_s"], ",.0f"),
    ),
)


def _converted(role: str) -> Callable[[Row], str]:
    return lambda row: conversion_text((row["conversion"] or {}).get(role))


def columns(summary: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of a summary's table: where runs fine-tune, the metrics of their task stand before the rest."""
    names = dict.fromkeys(name for row in summary["strategies"] for name in row["metrics"])
    return (COLUMNS[0], *map(_metric, names), *COLUMNS[1:])


def _metric(name: str) -> Column:
    def show(row: Row) -> str:
        found = row["metrics"].get(name)
        return MISSING if found is None else with_spread(found["mean"], found["spread"])

    explanation = (
        "The task's own measure, on its validation examples after the last step. The mean over the seeds ± their "
        "sample standard deviation."
    )
    return Column(name, explanation, show)


START_COLUMNS = (
    COLUMNS[0],
    Column("weights", "", _converted("param")),
    Column("m", "", _converted("exp_avg")),
    Column("v", "", _converted("exp_avg_sq")),
    Column("validation loss at the start", "", lambda row: plain(row["start_validation_loss"])),
)
"""What is shown of runs that continue from a checkpoint; `start_text` explains it."""


def cells(row: Row, columns: Sequence[Column] = COLUMNS) -> list[str]:
    """The texts of one row, in the order of the columns."""
    return [column.show(row) for column in columns]


# ---- where runs start ----------------------------------------------------------------------------------------------


def learning_rates(config: Mapping[str, Any]) -> str:
    """The learning rate under these settings, in words."""
    if config.get("schedule") == "constant":
        return f"learning rate {config['lr']:g}, constant"
    low = "" if config["min_lr"] is None else f" to {config['min_lr']:g}"
    return f"learning rate from {config['lr']:g} down{low}, {config['schedule']}"


def start_text(summary: Mapping[str, Any]) -> str | None:
    """What runs that continue from a checkpoint start from, None for others."""
    if not any(row["conversion"] for row in summary["strategies"]):
        return None
    source, config = summary["source"], summary["config"]
    what = "All runs continue from one checkpoint"
    if not source.get("checkpoint"):
        what = "The runs continue from different checkpoints"
    elif "step" in source:
        run = source.get("run") or "a run"
        what = (
            f"All runs continue from step {source['step']} of {run} (strategy {source.get('strategy')}, "
            f"{source.get('dtype')} weights, learning rate {source.get('lr')} at its peak), {source['checkpoint']}"
        )
    rates = f"; {learning_rates(config)}" if {"lr", "min_lr", "schedule"} <= set(config) else ""
    return (
        f"{what}{rates}. Weights, moments and step count were brought to float32 and from there into each strategy's "
        "storages: below, the largest error that this made, as a share of the tensor's largest magnitude."
    )


# ---- the sentence ---------------------------------------------------------------------------------------------------

EXACT = 0.999
"""EDQ ratios from here up to 2 - EXACT count as nothing lost."""


def _ended(row: Row) -> str | None:
    """The verdict of a row without a validation loss."""
    if not row["seeds"]:
        states = ", ".join(f"{run['name']} {run['status']} at step {run['step']}" for run in row["unfinished"])
        return f"no run finished ({states})."
    diverged = sum(loss is None for loss in row["validation_losses"])
    if diverged == row["seeds"] and row["train_loss"] is not None:
        return "no validation loss was recorded."
    if diverged:
        return f"the validation loss is not a finite number in {diverged} of {row['seeds']} runs."
    return None


def _updates(row: Row) -> str:
    lost, ratio = row["lost_fraction"], row["edq_ratio"]
    if lost is None or ratio is None:
        return "no update was measured in the last tenth of the run"
    share = "no updates" if lost == 0.0 else f"{percent(lost)} % of updates"
    verb = "were lost in the last tenth of the run"
    if EXACT <= ratio <= 2.0 - EXACT:
        return f"{share} {verb}"
    return f"{share} {verb}, and the weights went {percent(ratio)} % of the intended way"


def _second_moment(row: Row) -> str | None:
    lost = row["v_lost_fraction"]
    return f"v stood still in {percent(lost)} % of its entries" if lost is not None and lost >= 0.05 else None


def _loss(row: Row) -> str:
    if row["strategy"] == BASELINE:
        return "the others are measured against it"
    difference = row.get(f"difference_from_{BASELINE}")
    if difference is None:
        return f"validation loss {row['validation_loss']:.4f} (no {BASELINE} run to set it against)"
    mean, spread = difference["mean"], difference["spread"]
    if spread is None:
        return f"validation loss {_apart(mean)} {BASELINE} (one seed, so without a spread)"
    seeds = len(difference["seeds"])
    if f"{abs(mean):.4f}" == "0.0000":
        return f"validation loss that of {BASELINE} to four digits (± {spread:.4f} over {seeds} seeds)"
    if abs(mean) <= spread:
        return f"validation loss equal to {BASELINE} within the spread over {seeds} seeds ({signed(mean, spread)})"
    return f"validation loss {_apart(mean)} {BASELINE} (± {spread:.4f} over {seeds} seeds)"


def _apart(mean: float) -> str:
    return f"{abs(mean):.4f} {'above' if mean >= 0 else 'below'}"


def verdict(row: Row) -> str:
    """The sentence on one strategy, beginning with its label.

    "Equal within the spread" says that the mean difference is at most one standard deviation of the differences.
    """
    if ended := _ended(row):
        return f"{row['label']}: {ended}"
    parts = [part for part in (_updates(row), _second_moment(row), _loss(row)) if part]
    missing = len(row["unfinished"])
    tail = f" {missing} more run{'s' if missing > 1 else ''} did not finish." if missing else ""
    return f"{row['label']}: {'; '.join(parts)}.{tail}"

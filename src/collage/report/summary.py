"""The summary of a set of runs: a row per strategy, and what the runs share. It is what compare.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collage.report.groups import BASELINE, Group, baseline_of, differing, group_runs, start_mismatches
from collage.report.runs import Run, number, section
from collage.report.stats import largest, mean, paired_difference, perplexity, spread

FORMAT = 1

MEANS = ("edq_ratio", "lost_fraction", "lost_fraction_hi", "v_lost_fraction", "tokens_per_s", "train_loss")
"""Final figures of which a row has the mean over the seeds."""

SIZES = ("state_bytes", "peak_memory_bytes")
"""Figures in bytes of which a row has the largest over the seeds."""


def difference_from(group: Group, baseline: Group | None) -> dict[str, Any] | None:
    """The difference in validation loss from `baseline`, paired by seed, as a record; None if there is none."""
    difference = paired_difference(group, baseline) if baseline is not None else None
    if difference is None:
        return None
    return {
        "mean": difference.mean,
        "spread": difference.spread,
        "seeds": list(difference.seeds),
        "values": list(difference.values),
    }


def unfinished(run: Run) -> dict[str, Any]:
    """What is known of a run that did not finish."""
    return {"name": run.name, "status": run.status, "step": run.last_step, "steps": run.config.get("steps")}


def start(group: Group) -> dict[str, Any]:
    """Where runs that continue from a checkpoint start; null for others.

    The largest error of the conversion for each logical tensor, and the validation loss before the first step.
    """
    conversions = [section(run.record, "conversion") for run in group.shown]
    roles = dict.fromkeys(role for each in conversions for role in each)
    errors = {role: largest([number(each.get(role)) for each in conversions]) for role in roles}
    losses = [run.series("validation_loss").get(0) for run in group.shown]
    return {"conversion": errors or None, "start_validation_loss": mean(losses)}


def metrics(runs: Sequence[Run]) -> dict[str, Any]:
    """What the task of fine-tuned runs measures: mean, spread and values by name; empty for other runs."""
    finals = [section(section(run.record, "final"), "metrics") for run in runs]
    names = dict.fromkeys(name for final in finals for name in final)
    values = {name: [number(final.get(name)) for final in finals] for name in names}
    return {name: {"mean": mean(each), "spread": spread(each), "values": each} for name, each in values.items()}


def row(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """The figures of one group, over its finished runs; null where a figure is missing for one of them."""
    runs = group.finished
    losses = [run.final("validation_loss") for run in runs]
    figures: dict[str, Any] = {
        "label": group.label,
        "strategy": group.strategy,
        "seeds": len(runs),
        "validation_loss": mean(losses),
        "validation_loss_spread": spread(losses),
        "validation_losses": losses,
        "perplexity": perplexity(mean(losses)),
    }
    figures |= {key: mean([run.final(key) for run in runs]) for key in MEANS}
    sizes = {key: largest([run.figure(key) for run in group.shown]) for key in SIZES}
    figures |= {key: None if size is None else int(size) for key, size in sizes.items()}
    figures["bytes_per_param"] = largest([run.figure("bytes_per_param") for run in group.shown])
    figures["metrics"] = metrics(runs)
    figures |= start(group)
    figures[f"difference_from_{BASELINE}"] = difference_from(group, baseline_of(group, groups))
    figures["runs"] = [run.name for run in runs]
    figures["unfinished"] = [unfinished(run) for run in group.runs if not run.finished]
    return figures


def shared(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that all records have with one and the same value."""
    first, *others = records
    return {key: value for key, value in first.items() if all(each.get(key) == value for each in others)}


def data(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary as it is written to a file: without the rows of strategies of which no run has finished."""
    return {**summary, "strategies": [row for row in summary["strategies"] if row["seeds"]]}


def summarize(runs: Sequence[Run], **extra: Any) -> dict[str, Any]:
    """The summary of `runs`; `extra` (such as `command` and `jobs`) is put in as it is.

    Raises:
        UserError: two runs are the same strategy, settings and seed.
    """
    groups = group_runs(runs)
    records = [run.record for run in runs]
    same = shared(records)
    return {
        "format": FORMAT,
        "status": "finished" if all(run.finished for run in runs) else "incomplete",
        "command": same.get("command"),
        "seeds": sorted({run.seed for run in runs}),
        "config": shared([run.config for run in runs]),
        "differing": differing(runs),
        "source": shared([section(record, "source") for record in records]),
        "corpus": shared([section(record, "corpus") for record in records]),
        "model": shared([section(record, "model") for record in records]),
        "versions": shared([section(record, "versions") for record in records]),
        "device": same.get("device"),
        "commit": same.get("commit"),
        "warnings": start_mismatches(runs),
        "strategies": [row(group, groups) for group in groups],
        **extra,
    }

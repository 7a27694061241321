"""One plain-word sentence per strategy, computed from its row."""

from __future__ import annotations

from collage.report.columns import Row, percent
from collage.report.groups import BASELINE

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
        return f"validation loss {_signed(mean)} {BASELINE} (one seed, so without a spread)"
    seeds = len(difference["seeds"])
    if abs(mean) <= spread:
        return f"validation loss equal to {BASELINE} within the spread over {seeds} seeds ({mean:+.4f} ± {spread:.4f})"
    return f"validation loss {_signed(mean)} {BASELINE} (± {spread:.4f} over {seeds} seeds)"


def _signed(mean: float) -> str:
    return f"{mean:+.4f} over" if mean >= 0 else f"{abs(mean):.4f} under"


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

"""What the page draws of a run against the step, shortened where a run is long, as plain JSON types."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from collage.report.runs import Run, number, section
from collage.train.runfiles import AUDITED, HISTOGRAM

FIGURES = ("loss", "validation_loss", "grad_norm", "lr", "tokens_per_s", *AUDITED)
"""Figures of metrics.jsonl that the page can show against the step."""

POINTS = 800
"""Most points of a curve: twice the width of a phone's screen, as many as a plot has pixels on a desktop."""

MODULE_VALUES = 200_000
"""About how many values by module one page holds, over all runs, modules and figures: 1 to 2 MB of text."""

MODULE_POINTS = (16, 400)
"""Fewest and most points of a module's curve, whatever their number."""

HISTOGRAMS = 120
"""Most histograms of a run."""

Series = Mapping[int, float]


def digits(value: float, count: int = 6) -> float | None:
    """`value` to so many significant digits, None where it isn't finite."""
    return float(f"{value:.{count}g}") if math.isfinite(value) else None


def buckets(steps: Sequence[int], most: int) -> list[range]:
    """Ranges of indices into rising `steps`, at most `most`: each range holds the steps of one bucket.

    A bucket holds the steps from k·width + 1 to (k + 1)·width, width being the smallest power of two that makes few
    enough of them, so that runs of different lengths share their buckets' borders.
    """
    width = 1
    while len({(step - 1) // width for step in steps}) > most:
        width *= 2
    starts = [i for i in range(len(steps)) if i == 0 or (steps[i] - 1) // width != (steps[i - 1] - 1) // width]
    return [range(first, last) for first, last in zip(starts, [*starts[1:], len(steps)], strict=True)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def shortened(series: Series, most: int = POINTS) -> dict[str, list[Any]]:
    """A series as `x` and `y`; where it has more than `most` points, `y` is the mean of each bucket of steps.

    `x` is then the last step of each bucket, and `low` and `high` are its smallest and largest value, so that no
    spike is lost. Values that aren't finite are null.
    """
    steps, values = list(series), list(series.values())
    if len(steps) <= most:
        return {"x": steps, "y": [digits(value) for value in values]}
    ranges = buckets(steps, most)
    parts = [values[part.start : part.stop] for part in ranges]
    return {
        "x": [steps[part[-1]] for part in ranges],
        "y": [digits(_mean(part)) for part in parts],
        "low": [digits(min(part, key=_or_infinite)) for part in parts],
        "high": [digits(max(part, key=lambda value: -_or_infinite(-value))) for part in parts],
    }


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def figures(run: Run) -> dict[str, dict[str, list[Any]]]:
    """Every figure that the run's records have."""
    found = {key: run.series(key) for key in FIGURES}
    return {key: shortened(series) for key, series in found.items() if any(map(math.isfinite, series.values()))}


# ---- audit.jsonl ---------------------------------------------------------------------------------------------------


def module_names(runs: Iterable[Run]) -> list[str]:
    """The modules of all runs, in the order in which the files name them."""
    last = (section(run.audits[-1], "modules") for run in runs if run.audits)
    return list(dict.fromkeys(name for modules in last for name in modules))


def module_points(runs: Sequence[Run], modules: int) -> int:
    """How many points each curve of a module may have, so that a page with many of them stays small."""
    curves = max(1, sum(1 for run in runs if run.audits) * modules * len(AUDITED))
    fewest, most = MODULE_POINTS
    return max(fewest, min(most, MODULE_VALUES // curves))


def by_module(run: Run, most: int) -> dict[str, Any] | None:
    """The audited figures of each module: `x`, and for each figure a list of values by module; None without any."""
    audits = [record for record in run.audits if section(record, "modules")]
    if not audits:
        return None
    ranges = buckets([int(record["step"]) for record in audits], most)
    names = module_names([run])
    figures = {key: {name: _module_values(audits, ranges, name, key) for name in names} for key in AUDITED}
    return {"x": [int(audits[part[-1]]["step"]) for part in ranges], **figures}


def _module_values(audits: Sequence[Mapping[str, Any]], ranges: Sequence[range], name: str, key: str) -> list[Any]:
    found = (number(section(section(record, "modules"), name).get(key)) for record in audits)
    values = [math.nan if value is None else value for value in found]
    return [digits(_mean(values[part.start : part.stop]), 4) for part in ranges]


def histogram(run: Run) -> dict[str, Any] | None:
    """The sizes of the updates over time; None where the run has none.

    `x` is the step, `log2` the bins (b holds updates from 2^b to 2^(b+1) ulps), and `shares` for each step the share of
    the updates in each bin.
    """
    found = [(int(record["step"]), _elements(section(record, HISTOGRAM))) for record in run.audits]
    found = [(step, bins) for step, bins in found if sum(bins.values()) > 0]
    if not found:
        return None
    names = [name for _, bins in found for name in bins]
    log2 = range(min(names), max(names) + 1)
    ranges = buckets([step for step, _ in found], HISTOGRAMS)
    shares = [[bins.get(name, 0.0) / sum(bins.values()) for name in log2] for _, bins in found]
    means = [[_mean(column) for column in zip(*(shares[index] for index in part), strict=True)] for part in ranges]
    return {
        "x": [found[part[-1]][0] for part in ranges],
        "log2": list(log2),
        "shares": [[digits(share, 4) for share in each] for each in means],
    }


def _elements(sizes: Mapping[str, Any]) -> dict[int, float]:
    return dict(zip(sizes.get("log2", ()), sizes.get("elements", ()), strict=True))

"""Means, spreads, differences paired by seed, and curves over seeds: pure functions on numbers and runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from collage.report.groups import Group

SMOOTHING = 0.05
"""Width of the smoothing window, as a share of the curve's points."""


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if there are no values or one of them is missing: a diverged seed isn't averaged away."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present and len(present) == len(values) else None


def largest(values: Sequence[float | None]) -> float | None:
    """The largest value present, or None."""
    return max((value for value in values if value is not None), default=None)


def spread(values: Sequence[float | None]) -> float | None:
    """The sample standard deviation, or None for fewer than two values or if one is missing."""
    present = [value for value in values if value is not None]
    return statistics.stdev(present) if len(present) == len(values) > 1 else None


def perplexity(loss: float | None) -> float | None:
    """exp(loss), or None where the loss is missing or too large for it."""
    return math.exp(loss) if loss is not None and loss < 700.0 else None


@dataclass(frozen=True)
class Difference:
    """Differences of a group's figure from the baseline's, one for each seed that both finished with a figure."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds, None for one seed."""
        return spread(self.values)


def paired_difference(group: Group, baseline: Group, key: str = "validation_loss") -> Difference | None:
    """`group` minus `baseline` in the final figure `key`, seed by seed; None if no seed has both."""
    of_baseline = {run.seed: run.final(key) for run in baseline.finished}
    pairs = [(run.seed, run.final(key), of_baseline.get(run.seed)) for run in group.finished]
    kept = [(seed, own - other) for seed, own, other in pairs if own is not None and other is not None]
    if not kept:
        return None
    seeds, values = zip(*kept, strict=True)
    return Difference(seeds, values)


@dataclass(frozen=True)
class Curve:
    """A figure against the step: mean, smallest and largest over the seeds, and the smoothed mean."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int

    def smoothed(self) -> Curve:
        """The same curve with each of its lines smoothed."""
        lines = (smooth(line) for line in (self.mean, self.low, self.high))
        return Curve(self.steps, *lines, seeds=self.seeds)


def smooth(values: Sequence[float], share: float = SMOOTHING) -> tuple[float, ...]:
    """The centred moving mean over `share` of the points, cut off at both ends; nan values are left out."""
    half = int(len(values) * share / 2)
    totals, counts = [0.0], [0]
    for value in values:
        usable = math.isfinite(value)
        totals.append(totals[-1] + (value if usable else 0.0))
        counts.append(counts[-1] + usable)
    smoothed = []
    for index in range(len(values)):
        first, last = max(0, index - half), min(len(values), index + half + 1)
        count = counts[last] - counts[first]
        smoothed.append((totals[last] - totals[first]) / count if count else math.nan)
    return tuple(smoothed)


def curve(series: Sequence[Mapping[int, float]]) -> Curve | None:
    """The curve over the steps that every series has; None if there is no such step."""
    filled = [each for each in series if each]
    if not filled:
        return None
    steps = tuple(sorted(set.intersection(*(set(each) for each in filled))))
    if not steps:
        return None
    columns = [[each[step] for each in filled] for step in steps]
    means = tuple(math.fsum(column) / len(column) for column in columns)
    low, high = (tuple(pick(column) for column in columns) for pick in (_low, _high))
    return Curve(steps, means, low, high, len(filled))


def _low(column: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, column)) else min(column)


def _high(column: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, column)) else max(column)


def group_curve(group: Group, key: str) -> Curve | None:
    """The curve of `key` over the runs of `group`."""
    return curve([run.series(key) for run in group.shown])


def difference_curve(group: Group, baseline: Group, key: str) -> Curve | None:
    """The curve of `group` minus `baseline` in `key`, paired by seed and step."""
    of_baseline = {run.seed: run.series(key) for run in baseline.shown}
    pairs = [(run.series(key), of_baseline[run.seed]) for run in group.shown if run.seed in of_baseline]
    return curve([{step: own[step] - other[step] for step in own if step in other} for own, other in pairs])

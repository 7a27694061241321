"""The final validation losses as points: each strategy's difference from the baseline where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collage.report.groups import Group, baseline_of
from collage.report.stats import mean, paired_difference, spread
from collage.report.wording import signed, with_spread


@dataclass(frozen=True)
class Points:
    """The values of one group, a value for each of `seeds`; `text` is their mean and spread in figures."""

    group: Group
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    text: str

    @property
    def mean(self) -> float | None:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds, None for one seed."""
        return spread(self.values)


def _difference(group: Group, groups: Sequence[Group]) -> Points | None:
    baseline = baseline_of(group, groups)
    difference = paired_difference(group, baseline) if baseline else None
    if difference is None:
        return None
    return Points(group, difference.seeds, difference.values, signed(difference.mean, difference.spread))


def _losses(group: Group) -> Points | None:
    found = [(run.seed, loss) for run in group.finished if (loss := run.final("validation_loss")) is not None]
    if not found:
        return None
    seeds, values = zip(*found, strict=True)
    return Points(group, seeds, values, with_spread(mean(values), spread(values)))


def validation_points(groups: Sequence[Group]) -> tuple[list[Points], bool]:
    """The points of each group that has some, and whether they are differences from the baseline, paired by seed."""
    differences = [points for group in groups if (points := _difference(group, groups))]
    if differences:
        return differences, True
    return [points for group in groups if (points := _losses(group))], False

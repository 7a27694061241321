"""Means, spreads, paired differences and curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from collage.report.groups import Group, group_runs
from collage.report.runs import read_run
from collage.report.stats import (
    curve,
    difference_curve,
    group_curve,
    largest,
    mean,
    paired_difference,
    perplexity,
    smooth,
    spread,
)

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, 2.0, 6.0], 3.0), ([4.0], 4.0), ([], None), ([None], None), ([1.0, None], None)]
)
def test_a_mean_needs_every_seed(values: list[float | None], expected: float | None) -> None:
    assert mean(values) == expected


@pytest.mark.parametrize("values", [[], [1.0], [None, None], [1.0, 2.0, None]])
def test_a_spread_needs_two_seeds_and_all_of_them(values: list[float | None]) -> None:
    assert spread(values) is None


def test_the_spread_is_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 3.0]) == 1.0
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2.0))


def test_the_largest_is_taken_over_what_is_present() -> None:
    assert largest([None, 3.0, 2.0]) == 3.0
    assert largest([None]) is None


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (None, None), (1e4, None)])
def test_perplexity_is_the_exponential_where_that_is_a_number(loss: float | None, expected: float | None) -> None:
    assert perplexity(loss) == expected


@pytest.fixture
def groups(make_run: MakeRun) -> Callable[..., dict[str, Group]]:
    """`groups({(strategy, seed): changes of run.json})` by strategy."""

    def make(wanted: dict[tuple[str, int], dict[str, object]]) -> dict[str, Group]:
        runs = [read_run(make_run(*key, **changes)) for key, changes in wanted.items()]
        return {group.strategy: group for group in group_runs(runs)}

    return make


Groups = Callable[..., dict[str, Group]]


def with_loss(loss: float | None) -> dict[str, object]:
    return {"final": {"validation_loss": loss}}


def test_differences_are_paired_by_seed(groups: Groups) -> None:
    made = groups(
        {
            ("plus", 0): with_loss(2.0),
            ("plus", 1): with_loss(3.1),
            ("mixed", 0): with_loss(1.9),
            ("mixed", 1): with_loss(3.2),
        }
    )
    difference = paired_difference(made["plus"], made["mixed"])
    assert difference is not None
    assert difference.seeds == (0, 1)
    assert difference.values == pytest.approx((0.1, -0.1))
    assert difference.mean == pytest.approx(0.0)
    assert difference.spread == pytest.approx(statistics.stdev([0.1, -0.1]))


def test_a_seed_that_only_one_of_them_finished_makes_no_pair(groups: Groups) -> None:
    made = groups(
        {
            ("plus", 0): with_loss(2.0),
            ("plus", 1): with_loss(9.0),
            ("plus", 2): with_loss(None),
            ("mixed", 0): with_loss(1.5),
            ("mixed", 1): {"status": "interrupted"},
            ("mixed", 2): with_loss(1.0),
        }
    )
    difference = paired_difference(made["plus"], made["mixed"])
    assert difference is not None
    assert (difference.seeds, difference.values, difference.spread) == ((0,), (0.5,), None)


def test_without_a_common_seed_there_is_no_difference(groups: Groups) -> None:
    made = groups({("plus", 0): with_loss(2.0), ("mixed", 1): with_loss(2.0)})
    assert paired_difference(made["plus"], made["mixed"]) is None


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert smooth([2.0] * 100) == (2.0,) * 100


def test_smoothing_is_the_centred_mean_cut_off_at_the_ends() -> None:
    assert smooth([0.0, 3.0, 6.0, 9.0], share=0.5) == (1.5, 3.0, 6.0, 7.5)


def test_smoothing_leaves_out_nan_and_short_curves_stay_as_they_are() -> None:
    assert smooth([1.0, math.nan, 3.0], share=0.7) == (1.0, 2.0, 3.0)
    assert smooth([1.0, 5.0, 2.0]) == (1.0, 5.0, 2.0)


def test_a_curve_is_taken_over_the_steps_that_all_seeds_have() -> None:
    made = curve([{1: 1.0, 2: 2.0, 3: 9.0}, {1: 3.0, 2: 6.0}])
    assert made is not None
    assert (made.steps, made.mean, made.low, made.high) == ((1, 2), (2.0, 4.0), (1.0, 2.0), (3.0, 6.0))
    assert made.seeds == 2


def test_a_seed_without_the_figure_is_left_out_of_the_curve() -> None:
    made = curve([{}, {1: 3.0}])
    assert made is not None
    assert (made.mean, made.seeds) == ((3.0,), 1)


@pytest.mark.parametrize("series", [[], [{}], [{1: 1.0}, {2: 1.0}]])
def test_without_a_common_step_there_is_no_curve(series: list[dict[int, float]]) -> None:
    assert curve(series) is None


def test_nan_in_one_seed_is_nan_in_the_curve_at_that_step_alone() -> None:
    made = curve([{1: math.nan, 2: 2.0}, {1: 1.0, 2: 4.0}])
    assert made is not None
    assert all(math.isnan(line[0]) for line in (made.mean, made.low, made.high))
    assert (made.mean[1], made.low[1], made.high[1]) == (3.0, 2.0, 4.0)


def test_the_curve_of_the_difference_pairs_seeds_and_steps(groups: Groups) -> None:
    made = groups({(strategy, seed): {"steps": 20} for strategy in ("plain", "mixed") for seed in (0, 1)})
    difference = difference_curve(made["plain"], made["mixed"], "loss")
    assert difference is not None
    # Both see the same noise at the same seed and step; what is left is what conftest's table says.
    assert difference.mean == pytest.approx([0.03 * step / 20 for step in range(1, 21)])
    own = group_curve(made["plain"], "loss")
    assert own is not None
    assert len(own.steps) == 20

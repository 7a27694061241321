"""What the page draws of a run: shortened series, modules, histograms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collage.report.runs import Run, read_run
from collage.report.series import (
    AUDITED,
    FIGURES,
    MODULE_POINTS,
    MODULE_VALUES,
    POINTS,
    buckets,
    by_module,
    digits,
    figures,
    histogram,
    module_names,
    module_points,
    shortened,
)

MakeRun = Callable[..., Path]


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=400), st.integers(2, 50))
def test_buckets_hold_every_step_once_and_are_few_enough(steps: set[int], most: int) -> None:
    ordered = sorted(steps)
    made = buckets(ordered, most)
    assert [index for part in made for index in part] == list(range(len(ordered)))
    assert 1 <= len(made) <= most


def test_buckets_begin_at_the_same_steps_for_runs_of_different_lengths() -> None:
    short, long = buckets(range(1, 901), 500), buckets(range(1, 1001), 500)
    assert long[: len(short)] == short
    assert (short[1].start, len(short[1])) == (2, 2)


def test_a_short_series_stays_as_it_is() -> None:
    assert shortened({1: 2.0, 3: math.nan, 4: 1 / 3}) == {"x": [1, 3, 4], "y": [2.0, None, 0.333333]}


def test_a_long_series_keeps_means_and_extremes_and_its_last_step() -> None:
    series = {step: 5.0 if step == 7 else float(step % 2) for step in range(1, 11)}
    made = shortened(series, 3)
    assert made == {"x": [4, 8, 10], "y": [0.5, 1.5, 0.5], "low": [0.0, 0.0, 0.0], "high": [1.0, 5.0, 1.0]}


def test_a_bucket_leaves_out_what_is_not_finite_unless_nothing_else_is_in_it() -> None:
    series = {1: math.nan, 2: 3.0, 3: math.nan, 4: math.nan, 5: 1.0}
    made = shortened(series, 3)
    assert made == {"x": [2, 4, 5], "y": [3.0, None, 1.0], "low": [3.0, None, 1.0], "high": [3.0, None, 1.0]}


@pytest.mark.parametrize(
    ("value", "count", "expected"), [(math.pi, 3, 3.14), (0.0, 6, 0.0), (123456.0, 2, 120000.0), (math.inf, 6, None)]
)
def test_digits_are_significant_ones(value: float, count: int, expected: float | None) -> None:
    assert digits(value, count) == expected


def test_figures_are_those_that_a_run_has(make_run: MakeRun) -> None:
    found = figures(read_run(make_run("plain")))
    assert set(found) == {"loss", "edq_ratio", "lost_fraction"} < set(FIGURES)
    assert found["edq_ratio"]["x"] == [10, 20, 30, 40, 50, 60]


def test_a_figure_that_is_null_throughout_is_none(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, [{"step": 1, "edq_ratio": None, "loss": 2.0}])
    assert set(figures(run)) == {"loss"}


def test_a_long_run_has_few_points(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, [{"step": step, "loss": 1.0} for step in range(1, 5001)])
    assert len(figures(run)["loss"]["x"]) == 625 <= POINTS


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_modules_have_the_audited_figures_at_the_audited_steps(make_run: MakeRun) -> None:
    run = read_run(make_run("plain", audited=True))
    found = by_module(run, 100)
    assert found is not None
    assert found["x"] == [10, 20, 30, 40, 50, 60]
    assert set(found) == {"x", *AUDITED}
    assert list(found["lost_fraction"]) == module_names([run])
    assert found["lost_fraction"]["model.layers.0.norm"][-1] == pytest.approx(0.75 * 0.83)
    assert found["v_lost_fraction"]["head"] == [None] * 6


def test_a_module_that_comes_late_or_goes_has_gaps(tmp_path: Path) -> None:
    records = [
        {"step": 1, "modules": {"a": {"edq_ratio": 1.0}}},
        {"step": 2, "modules": {"a": {"edq_ratio": 0.5}, "b": {"edq_ratio": 0.25}}},
    ]
    found = by_module(Run(tmp_path, {}, (), records), 100)
    assert found is not None
    assert found["edq_ratio"] == {"a": [1.0, 0.5], "b": [None, 0.25]}


def test_runs_without_audits_have_no_modules(make_run: MakeRun) -> None:
    run = read_run(make_run("plus"))
    assert by_module(run, 100) is histogram(run) is None
    assert module_names([run]) == []


def test_many_modules_have_fewer_points_each_so_that_the_page_stays_small(make_run: MakeRun) -> None:
    runs = [read_run(make_run("plain", seed, audited=True)) for seed in range(15)]
    fewest, most = MODULE_POINTS
    assert module_points(runs, 4) == most
    assert module_points(runs, 100) * 15 * 100 * len(AUDITED) <= MODULE_VALUES
    assert module_points(runs, 10_000) == fewest
    found = by_module(runs[0], 3)
    assert found is not None
    assert len(found["x"]) == len(found["edq_ratio"]["head"]) <= 3
    assert found["x"][-1] == 60


# ---- histograms ------------------------------------------------------------------------------------------------------


def sizes(step: int, elements: list[float], first: int = -1) -> dict[str, Any]:
    bins = list(range(first, first + len(elements)))
    return {"step": step, "update_ulps": {"log2": bins, "elements": elements}}


def test_a_histogram_is_the_share_of_each_bin_at_each_step_that_has_one(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, (), [sizes(1, [3, 1]), {"step": 2}, sizes(3, [0, 8])])
    assert histogram(run) == {"x": [1, 3], "log2": [-1, 0], "shares": [[0.75, 0.25], [0.0, 1.0]]}


def test_bins_that_a_step_does_not_name_are_empty_and_so_are_those_between(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, (), [sizes(1, [1], -3), sizes(2, [1, 3], 0), sizes(3, []), sizes(4, [0.0])])
    assert histogram(run) == {
        "x": [1, 2],
        "log2": [-3, -2, -1, 0, 1],
        "shares": [[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.25, 0.75]],
    }


def test_many_histograms_are_averaged_by_stretches_of_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, (), [sizes(step, [step % 2, 1]) for step in range(1, 1001)])
    found = histogram(run)
    assert found is not None
    assert len(found["x"]) <= 120
    assert found["shares"][0] == [0.25, 0.75]


def test_everything_is_plain_json(make_run: MakeRun) -> None:
    run = read_run(make_run("plain", audited=True))
    for found in (figures(run), by_module(run, 10), histogram(run)):
        assert json.loads(json.dumps(found, allow_nan=False)) == found

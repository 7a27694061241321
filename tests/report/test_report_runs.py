"""Reading run files, of any age and in any state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from collage.report.runs import add_in_step_order, number, read_compare, read_run, read_runs, run_directories
from collage.train.config import UserError

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(("value", "expected"), [(3, 3.0), (0.5, 0.5), (0, 0.0), (-1.5, -1.5)])
def test_a_number_is_a_finite_float(value: float, expected: float) -> None:
    assert number(value) == expected


@pytest.mark.parametrize("value", [None, True, "3", math.nan, math.inf, [1.0], {}])
def test_anything_else_is_no_number(value: object) -> None:
    assert number(value) is None


def test_a_run_has_its_records_and_figures(make_run: MakeRun) -> None:
    run = read_run(make_run("plus", 2, steps=30))
    assert (run.name, run.strategy, run.seed, run.status, run.finished) == ("plus-seed2", "plus", 2, "finished", True)
    assert run.last_step == 30
    assert run.final("tokens_per_s") == 5002.0
    assert run.figure("bytes_per_param") == 12.0
    assert sorted(run.series("edq_ratio")) == [10, 20, 30]


def test_a_run_file_that_holds_next_to_nothing_is_read(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    run = read_run(tmp_path / "old")
    assert (run.name, run.strategy, run.seed, run.status) == ("old", "unknown", 0, "unknown")
    assert (run.metrics, run.audits) == ([], [])
    assert run.last_step == 0
    assert run.final("validation_loss") is None
    assert run.figure("peak_memory_bytes") is None


def test_null_sections_are_as_empty_ones(make_run: MakeRun) -> None:
    run = read_run(make_run("plus", final=None, corpus=None))
    assert run.final("validation_loss") is None


def test_a_null_figure_is_nan_in_a_series(make_run: MakeRun) -> None:
    path = make_run("plus", steps=5)
    (path / "metrics.jsonl").write_text('{"step": 1, "edq_ratio": null}\n{"step": 2, "edq_ratio": 1.0}\n{"step": 3}\n')
    series = read_run(path).series("edq_ratio")
    assert list(series) == [1, 2]
    assert math.isnan(series[1])
    assert series[2] == 1.0


def test_records_that_a_resumed_run_wrote_again_replace_the_first_ones() -> None:
    records = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 3, "loss": 3.0}, {"step": 2, "loss": 4.5}]
    kept: list[Mapping[str, Any]] = []
    add_in_step_order(kept, records)
    assert kept == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.5}]


@pytest.mark.parametrize("record", [{"loss": 1.0}, {"step": None}, 3])
def test_a_record_without_a_step_is_an_error(record: object) -> None:
    with pytest.raises(UserError, match="object with a step"):
        add_in_step_order([], [record])  # type: ignore[list-item]


def test_a_last_line_that_a_killed_run_left_unfinished_is_left_out(make_run: MakeRun) -> None:
    path = make_run("plus", steps=5)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert read_run(path).last_step == 5


@pytest.mark.parametrize(("text", "said"), [("{", "can't be read as JSON"), ("[]", "got a list")])
def test_an_unreadable_run_file_is_an_error_that_names_it(make_run: MakeRun, text: str, said: str) -> None:
    path = make_run("plus")
    (path / "run.json").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_run(path)
    assert str(path / "run.json") in str(error.value)


def test_a_compare_directory_stands_for_its_runs(make_run: MakeRun, tmp_path: Path) -> None:
    made = [make_run(strategy, seed) for strategy in ("mixed", "plus") for seed in (0, 1)]
    assert run_directories(tmp_path / "runs") == made


def test_a_run_given_twice_is_read_once(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("plus")
    assert len(read_runs([path, tmp_path / "runs", path])) == 1


@pytest.mark.parametrize(("name", "said"), [("absent", "is not a directory"), ("empty", "no run files in")])
def test_a_directory_without_runs_is_an_error(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        read_runs([tmp_path / name])


def test_a_directory_may_have_no_compare_file(tmp_path: Path) -> None:
    assert read_compare(tmp_path) is None
    (tmp_path / "compare.json").write_text(json.dumps({"command": "x"}))
    assert read_compare(tmp_path) == {"command": "x"}

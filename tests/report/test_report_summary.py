"""The rows and the shared entries of compare.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collage.report.runs import read_runs
from collage.report.summary import data, summarize

MakeRun = Callable[..., Path]


def rows(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["strategy"]: row for row in summary["strategies"]}


@pytest.fixture
def summary(make_run: MakeRun, tmp_path: Path) -> dict[str, Any]:
    for strategy in ("plain", "plus", "mixed"):
        for seed in (0, 1, 2):
            make_run(strategy, seed)
    return summarize(read_runs([tmp_path / "runs"]), jobs=2)


def test_a_row_has_the_means_over_its_seeds(summary: dict[str, Any]) -> None:
    row = rows(summary)["plain"]
    losses = [2.1 + 0.01 * seed + 0.03 * (1 + 0.1 * seed) for seed in (0, 1, 2)]
    assert row["seeds"] == 3
    assert row["validation_losses"] == pytest.approx(losses)
    assert row["validation_loss"] == pytest.approx(statistics.fmean(losses))
    assert row["validation_loss_spread"] == pytest.approx(statistics.stdev(losses))
    assert row["train_loss"] == pytest.approx(statistics.fmean(losses) - 0.1)
    assert row["perplexity"] == pytest.approx(math.exp(statistics.fmean(losses)))
    assert (row["edq_ratio"], row["lost_fraction"]) == (pytest.approx(0.17), pytest.approx(0.83))
    assert (row["lost_fraction_hi"], row["v_lost_fraction"]) == (pytest.approx(0.83), pytest.approx(0.4))
    assert row["tokens_per_s"] == 5001.0
    assert row["runs"] == ["plain-seed0", "plain-seed1", "plain-seed2"]


def test_sizes_are_the_largest_over_the_seeds_in_whole_bytes(summary: dict[str, Any]) -> None:
    row = rows(summary)["plus"]
    assert (row["bytes_per_param"], row["state_bytes"], row["peak_memory_bytes"]) == (12.0, 6_856_000, 500_000_002)
    assert isinstance(row["state_bytes"], int)


def test_the_difference_from_the_baseline_is_paired_by_seed(summary: dict[str, Any]) -> None:
    difference = rows(summary)["plain"]["difference_from_mixed"]
    assert difference["seeds"] == [0, 1, 2]
    assert difference["values"] == pytest.approx([0.03, 0.033, 0.036])
    assert difference["mean"] == pytest.approx(0.033)
    assert difference["spread"] == pytest.approx(0.003)
    assert rows(summary)["mixed"]["difference_from_mixed"] is None


def test_what_all_runs_share_stands_once(summary: dict[str, Any]) -> None:
    assert summary["format"] == 1
    assert summary["status"] == "finished"
    assert summary["seeds"] == [0, 1, 2]
    assert summary["config"]["steps"] == 60
    assert not {"strategy", "seed"} & set(summary["config"])
    assert summary["corpus"]["name"] == "stdlib"
    assert summary["command"] == "collage compare --seeds 3"
    assert summary["device"] == "cpu: a processor"
    assert summary["jobs"] == 2
    json.dumps(summary, allow_nan=False)


def test_what_differs_between_runs_is_not_claimed_of_all(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", 0)
    make_run("plus", 1, device="cuda: another", versions={"python": "3.11.2", "torch": "2.11.0"})
    summary = summarize(read_runs([tmp_path / "runs"]))
    assert summary["device"] is None
    assert summary["versions"] == {"python": "3.11.2"}


def test_one_seed_has_no_spread(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus")
    make_run("mixed")
    row = rows(summarize(read_runs([tmp_path / "runs"])))["plus"]
    assert row["validation_loss_spread"] is None
    assert row["difference_from_mixed"]["spread"] is None


def test_without_a_baseline_there_is_no_difference(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus")
    assert rows(summarize(read_runs([tmp_path / "runs"])))["plus"]["difference_from_mixed"] is None


def test_a_seed_without_a_figure_leaves_no_mean_over_the_others(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", 0)
    make_run("plus", 1, final={"step": 60, "train_loss": 2.0, "validation_loss": None, "edq_ratio": None})
    row = rows(summarize(read_runs([tmp_path / "runs"])))["plus"]
    assert row["validation_losses"] == [pytest.approx(2.101), None]
    for key in ("validation_loss", "validation_loss_spread", "perplexity", "edq_ratio", "lost_fraction"):
        assert row[key] is None


def test_nan_in_a_run_file_is_no_figure(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", final={"validation_loss": math.nan, "edq_ratio": math.inf})
    row = rows(summarize(read_runs([tmp_path / "runs"])))["plus"]
    assert row["validation_loss"] is row["edq_ratio"] is None


def test_an_unfinished_run_is_named_and_its_figures_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", 0)
    make_run("plus", 1, status="interrupted", last=20, final=None)
    summary = summarize(read_runs([tmp_path / "runs"]))
    row = rows(summary)["plus"]
    assert summary["status"] == "incomplete"
    assert row["seeds"] == 1
    assert row["validation_loss"] == pytest.approx(2.101)
    assert row["unfinished"] == [{"name": "plus-seed1", "status": "interrupted", "step": 20, "steps": 60}]


def test_a_strategy_of_which_no_run_finished_has_no_row_in_the_file(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", status="failed", last=3, final=None)
    make_run("mixed")
    summary = summarize(read_runs([tmp_path / "runs"]))
    assert list(rows(summary)) == ["plus", "mixed"]
    assert list(rows(data(summary))) == ["mixed"]


def test_old_files_make_a_row_of_what_they_have(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text('{"strategy": "plus", "status": "finished", "final": {"edq_ratio": 1}}')
    (row,) = summarize(read_runs([tmp_path / "old"]))["strategies"]
    assert row["edq_ratio"] == 1.0
    assert row["validation_loss"] is row["state_bytes"] is row["bytes_per_param"] is None


def test_unequal_starts_are_warned_of(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", init_sha256="other")
    make_run("mixed")
    (warning,) = summarize(read_runs([tmp_path / "runs"]))["warnings"]
    assert "different initial weights" in warning


def test_a_row_of_runs_that_continue_has_the_conversions_largest_error_and_the_loss_at_the_start(
    make_branch: MakeRun, tmp_path: Path
) -> None:
    make_branch("plain", 0, param=0.001, loss=2.0)
    make_branch("plain", 1, param=0.004, loss=3.0)
    make_branch("mixed")
    make_branch("light", param=None)
    summary = summarize(read_runs([tmp_path / "runs"]))
    row = rows(summary)["plain"]
    assert row["conversion"] == {"param": 0.004, "exp_avg": 0.0, "exp_avg_sq": 0.00123}
    assert row["start_validation_loss"] == 2.5
    assert rows(summary)["mixed"]["conversion"]["param"] == 0.0
    assert rows(summary)["light"]["conversion"]["param"] is None
    assert (summary["source"]["step"], summary["source"]["run"]) == (300, "fp32-seed0")
    assert summary["warnings"] == []


def test_runs_with_fresh_weights_have_no_source_and_no_conversion(summary: dict[str, Any]) -> None:
    assert summary["source"] == {}
    assert {(row["conversion"], row["start_validation_loss"]) for row in summary["strategies"]} == {(None, None)}

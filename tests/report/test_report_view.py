"""The data of the page, and the table of what differs between its runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collage.report.differences import Difference, differences
from collage.report.groups import group_runs
from collage.report.runs import read_runs
from collage.report.view import view

MakeRun = Callable[..., Path]


def shown(folder: Path) -> dict[str, Any]:
    return view(group_runs(read_runs([folder])))


def differing(folder: Path) -> dict[str, tuple[str, ...]]:
    found = differences(group_runs(read_runs([folder])))
    return {each.name: each.cells for each in found}


def test_groups_have_a_look_for_each_theme_and_their_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    for strategy in ("plain", "mixed"):
        make_run(strategy)
    plain, mixed = shown(tmp_path / "runs")["groups"]
    assert (plain["label"], mixed["label"]) == ("plain", "mixed")
    assert plain["colours"] == ["#D55E00", "#F0772B"]
    assert (mixed["dash"], mixed["width"]) == ("solid", 3.6)
    assert plain["dash"] == "4.9px,1.7px"  # in widths of a line of 1.4 pixels
    assert sum(mixed["bytes"].values()) == 16


def test_every_run_is_there_and_those_whose_figures_count_are_marked(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", 0)
    make_run("plus", 1, status="failed", last=20, final=None)
    make_run("plain", 0, status="running", last=20, final=None)
    runs = {run["name"]: run for run in shown(tmp_path / "runs")["runs"]}
    assert {name: run["counted"] for name, run in runs.items()} == {
        "plain-seed0": True,  # none of its group has finished yet
        "plus-seed0": True,
        "plus-seed1": False,
    }
    assert (runs["plus-seed1"]["status"], runs["plus-seed1"]["step"], runs["plus-seed1"]["steps"]) == ("failed", 20, 60)
    assert runs["plus-seed0"]["tokens_per_step"] == 2048


def test_losses_are_set_against_the_baseline_of_the_same_seed(make_run: MakeRun, tmp_path: Path) -> None:
    for strategy, seed in (("plain", 0), ("plain", 1), ("mixed", 0)):
        make_run(strategy, seed)
    runs = {run["name"]: run["series"] for run in shown(tmp_path / "runs")["runs"]}
    difference = runs["plain-seed0"]["loss_difference"]
    assert difference["x"][-1] == 60
    assert difference["y"][-1] == pytest.approx(0.03, abs=1e-6)
    assert "loss_difference" not in runs["plain-seed1"]
    assert "loss_difference" not in runs["mixed-seed0"]


def test_the_page_of_nothing_and_of_next_to_nothing_is_plain_json(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    empty, old = view([]), shown(tmp_path)
    assert (empty["runs"], empty["modules"]) == ([], [])
    assert (old["runs"][0]["series"], old["runs"][0]["tokens_per_step"], old["groups"][0]["bytes"]) == ({}, None, {})
    for data in (empty, old):
        assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_validation_losses_are_points_by_seed(make_run: MakeRun, tmp_path: Path) -> None:
    for strategy in ("plain", "mixed"):
        for seed in (0, 1):
            make_run(strategy, seed)
    validation = shown(tmp_path / "runs")["validation"]
    assert validation["differences"] is True
    (row,) = validation["rows"]
    assert (row["group"], list(row["seeds"])) == (0, [0, 1])
    assert row["mean"] == pytest.approx(0.0315)
    assert row["text"] == "+0.0315 ± 0.0021"


# ---- differences -----------------------------------------------------------------------------------------------------


def test_settings_versions_machines_and_storages_that_differ_are_listed_by_group(
    make_run: MakeRun, tmp_path: Path
) -> None:
    make_run(
        "plus", 0, storage={"exp_avg_sq": "Expansion(n=2, format=None, rounding='stochastic')"}, config={"lr": 1.0}
    )
    make_run("mixed", 0, storage={"exp_avg_sq": "Rounded(format=Format(name='fp32', max=3.4e+38))"}, threads=2)
    found = differing(tmp_path / "runs")
    assert found["storage exp_avg_sq"] == ("Expansion(n=2, rounding='stochastic')", "Rounded(format=fp32)")
    assert found["lr"] == ("1.0", "0.001")
    assert found["threads"] == ("1", "2")
    assert set(found) == {"storage exp_avg_sq", "lr", "threads"}


def test_runs_alike_but_for_seed_and_strategy_do_not_differ(make_run: MakeRun, tmp_path: Path) -> None:
    for strategy in ("plus", "mixed"):
        for seed in (0, 1):
            make_run(strategy, seed)
    assert differing(tmp_path / "runs") == {}


def test_a_group_that_does_not_agree_with_itself_lists_its_values(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", 0, commit="ab" * 20)
    make_run("plus", 1, commit="cd" * 20 + "-dirty")
    assert differences(group_runs(read_runs([tmp_path / "runs"]))) == [
        Difference("commit", ("abababababab, cdcdcdcdcdcd-dirty",))
    ]


def test_what_an_old_file_does_not_say_is_a_dash(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus")
    (tmp_path / "runs" / "old").mkdir()
    (tmp_path / "runs" / "old" / "run.json").write_text('{"strategy": "mixed"}')
    cells = differing(tmp_path / "runs")["batch_size"]
    assert sorted(cells) == ["16", "–"]

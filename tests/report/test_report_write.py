"""The files of a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from collage.report.plots import PLOTS
from collage.report.write import report_on, report_on_compare
from collage.train.config import UserError

MakeRun = Callable[..., Path]
PLOT_FILES = sorted(f"{plot.stem}.png" for plot in PLOTS)


@pytest.fixture
def compared(make_run: MakeRun, tmp_path: Path) -> Path:
    for strategy in ("plus", "mixed"):
        make_run(strategy)
    return tmp_path / "runs"


def test_a_report_is_a_page_a_text_and_plots_in_the_first_directory(compared: Path) -> None:
    made = report_on([compared / "plus-seed0", compared / "mixed-seed0"])
    folder = compared / "plus-seed0"
    assert (made.html, made.markdown) == (folder / "report.html", folder / "report.md")
    assert sorted(file.name for file in (folder / "plots").iterdir()) == PLOT_FILES
    assert [row["strategy"] for row in made.summary["strategies"]] == ["plus", "mixed"]
    assert not (compared / "mixed-seed0" / "report.html").exists()


def test_a_report_goes_where_it_is_told(compared: Path, tmp_path: Path) -> None:
    report_on([compared], tmp_path / "elsewhere" / "deep")
    assert (tmp_path / "elsewhere" / "deep" / "report.html").exists()
    assert not (compared / "report.html").exists()


def test_reporting_changes_no_file_of_a_run_or_a_comparison(compared: Path) -> None:
    report_on_compare(compared, command="collage compare", failed=[])
    before = {path: path.read_bytes() for path in compared.rglob("*.json*")}
    report_on([compared])
    assert {path: path.read_bytes() for path in compared.rglob("*.json*")} == before


def test_the_same_files_make_the_same_report(compared: Path) -> None:
    first = report_on([compared]).html.read_bytes()
    assert report_on([compared]).html.read_bytes() == first


def test_a_comparison_has_its_figures_in_compare_json(compared: Path) -> None:
    made = report_on_compare(compared, command="the command", plan={"seeds": 1}, jobs=2, wall_time_s=3.0, failed=[])
    stored = json.loads((compared / "compare.json").read_text())
    assert stored["status"] == "finished"
    assert (stored["command"], stored["plan"], stored["jobs"], stored["wall_time_s"]) == (
        *("the command", {"seeds": 1}, 2, 3.0),
    )
    assert [row["strategy"] for row in stored["strategies"]] == ["plus", "mixed"]
    assert "the command" in made.html.read_text()


def test_a_later_report_knows_what_only_the_comparison_knew(compared: Path) -> None:
    report_on_compare(compared, command="the command", jobs=2, wall_time_s=3.0, failed=[{"name": "light-seed0"}])
    made = report_on([compared])
    assert (made.summary["command"], made.summary["jobs"], made.summary["wall_time_s"]) == ("the command", 2, 3.0)
    assert "light-seed0 failed before its first step." in made.html.read_text()


def test_commands_of_several_directories_stand_once_each(compared: Path, make_run: MakeRun, tmp_path: Path) -> None:
    report_on_compare(compared, command="the comparison", failed=[])
    own = make_run("plain", folder=tmp_path / "own", command="the run")
    assert report_on([compared, own]).summary["command"] == "the comparison\nthe run"


def test_a_failed_run_is_named_and_makes_no_row(compared: Path, make_run: MakeRun) -> None:
    make_run("light", status="failed", final=None, last=4)
    report_on_compare(compared, failed=[{"name": "light-seed0", "status": "failed", "output": ["why"]}])
    stored = json.loads((compared / "compare.json").read_text())
    assert stored["status"] == "incomplete"
    assert [each["name"] for each in stored["failed"]] == ["light-seed0"]
    assert [row["strategy"] for row in stored["strategies"]] == ["plus", "mixed"]


def test_runs_that_did_not_start_alike_make_the_comparison_incomplete(compared: Path, make_run: MakeRun) -> None:
    make_run("light", init_sha256="other")
    made = report_on_compare(compared, failed=[])
    assert made.summary["warnings"]
    assert json.loads((compared / "compare.json").read_text())["status"] == "incomplete"


def test_without_run_files_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run files"):
        report_on([tmp_path])
    assert list(tmp_path.iterdir()) == []

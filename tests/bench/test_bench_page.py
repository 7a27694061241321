from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_small import Bench

from collage import cli
from collage.bench.page import write_page
from collage.bench.plots import draw, drawn_rows
from collage.report.style import LIGHT
from collage.train.config import UserError

PNG = b"\x89PNG"


@pytest.fixture
def results(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the result of a small run."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    result = bench("--strategies", "plus,light", "--backends", "eager", "--peers", "torch,absent,broken")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(result))
    return folder


def test_the_page_has_a_row_for_each_timed_row_of_the_json_and_its_command(results: Path) -> None:
    page = write_page(results)
    text = page.read_text(encoding="utf-8")
    result = json.loads((results / "small.json").read_text())
    assert page == results / "README.md"
    assert f"OMP_WAIT_POLICY=passive {result['command']}" in text
    for row in result["rows"]:
        cell = f"**{row['contender']}**" if row["kind"] == "collage" else row["contender"]
        assert (f"| {cell} |" in text) == (row["rounds"] > 0)
    for said in (result["device"], result["created"], f"torch {result['versions']['torch']}", "(small.json)"):
        assert said in text
    assert "- skipped: absent one: not installed; remedy: pip install no-such-package" in text
    assert "- failed: broken at once: RuntimeError: no such instruction" in text


def test_the_page_shows_a_plot_of_each_set_of_shapes(results: Path) -> None:
    text = write_page(results).read_text(encoding="utf-8")
    assert "](plots/small-tiny.png)" in text
    assert (results / "plots" / "small-tiny.png").read_bytes().startswith(PNG)


def test_the_page_is_made_from_the_files_alone(results: Path) -> None:
    first = write_page(results).read_bytes(), (results / "plots" / "small-tiny.png").read_bytes()
    assert (write_page(results).read_bytes(), (results / "plots" / "small-tiny.png").read_bytes()) == first


def test_the_command_writes_the_page(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "page", str(results)])
    assert stopped.value.code == 0
    assert f"page: {results / 'README.md'}" in capsys.readouterr().out


def test_a_plot_has_the_fastest_first_and_leaves_out_what_has_no_ratio(results: Path) -> None:
    rows = json.loads((results / "small.json").read_text())["rows"]
    drawn = drawn_rows(rows)
    assert [row["ratio"] for row in drawn] == sorted(row["ratio"] for row in rows if row["rounds"] and row in drawn)
    assert {row["kind"] for row in drawn} == {"reference", "collage", "torch"}
    without = [{**row, "null_share": None} for row in rows]
    assert (draw(without, LIGHT) or b"").startswith(PNG)
    assert draw([{**row, "ratio": None} for row in rows], LIGHT) is None


def test_a_folder_without_results_makes_a_page_that_says_so(tmp_path: Path) -> None:
    assert "No results yet." in write_page(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"kind": "compare", "rows": []}'])
def test_a_file_that_is_no_result_is_refused_by_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match=r"other\.json must be"):
        write_page(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder of results must exist"):
        write_page(tmp_path / "nothing")

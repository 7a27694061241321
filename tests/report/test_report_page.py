"""report.html, report.md and the table on a terminal."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from collage.report.differences import differences
from collage.report.groups import group_runs
from collage.report.page import Picture, Texts, context, html, markdown, show, texts, warnings
from collage.report.runs import read_runs
from collage.report.summary import summarize
from collage.report.view import view
from collage.report.wording import COLUMNS, verdict

MakeRun = Callable[..., Path]
EVIL = '<script>alert("x")</script> & | `*_'
PICTURE = Picture("loss", "Training loss", "What it shows.", b"png")
VOID = {"meta", "img", "source", "link", "br", "hr", "input"}


class Tags(HTMLParser):
    """All start tags with their attributes; `open` is empty once all are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def summary(make_run: MakeRun, tmp_path: Path) -> dict[str, Any]:
    for strategy in ("plain", "plus", "mixed"):
        for seed in (0, 1):
            make_run(strategy, seed)
    return summarize(read_runs([tmp_path / "runs"]), jobs=2, wall_time_s=125.0)


def page_of(summary: Mapping[str, Any], data: Mapping[str, Any] | None = None, **options: Any) -> str:
    return html(texts(context(summary)), view([]) if data is None else data, **options)


def without_library(page: str) -> str:
    """The page but for plotly.js, which is packed."""
    kept, found = re.subn(r'(<script type="text/plain" id="library">)[A-Za-z0-9+/=]+(</script>)', r"\1\2", page)
    assert found == 1
    return kept


def printed(summary: dict[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_page_needs_no_other_file(summary: dict[str, Any]) -> None:
    page = without_library(page_of(summary))
    tags = Tags(page)
    assert tags.open == []
    assert "iframe" not in {tag for tag, _ in tags.found}
    for tag, attributes in tags.found:
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page


def test_the_page_holds_plotly_packed() -> None:
    page = html(Texts("title", "", ""), view([]))
    (packed,) = re.findall(r'<script type="text/plain" id="library">([^<]+)</script>', page)
    assert "plotly.js v" in gzip.decompress(base64.b64decode(packed)).decode()[:100]
    assert len(page) < 2_500_000


def test_the_page_fits_phones_and_dark_screens(summary: dict[str, Any]) -> None:
    page = page_of(summary)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in Tags(page).found
    assert "light-dark(" in page
    assert "@media (max-width: 760px)" in page


def test_the_page_holds_all_there_is_to_say(summary: dict[str, Any]) -> None:
    tags = Tags(without_library(page_of(summary)))
    text = " ".join(" ".join(tags.text).split())
    for column in COLUMNS:
        assert column.heading in text
        assert column.explanation in text
    for row in summary["strategies"]:
        assert verdict(row).removeprefix(row["label"] + ": ") in text
    for said in (
        "collage compare --seeds 3",
        "torch 2.13.0",
        "name stdlib",
        "2 min 5 s",
        "batch_size 16",
    ):
        assert said in text


def test_the_data_of_the_page_come_back_as_they_were_whatever_they_hold() -> None:
    data = {"label": EVIL, "close": "</script><!--", "x": [1, None, 0.5]}
    tags = Tags(without_library(html(Texts("title", "", ""), data, live=2000)))
    (text,) = (text for text in tags.text if text.startswith('{"live"'))
    assert json.loads(text) == {"live": 2000, **data}


def test_what_differs_between_the_runs_stands_in_page_and_markdown(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", storage={"exp_avg_sq": "Expansion(n=2, format=None)"})
    make_run("mixed", storage={"exp_avg_sq": "Rounded()"}, config={"note": EVIL})
    runs = read_runs([tmp_path / "runs"])
    entries = context(summarize(runs), (), differences(group_runs(runs)))
    text = " ".join(" ".join(Tags(without_library(html(texts(entries), view([])))).text).split())
    assert "storage exp_avg_sq Expansion(n=2, ) Rounded()" in text.replace("format=None", "")
    assert "storage exp\\_avg\\_sq" in markdown(entries)


@pytest.mark.parametrize("where", ["command", "name", "device"])
def test_text_from_files_is_escaped_in_the_page(make_run: MakeRun, tmp_path: Path, where: str) -> None:
    make_run("plus", **{where: EVIL, "status": "failed"}, config={"data": EVIL}, corpus={"name": EVIL, "sha256": EVIL})
    runs = read_runs([tmp_path / "runs"])
    groups = group_runs(runs)
    page = html(texts(context(summarize(runs), (), differences(groups))), view(groups))
    tags = Tags(without_library(page))
    assert [attributes.get("type") for tag, attributes in tags.found if tag == "script"] == [
        *("application/json", "text/plain", None, None),
    ]
    assert EVIL in " ".join(tags.text)


def test_text_from_files_is_escaped_in_markdown(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", config={"data": EVIL})
    (line,) = (
        line
        for line in markdown(context(summarize(read_runs([tmp_path / "runs"])), [])).splitlines()
        if "alert" in line
    )
    assert "<script" not in line.replace("\\<", "")
    assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_the_markdown_table_has_a_cell_for_each_column(summary: dict[str, Any]) -> None:
    text = markdown(context(summary, [PICTURE]))
    table = [line for line in text.splitlines() if line.startswith("| ")][: 2 + len(summary["strategies"])]
    assert [line.count("|") for line in table] == [len(COLUMNS) + 1] * 5
    assert "![Training loss](plots/loss.png)" in text
    assert "- **plus**: no updates were lost" in text


def test_unfinished_failed_and_unlike_runs_are_warned_of(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus", status="interrupted", last=20, final=None)
    make_run("mixed", batches_sha256="other")
    summary = summarize(read_runs([tmp_path / "runs"]), failed=[{"name": "plain-seed0"}, {"name": "plus-seed0"}])
    assert warnings(summary) == [
        "mixed-seed0 and plus-seed0 have the same seed but different batches (batches_sha256): these runs can't be "
        "compared.",
        "plus-seed0 is interrupted at step 20 of 60; its figures are left out.",
        "plain-seed0 failed before its first step.",
    ]
    page = page_of(summary)
    assert "Read this first" in page
    assert "Read this first" in markdown(context(summary, []))


def test_with_nothing_to_warn_of_there_is_no_warning(summary: dict[str, Any]) -> None:
    assert warnings(summary) == []
    assert "Read this first" not in page_of(summary)


def test_a_single_run_is_no_comparison(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("plus")
    assert context(summarize(read_runs([tmp_path / "runs"])), [])["title"] == "Training with the strategy plus"


def test_old_and_nearly_empty_files_make_a_page(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    summary = summarize(read_runs([tmp_path / "old"]))
    assert "no run finished (old unknown at step 0)." in page_of(summary)
    assert "no run finished (old unknown at step 0)." in markdown(context(summary, []))


def test_a_wide_terminal_has_a_line_for_each_strategy(summary: dict[str, Any]) -> None:
    lines = printed(summary, 170).splitlines()
    (line,) = (line for line in lines if line.split()[:1] == ["plain"])
    assert line.split() == [
        *("plain", "2.1365", "±", "0.0092", "+0.0315", "±", "0.0021", "8.470", "0.1700", "83.0", "83.0", "40.0"),
        *("8", "3.43", "500", "5,000"),
    ]


def test_a_narrow_terminal_has_a_column_for_each_strategy_and_nothing_is_cut(summary: dict[str, Any]) -> None:
    text = printed(summary, 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    (line,) = (line for line in text.splitlines() if line.strip().startswith("bytes/param"))
    assert line.split() == ["bytes/param", "8", "12", "16"]
    for column in COLUMNS:
        assert column.heading in text


def test_the_sentences_follow_the_table(summary: dict[str, Any]) -> None:
    flat = " ".join(printed(summary, 100).split())
    for row in summary["strategies"]:
        assert verdict(row) in flat


# ---- runs that continue from a checkpoint ----------------------------------------------------------------------


@pytest.fixture
def branched(make_branch: MakeRun, tmp_path: Path) -> dict[str, Any]:
    make_branch("plain", param=0.0039)
    make_branch("mixed")
    return summarize(read_runs([tmp_path / "runs"]))


def test_runs_that_continue_say_from_where_how_exactly_and_at_what_learning_rate(branched: dict[str, Any]) -> None:
    entries = context(branched, [])
    said = (
        "All runs continue from step 300 of fp32-seed0 (strategy fp32, float32 weights, learning rate 0.001 at its "
        "peak), /runs/old/checkpoints/step-000300; learning rate from 0.0001 down to 1e-05, cosine."
    )
    tags = Tags(without_library(html(texts(entries), view([]))))
    assert tags.open == []
    text = " ".join(" ".join(tags.text).split())
    assert said in text
    assert "Where the runs start" in text
    assert "continued from step 300" in text
    assert "plain 3.9e-03 exact 1.2e-03 2.5000" in text
    assert "mixed exact exact 1.2e-03 2.5000" in text
    page = markdown(entries)
    assert "## Where the runs start" in page
    assert "| plain | 3.9e-03 | exact | 1.2e-03 | 2.5000 |" in page
    shown = " ".join(printed(branched, 200).split())
    assert said in shown
    assert "plain 3.9e-03 exact 1.2e-03 2.5000" in shown


def test_runs_with_fresh_weights_have_no_such_table(summary: dict[str, Any]) -> None:
    said = texts(context(summary))
    for shown in (said.before + said.after, markdown(context(summary, [])), printed(summary, 200)):
        assert "Where the runs start" not in shown
        assert "continue" not in shown


def test_what_runs_from_different_checkpoints_have_not_in_common_is_not_claimed(
    make_branch: MakeRun, tmp_path: Path
) -> None:
    other = "/runs/new/checkpoints/step-000900"
    make_branch("plain")
    make_branch("plus", source={"checkpoint": other, "step": 900}, config={"from_checkpoint": other, "lr": 2e-4})
    page = markdown(context(summarize(read_runs([tmp_path / "runs"])), []))
    assert "The runs continue from different checkpoints. Weights" in page
    assert "continued from step" not in page

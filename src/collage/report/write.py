"""Writing a report: plots, report.html and report.md, and compare.json for a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collage.report.differences import differences
from collage.report.groups import Group, group_runs
from collage.report.page import Picture, context, html, markdown, texts
from collage.report.plots import PLOTS, render
from collage.report.runs import COMPARE_FILE, Run, read_compare, read_runs
from collage.report.style import LIGHT
from collage.report.summary import data, summarize
from collage.report.view import view
from collage.train.runfiles import write_json, write_text

CARRIED = ("jobs", "wall_time_s", "failed")
"""Entries of compare.json that no run file holds."""


@dataclass(frozen=True)
class Report:
    """A written report: its summary and where its files are."""

    summary: Mapping[str, Any]
    html: Path
    markdown: Path
    plots: tuple[Path, ...]


def _pictures(groups: Sequence[Group]) -> list[Picture]:
    drawn = [(plot, render(plot, groups, LIGHT)) for plot in PLOTS]
    return [Picture(plot.stem, plot.heading, plot.caption, png) for plot, png in drawn if png is not None]


def write_report(runs: Sequence[Run], summary: Mapping[str, Any], out: Path) -> Report:
    """Write OUT/report.html, OUT/report.md and OUT/plots/*.png."""
    groups = group_runs(runs)
    pictures = _pictures(groups)
    entries = context(summary, pictures, differences(groups))
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.stem}.png").write_bytes(picture.png)
    write_text(out / "report.html", html(texts(entries), view(groups)))
    write_text(out / "report.md", markdown(entries))
    plots = tuple(folder / f"{picture.stem}.png" for picture in pictures)
    return Report(summary, out / "report.html", out / "report.md", plots)


def _commands(directories: Sequence[Path], runs: Sequence[Run]) -> str | None:
    """The command of each compare directory, and of each run outside of one, each command once."""
    compared = {directory.resolve(): read_compare(directory) for directory in directories}
    commands = [record.get("command") for record in compared.values() if record]
    covered = {directory for directory, record in compared.items() if record}
    commands += [run.record.get("command") for run in runs if run.path.resolve().parent not in covered]
    return "\n".join(dict.fromkeys(str(command) for command in commands if command)) or None


def summary_of(directories: Sequence[Path], runs: Sequence[Run]) -> dict[str, Any]:
    """The summary of runs that were read from `directories`, with what only a compare.json there holds."""
    compared = read_compare(directories[0]) if len(directories) == 1 else None
    extra = {key: compared[key] for key in CARRIED if compared and key in compared}
    return summarize(runs, command=_commands(directories, runs), **extra)


def report_on(directories: Sequence[Path], out: Path | None = None) -> Report:
    """Read run and compare directories and write their report to `out`, by default the first of them.

    Raises:
        UserError: no run files, unreadable ones, or the same run twice.
    """
    runs = read_runs(directories)
    return write_report(runs, summary_of(directories, runs), out or directories[0])


def report_on_compare(out: Path, **entries: Any) -> Report:
    """Write compare.json and the report of the comparison in `out`, over its runs that left files.

    Args:
        out: the comparison's folder.
        entries: what only the comparison knows: `plan`, `command`, `jobs`, `wall_time_s` and `failed`, the runs that
            failed. With one of these, or with runs that did not start alike, the status is "incomplete".

    Raises:
        UserError: no run left files.
    """
    runs = read_runs([out])
    summary = summarize(runs, **entries)
    if summary["warnings"] or entries.get("failed"):
        summary["status"] = "incomplete"
    write_json(out / COMPARE_FILE, data(summary))
    return write_report(runs, summary, out)

"""The page of a folder of results: README.md with tables and plots, made from the JSON files beside it alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collage.bench.columns import COLUMNS, MEANINGS, Row, heading, left_out, shown_columns
from collage.bench.plots import draw
from collage.bench.results import read
from collage.report.style import LIGHT
from collage.train.config import UserError
from collage.train.runfiles import write_text

PAGE, PLOTS = "README.md", "plots"


def write_page(folder: Path) -> Path:
    """Writes README.md and plots/ for the results in `folder`; returns the page's path.

    Raises:
        UserError: no such folder, or a file in it that is no result.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of results must exist, got {folder}; make it and put files of --json there")
    results = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    sections = [line for path, result in results for line in _section(path, result)]
    if not results:
        sections = ["No results yet."]
    page = folder / PAGE
    write_text(page, "\n".join([*_head(), *sections]).rstrip() + "\n")
    return page


def _head() -> list[str]:
    return [
        "# Optimizer step: results",
        "",
        "Made by `collage bench page` from the JSON files in this folder, each written by `collage bench step --json "
        "FILE`. Every contender makes real steps on parameters and gradients of its own, one step in each round; the "
        "rounds of all contenders of a table are interleaved in one process, so compare ratios, not milliseconds of "
        "different files.",
        "",
        *(f"- **{heading}**: {meaning}." for heading, meaning in MEANINGS),
        "",
    ]


def _section(path: Path, result: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    known = result["environment"]["variables"]
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in known.items())
    threads = result["threads"]
    facts = {
        "device": f"{result['device']}, {threads} {'thread' if threads == 1 else 'threads'}",
        "date": result["created"],
        "versions": versions,
        "commit": result["commit"] or "unknown",
        "environment": variables or "no variable that changes timings",
        "rows": f"[{path.name}]({path.name})",
    }
    lines = [f"## {path.stem}", "", "```bash", f"{variables} {result['command']}".strip(), "```", ""]
    lines += [*(f"- {name}: {_escaped(value)}" for name, value in facts.items()), ""]
    for name in dict.fromkeys(row["shapes"] for row in result["rows"]):
        lines += _table(path, name, [row for row in result["rows"] if row["shapes"] == name])
    return lines


def _table(path: Path, name: str, rows: Sequence[Row]) -> list[str]:
    lines = [f"### {heading(rows)}", ""]
    picture = draw(rows, LIGHT)
    if picture is not None:
        plot = path.parent / PLOTS / f"{path.stem}-{name}.png"
        plot.parent.mkdir(exist_ok=True)
        plot.write_bytes(picture)
        lines += [f"![Time of a step on {name}, as ratio to torch fused]({PLOTS}/{plot.name})", ""]
    columns = shown_columns(rows)
    lines.append("| " + " | ".join(column.heading for column in columns) + " |")
    lines.append("|" + "|".join("---" if column is COLUMNS[0] else "---:" for column in columns) + "|")
    for row in rows:
        if row["rounds"]:
            cells = [_escaped(column.show(row)) for column in columns]
            lines.append("| " + " | ".join([_emphasised(row, cells[0]), *cells[1:]]) + " |")
    missing = left_out(rows)
    return [*lines, "", *(f"- {_escaped(line)}" for line in missing), *([""] if missing else [])]


def _emphasised(row: Row, text: str) -> str:
    return f"**{text}**" if row["kind"] == "collage" else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

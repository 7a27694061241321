"""The pages of a folder of results: tables and plots, made from the JSON files beside them alone.

README.md is about the step (`collage bench step`), precision.md about what it delivers (`collage bench precision`),
train.md about whole training steps (`collage bench train`), memory.md about their peaks (`collage bench memory`).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from collage.bench import delivered, memory_table, train_table
from collage.bench.columns import MEANINGS, Column, Row, heading, left_out, shown_columns
from collage.bench.plots import draw, draw_delivered
from collage.bench.results import KINDS, MEMORY, PRECISION, STEP, TRAIN, read
from collage.report.style import LIGHT
from collage.train.config import UserError
from collage.train.runfiles import write_text

PAGE, PLOTS = "README.md", "plots"
PRECISION_PAGE, TRAIN_PAGE, MEMORY_PAGE = "precision.md", "train.md", "memory.md"
Result = dict[str, Any]


def write_page(folder: Path) -> Path:
    """Writes README.md and plots/ for the results in `folder`, and precision.md, train.md and memory.md where there are
    such results; returns the path of README.md.

    Raises:
        UserError: no such folder, or a file in it that is no result.
    """
    if not folder.is_dir():
        raise UserError(f"the folder of results must exist, got {folder}; make it and put files of --json there")
    results = [(path, read(path)) for path in sorted(folder.glob("*.json"))]
    of_kind = {kind: [pair for pair in results if pair[1]["kind"] == kind] for kind in KINDS}
    others = {
        PRECISION: (PRECISION_PAGE, _precision_head(), _delivered),
        TRAIN: (TRAIN_PAGE, _train_head(), _trained),
        MEMORY: (MEMORY_PAGE, _memory_head(), _peaks),
    }
    for kind, (name, head, body) in others.items():
        if of_kind[kind]:
            _write(folder / name, head, of_kind[kind], body)
    page = folder / PAGE
    _write(page, _head([kind for kind in others if of_kind[kind]]), of_kind[STEP], _steps)
    return page


def _write(
    page: Path, head: list[str], results: list[tuple[Path, Result]], body: Callable[[Path, Result], list[str]]
) -> None:
    sections = [line for path, result in results for line in [*_section(path, result), *body(path, result)]]
    write_text(page, "\n".join([*head, *(sections or ["No results yet."])]).rstrip() + "\n")


_LINKS = {
    PRECISION: f"What the steps deliver: [{PRECISION_PAGE}]({PRECISION_PAGE}).",
    TRAIN: f"Whole training steps: [{TRAIN_PAGE}]({TRAIN_PAGE}).",
    MEMORY: f"Peak memory, planned and measured: [{MEMORY_PAGE}]({MEMORY_PAGE}).",
}


def _head(others: Sequence[str]) -> list[str]:
    return [
        "# Optimizer step: results",
        "",
        "Made by `collage bench page` from the JSON files in this folder that `collage bench step --json FILE` "
        "wrote. Every contender makes real steps on parameters and gradients of its own, one step in each round; the "
        "rounds of all contenders of a table are interleaved in one process, so compare ratios, not milliseconds of "
        "different files.",
        "",
        *(line for kind in others for line in (_LINKS[kind], "")),
        *(f"- **{heading}**: {meaning}." for heading, meaning in MEANINGS),
        "",
    ]


def _precision_head() -> list[str]:
    return [
        "# What an optimizer's steps deliver: results",
        "",
        "Made by `collage bench page` from the JSON files in this folder that `collage bench precision --json FILE` "
        "wrote. All optimizers of a table step on the same gradients, one step after the other. What counts is the "
        "value that an optimizer holds, corrections and master copies included.",
        "",
        *(f"- **{heading}**: {meaning}." for heading, meaning in delivered.MEANINGS),
        "",
    ]


def _train_head() -> list[str]:
    return [
        "# Whole training steps: results",
        "",
        "Made by `collage bench page` from the JSON files in this folder that `collage bench train --json FILE` wrote. "
        "The rounds of all arms of a table are interleaved in one process, so compare ratios, not milliseconds of "
        "different files.",
        "",
        *(f"- **{heading}**: {meaning}." for heading, meaning in train_table.MEANINGS),
        "",
    ]


def _memory_head() -> list[str]:
    return [
        "# Peak memory of training steps: results",
        "",
        "Made by `collage bench page` from the JSON files in this folder that `collage bench memory --json FILE` "
        "wrote.",
        "",
        *(f"- **{heading}**: {meaning}." for heading, meaning in memory_table.MEANINGS),
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
    return lines


def _steps(path: Path, result: Result) -> list[str]:
    names = dict.fromkeys(row["shapes"] for row in result["rows"])
    return [
        line for name in names for line in _table(path, name, [row for row in result["rows"] if row["shapes"] == name])
    ]


def _delivered(path: Path, result: Result) -> list[str]:
    rows, length = result["shape"]
    lines = [f"{result['elements']:,} elements [{rows:,}, {length}], {result['steps']:,} steps.", ""]
    picture = draw_delivered(result["rows"], LIGHT)
    if picture is not None:
        lines += [_picture(path.parent / PLOTS / f"{path.stem}.png", picture, "What every optimizer delivers"), ""]
    for title, columns, shown in delivered.tables(result):
        lines += [f"### {title}", "", *_rows(columns, shown), ""]
    return [*lines, *(f"- {_escaped(note)}" for note in delivered.notes(result)), ""]


def _trained(path: Path, result: Result) -> list[str]:
    lines: list[str] = []
    for rows in train_table.models(result):
        lines += [f"### {train_table.heading(rows)}", ""]
        picture = draw(rows, LIGHT, to="best mixed precision")
        if picture is not None:
            plot = path.parent / PLOTS / f"{path.stem}-{rows[0]['model']}.png"
            lines += [_picture(plot, picture, "Time of a training step, as ratio to the best mixed precision"), ""]
        lines += _rows(train_table.COLUMNS, [row for row in rows if row["rounds"]])
        lines += ["", *(f"- {_escaped(note)}" for note in train_table.notes(rows)), ""]
    return lines


def _peaks(path: Path, result: Result) -> list[str]:
    rows = result["rows"]
    return [f"{memory_table.heading(rows)}.", "", *_rows(memory_table.COLUMNS, rows), ""]


def _picture(plot: Path, picture: bytes, text: str) -> str:
    plot.parent.mkdir(exist_ok=True)
    plot.write_bytes(picture)
    return f"![{text}]({PLOTS}/{plot.name})"


def _table(path: Path, name: str, rows: Sequence[Row]) -> list[str]:
    lines = [f"### {heading(rows)}", ""]
    picture = draw(rows, LIGHT)
    if picture is not None:
        plot = path.parent / PLOTS / f"{path.stem}-{name}.png"
        lines += [_picture(plot, picture, f"Time of a step on {name}, as ratio to torch fused"), ""]
    lines += _rows(shown_columns(rows), [row for row in rows if row["rounds"]])
    missing = left_out(rows)
    return [*lines, "", *(f"- {_escaped(line)}" for line in missing), *([""] if missing else [])]


def _rows(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """A table; the first column is the contender's name."""
    lines = [
        "| " + " | ".join(_escaped(column.heading) for column in columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    for row in rows:
        cells = [_escaped(column.show(row)) for column in columns]
        lines.append("| " + " | ".join([_emphasised(row, cells[0]), *cells[1:]]) + " |")
    return lines


def _emphasised(row: Row, text: str) -> str:
    return f"**{text}**" if row.get("kind") == "collage" else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

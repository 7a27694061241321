"""The report as text: report.html (one self-contained file), report.md and the tables on a terminal."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.align import VerticalAlignMethod
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from collage.report.differences import Difference
from collage.report.wording import START_COLUMNS, Column, cells, columns, start_text, verdict

_MARKDOWN_SIGNS = re.compile(r"([\\`*_\[\]<>|])")


TEMPLATES = "collage.report"


@dataclass(frozen=True)
class Picture:
    """A plot as PNG bytes, with its file's stem, heading and caption."""

    stem: str
    heading: str
    caption: str
    png: bytes


def _count(number: int, thing: str, things: str | None = None) -> str:
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def _title(summary: Mapping[str, Any]) -> str:
    rows = summary["strategies"]
    if len(rows) == 1:
        return f"Training with the strategy {rows[0]['label']}"
    return f"Comparison of {len(rows)} precision strategies"


def _subtitle(summary: Mapping[str, Any]) -> str:
    model, corpus, config = summary["model"], summary["corpus"], summary["config"]
    parts = [str(model["name"])] if "name" in model else []
    if isinstance(model.get("parameters"), int):
        parts.append(_count(model["parameters"], "parameter"))
    if "name" in corpus:
        parts.append(f"trained on {corpus['name']}")
    if "step" in summary["source"]:
        parts.append(f"continued from step {summary['source']['step']:,}")
    if isinstance(config.get("steps"), int):
        parts.append(_count(config["steps"], "step"))
    parts.append(_count(max(row["seeds"] for row in summary["strategies"]), "seed"))
    if summary["device"]:
        parts.append(str(summary["device"]))
    return " · ".join(parts)


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """Sentences that must be read before the figures: runs that can't be compared, and runs without figures."""
    found = [f"{problem}: these runs can't be compared." for problem in summary["warnings"]]
    named: set[str] = set()
    for row in summary["strategies"]:
        for run in row["unfinished"]:
            of = f" of {run['steps']}" if run["steps"] else ""
            found.append(f"{run['name']} is {run['status']} at step {run['step']}{of}; its figures are left out.")
            named.add(run["name"])
    missing = [run["name"] for run in summary.get("failed", ()) if run["name"] not in named]
    return found + [f"{name} failed before its first step." for name in missing]


def _verdicts(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = summary["strategies"]
    return [{"label": row["label"], "text": verdict(row).removeprefix(row["label"] + ": ")} for row in rows]


def _origin(summary: Mapping[str, Any]) -> dict[str, str]:
    entries = {
        "continued from": _entries(summary["source"]),
        "corpus": _entries(summary["corpus"]),
        "model": _entries(summary["model"]),
        "seeds": ", ".join(map(str, summary["seeds"])),
        "differing settings": ", ".join(summary["differing"]),
        "versions": _entries(summary["versions"]),
        "commit": summary["commit"],
        "device": summary["device"],
        "runs at the same time": summary.get("jobs"),
        "wall time": _duration(summary.get("wall_time_s")),
    }
    return {name: str(value) for name, value in entries.items() if value}


def _entries(record: Mapping[str, Any]) -> str:
    shown = {key: value[:12] if key == "sha256" else _text(value) for key, value in record.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _text(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def context(
    summary: Mapping[str, Any], pictures: Sequence[Picture] = (), differing: Sequence[Difference] = ()
) -> dict[str, Any]:
    """What the templates show."""
    shown = columns(summary)
    return {
        "title": _title(summary),
        "subtitle": _subtitle(summary),
        "warnings": warnings(summary),
        "verdicts": _verdicts(summary),
        "columns": shown,
        "rows": [cells(row, shown) for row in summary["strategies"]],
        "start": start_text(summary),
        "start_columns": START_COLUMNS,
        "start_rows": [cells(row, START_COLUMNS) for row in summary["strategies"]],
        "plots": pictures,
        "labels": [row["label"] for row in summary["strategies"]],
        "differing": differing,
        "commands": (summary["command"] or "").splitlines(),
        "origin": _origin(summary),
        "settings": {name: _text(value) for name, value in summary["config"].items()},
    }


def _markdown(value: object) -> object:
    """Text with Markdown's signs escaped and on one line."""
    return _MARKDOWN_SIGNS.sub(r"\\\1", " ".join(value.split())) if isinstance(value, str) else value


def _source(name: str) -> str:
    return resources.files(TEMPLATES).joinpath(name).read_text(encoding="utf-8")


def _environment(**settings: Any) -> Environment:
    return Environment(
        loader=FunctionLoader(_source), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **settings
    )


@dataclass(frozen=True)
class Texts:
    """The page's texts as HTML, every text from a file escaped: what is read before the plots, and after them."""

    title: str
    before: str
    after: str


def texts(entries: Mapping[str, Any]) -> Texts:
    """The texts of the page for a context."""
    environment = _environment(autoescape=True)
    before, after = (environment.get_template(f"{name}.html.j2").render(entries) for name in ("before", "after"))
    return Texts(entries["title"], before, after)


def html(texts: Texts, data: Mapping[str, Any], *, live: int | None = None) -> str:
    """The page: texts, plots and what draws them in one file.

    Args:
        texts: as HTML.
        data: of `collage.report.view.view`.
        live: milliseconds between questions for new records, to the server that the page came from; None: a page
            that stays as it is.
    """
    from plotly.offline import get_plotlyjs

    # Packed it is 2 MB instead of 5; with a fixed time the same files make the same page.
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode("ascii")
    page = _environment(autoescape=True).get_template("report.html.j2")
    return page.render(
        title=texts.title,
        before=Markup(texts.before),
        after=Markup(texts.after),
        style=Markup(_source("page.css")),
        scripts=[Markup(_source(name)) for name in ("charts.js", "page.js")],
        library=library,
        data=Markup(script_json({"live": live, **data})),
    )


def script_json(value: Any) -> str:
    """JSON that can stand in a script element, whatever its texts hold."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def markdown(entries: Mapping[str, Any]) -> str:
    """The page report.md; its pictures are the files in plots/."""
    return _environment(autoescape=False, finalize=_markdown).get_template("report.md.j2").render(entries)


# ---- the terminal ---------------------------------------------------------------------------------------------------


def table(summary: Mapping[str, Any], console: Console) -> Table:
    """The figures of all strategies: a line for each, or where the console is too narrow for that, a column."""
    lines = _lines(summary, columns(summary))
    upright = _table(lines)
    if Measurement.get(console, console.options.update(width=1000), upright).minimum <= console.width:
        return upright
    turned = [[text.replace(" ± ", "\n± ") for text in line] for line in zip(*lines, strict=True)]
    return _table(turned, vertical="top")


def _lines(summary: Mapping[str, Any], columns: Sequence[Column]) -> list[list[str]]:
    return [[column.heading for column in columns], *(cells(row, columns) for row in summary["strategies"])]


def _table(lines: Sequence[Sequence[str]], vertical: VerticalAlignMethod = "bottom") -> Table:
    """A table whose headings are wrapped where they are wider than the cells below."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, column in enumerate(zip(*lines, strict=True)):
        widest = max(len(part) for text in column[1:] for part in text.splitlines())
        made.add_column(column[0], justify="right" if index else "left", vertical=vertical, min_width=widest)
    for line in lines[1:]:
        made.add_row(*map(Text, line))
    return made


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the table, what is to be known before reading it, and a sentence for each strategy.

    Runs that continue from a checkpoint have a table on that first.
    """
    for warning in warnings(summary):
        console.print(warning, style="yellow", markup=False, highlight=False)
    if start := start_text(summary):
        console.print(start, markup=False, highlight=False)
        console.print(_table(_lines(summary, START_COLUMNS)))
    console.print(table(summary, console))
    for row in summary["strategies"]:
        console.print(verdict(row), markup=False, highlight=False)

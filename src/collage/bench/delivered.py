"""What is shown of `collage bench precision`: the columns of its two tables, and the tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from collage.bench.columns import Column, Row
from collage.report.wording import MISSING

DISPLACEMENT, MOMENT = "Share of the intended way", "The second moment over its exact value"
MEANINGS = (
    (
        "lr, |w| from",
        "how far the weights went, as a share of what AdamW in float64 does on the same gradients (noisy, of a "
        "constant mean): mean over the elements that start in this range",
    ),
    (
        "scatter",
        "root mean square of an element's distance from where the reference has it, over the mean way: the largest of "
        "these cells. Divided by the root of the number of elements it is the standard error of a share",
    ),
    ("decay", "weight decay alone, 1e-5 of the weight in a step and gradients of zero, as a share of the exact decay"),
    (
        "beta2",
        "stored second moment over the exact moving average, after gradients that became three times smaller a third "
        "of the way: median, mean, and in brackets the fifth and ninety-fifth percentile of the elements",
    ),
    ("zeros", "elements whose second moment is positive and is held as 0, over all values of beta2"),
)


def figure(value: float | None) -> str:
    """Two decimals, three close to 1; whole numbers where it is far off."""
    if value is None:
        return MISSING
    if abs(value - 1) < 0.0995:
        return f"{value:.3f}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _cell(key: str, where: Mapping[str, Any], show: Callable[[Mapping[str, Any]], str]) -> Callable[[Row], str]:
    """Shows the record of a row's list `key` whose entries are as in `where`."""

    def text(row: Row) -> str:
        found = [each for each in row[key] if all(each[name] == value for name, value in where.items())]
        return show(found[0]) if found else MISSING

    return text


def _scatter(row: Row) -> str:
    known = [cell["scatter"] for cell in row["displacement"]]
    return MISSING if not known or None in known else figure(max(known))


def _moment(cell: Mapping[str, Any]) -> str:
    middle, mean, low, high = (figure(cell[key]) for key in ("p50", "mean", "p5", "p95"))
    return f"{middle}, {mean} ({low} .. {high})"


def _zeros(row: Row) -> str:
    return f"{sum(cell['zeros'] for cell in row['second_moment']):,}" if row["second_moment"] else MISSING


def _cells(rows: Sequence[Row], key: str, *names: str) -> list[dict[str, Any]]:
    """Which cells the rows have, in their order."""
    found = {tuple(cell[name] for name in names): None for row in rows for cell in row[key]}
    return [dict(zip(names, values, strict=True)) for values in found]


_CONTENDER = Column("contender", "contender", lambda row: str(row["contender"]))


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[Column], list[Row]]]:
    """Title, columns and rows of each table that has a row."""
    rows = result["rows"]
    share = [
        Column(
            f"lr {where['lr']:g}, |w| from {where['weights']}",
            "displacement",
            _cell("displacement", where, lambda cell: figure(cell["share"])),
        )
        for where in sorted(
            _cells(rows, "displacement", "weights", "lr"), key=lambda where: -float(where["weights"].split()[0])
        )
    ]
    decay = [
        Column(f"decay from {where['weights']}", "decay", _cell("decay", where, lambda cell: figure(cell["share"])))
        for where in _cells(rows, "decay", "weights")
    ]
    moment = [
        Column(
            f"beta2 {where['beta2']:g}, {where['steps']} steps", "second_moment", _cell("second_moment", where, _moment)
        )
        for where in _cells(rows, "second_moment", "beta2", "steps")
    ]
    made = [
        (DISPLACEMENT, [_CONTENDER, *share, Column("scatter", "displacement", _scatter), *decay], "displacement"),
        (MOMENT, [_CONTENDER, *moment, Column("zeros", "second_moment", _zeros)], "second_moment"),
    ]
    found = [(title, columns, [row for row in rows if row[key]]) for title, columns, key in made]
    return [(title, columns, shown) for title, columns, shown in found if shown]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the tables don't say: which strategies hold the same bits, and who was not measured."""
    lines = []
    equal = result["equal"]
    if equal is not None:
        both, runs = " and ".join(equal["strategies"]), equal["runs"]
        said = f"differ in {equal['different']:,} entries" if equal["different"] else "hold the same bits"
        lines.append(f"{both} {said}: weights and both moments, compared at the end of {runs} runs")
    for row in result["rows"]:
        if row["status"] != "measured":
            lines.append(f"{row['status']}: {row['contender']}: {row['reason']}")
        elif row["second_moment_reason"]:
            lines.append(f"no second moment: {row['contender']}: {row['second_moment_reason']}")
        if row["status"] == "measured" and not row["displacement"]:
            lines.append(f"no displacement: {row['contender']}: what it holds beside the parameter cannot be read")
    return lines


def show(result: Mapping[str, Any], console: Console) -> None:
    """The tables and the notes."""
    for title, columns, rows in tables(result):
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column.heading, justify="left" if column is _CONTENDER else "right")
        for row in rows:
            table.add_row(*(column.show(row) for column in columns), style="bold" if row["kind"] == "collage" else None)
        console.print(table)
    for line in notes(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)

"""The plots of the benchmarks: a line for each contender, in the style of the reports."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from collage.bench.columns import Row
from collage.report.plots import theme_settings
from collage.report.style import DPI, WIDTH, Theme


def drawn_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that a plot shows, fastest first: those with a ratio, null kernels apart."""
    timed = [row for row in rows if row["ratio"] is not None and row["kind"] != "null"]
    return sorted(timed, key=lambda row: row["ratio"])


def draw(rows: Sequence[Row], theme: Theme, to: str = "torch fused") -> bytes | None:
    """Ratios to torch's fused AdamW (or to what `to` names), and shares of the null kernel where there are some, as a
    PNG file's bytes; None where nothing was timed."""
    rows = drawn_rows(rows)
    if not rows:
        return None
    shares = any(row.get("null_share") is not None for row in rows)
    with rc_context(theme_settings(theme)):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.26 * len(rows)), dpi=DPI, layout="constrained")
        panels = figure.subplots(
            1, 2 if shares else 1, sharey=True, squeeze=False, width_ratios=[3, 2] if shares else [1]
        )
        _draw_ratios(panels[0, 0], rows, theme, to)
        if shares:
            _draw_shares(panels[0, 1], rows, theme)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _colour(row: Row, theme: Theme) -> str:
    return theme.palette[{"collage": "blue", "reference": "ink"}.get(row["kind"], "gray")]


def _draw_ratios(axes: Axes, rows: Sequence[Row], theme: Theme, to: str) -> None:
    ratios = [row["ratio"] for row in rows]
    low, high = 0.8 * min(0.5, *ratios), max(2.0, *ratios)
    for y, row in enumerate(rows):
        axes.barh(y, row["ratio"] - low, left=low, height=0.7, color=_colour(row, theme))
        text = f"{row['ratio']:.2f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}"
        _label(axes, row["ratio"], y, text, theme)
    axes.axvline(1.0, color=theme.palette["ink"], linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.16)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 20 * low else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _tidy(axes, f"time, x {to} (log)")
    _name(axes, rows, theme)


def _name(axes: Axes, rows: Sequence[Row], theme: Theme) -> None:
    """The contenders' names on the y axis, the first at the top."""
    axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontsize("small")
        if row["kind"] == "collage":
            label.set_color(_colour(row, theme))
            label.set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _draw_shares(axes: Axes, rows: Sequence[Row], theme: Theme) -> None:
    for y, row in enumerate(rows):
        share = row["null_share"]
        if share is not None:
            axes.barh(y, share, height=0.7, color=_colour(row, theme))
            _label(axes, share, y, f"{share:.2f}", theme)
    axes.set_xlim(0.0, 1.25 * max(1.0, *(row["null_share"] or 0.0 for row in rows)))
    axes.set_xticks([0.0, 0.5, 1.0])
    _tidy(axes, "speed, x null kernel")


def _label(axes: Axes, x: float, y: float, text: str, theme: Theme) -> None:
    patch = {"facecolor": theme.background, "edgecolor": "none", "pad": 0.8}
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize="x-small", bbox=patch)


def _tidy(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize="small")
    axes.tick_params(axis="x", which="both", labelsize="small")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", linewidth=0.5)
    axes.set_axisbelow(True)


# ---- what the steps deliver ----------------------------------------------------------------------------------------

MOST_SHARE, MOMENT_RANGE = 1.4, (0.2, 5.0)
"""What lies beyond is drawn at the edge."""


def draw_delivered(rows: Sequence[Row], theme: Theme) -> bytes | None:
    """Every cell's share of the intended way of each contender, and the quantiles of its second moment
    at the largest beta2, as a PNG file's bytes; None where nothing was measured."""
    rows = [row for row in rows if row["displacement"] or row["second_moment"]]
    if not rows:
        return None
    with rc_context(theme_settings(theme)):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.24 * len(rows)), dpi=DPI, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for y, row in enumerate(rows):
            shares = [min(each["share"], MOST_SHARE) for each in row["displacement"] if each["share"] is not None]
            left.hlines(y, *_ends(shares), color=_colour(row, theme), linewidth=1.2, alpha=0.5)
            left.plot(shares, [y] * len(shares), "|", color=_colour(row, theme), markersize=8, markeredgewidth=1.6)
            _draw_moment(right, y, row, theme)
        _name(left, rows, theme)
        for axes in (left, right):
            axes.axvline(1.0, color=theme.palette["ink"], linewidth=0.8, zorder=0)
        left.set_xlim(-0.06, MOST_SHARE + 0.06)
        _tidy(left, "share of the intended way")
        right.set_xscale("log")
        right.set_xlim(0.9 * MOMENT_RANGE[0], 1.1 * MOMENT_RANGE[1])
        right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right.xaxis.set_minor_formatter(NullFormatter())
        largest = max((cell["beta2"] for row in rows for cell in row["second_moment"]), default=None)
        _tidy(right, f"v / exact, beta2 {largest} (log)")
        return _png(figure)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return (min(values), max(values)) if values else (0.0, 0.0)


def _draw_moment(axes: Axes, y: int, row: Row, theme: Theme) -> None:
    if not row["second_moment"]:
        return
    cell = max(row["second_moment"], key=lambda cell: cell["beta2"])
    if cell["p5"] is None or cell["p50"] is None or cell["p95"] is None:
        return
    low, middle, high = (min(max(cell[key], MOMENT_RANGE[0]), MOMENT_RANGE[1]) for key in ("p5", "p50", "p95"))
    axes.hlines(y, low, high, color=_colour(row, theme), linewidth=3, alpha=0.5)
    axes.plot([middle], [y], "o", color=_colour(row, theme), markersize=4)

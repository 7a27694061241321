"""The plots of a report, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from collage.report.groups import BASELINE, Group, baseline_of
from collage.report.memory import FILLS, group_split
from collage.report.stats import Curve, difference_curve, group_curve
from collage.report.style import DPI, WIDTH, Line, Theme, lines
from collage.report.validation import Points, validation_points
from collage.report.wording import plain

MARKS = 8
"""Marks along a curve; those of different groups stand at different places, so that none hides another."""

Looks = Sequence[tuple[Group, Line]]


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _tidy(axes: Axes, label: str, *, steps: bool = True) -> None:
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="both", linewidth=0.5)
    axes.set_axisbelow(True)
    if steps:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))


def _legend(figure: Figure, looks: Looks) -> None:
    handles = [
        Line2D([], [], label=group.label, linestyle=look.dashes, linewidth=look.width, **_marks(look))
        for group, look in looks
    ]
    longest = max(len(group.label) for group, _ in looks)
    columns = max(1, min(len(looks), 5, 58 // (longest + 7)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=3.2)


def _marks(look: Line) -> dict[str, Any]:
    return {"color": look.colour, "marker": look.marker, "markersize": 5.5, "markeredgecolor": look.edge}


def _draw_curve(axes: Axes, curve: Curve, look: Line, *, raw: bool) -> None:
    smoothed = curve.smoothed()
    if raw:
        axes.plot(curve.steps, curve.mean, color=look.colour, linewidth=0.6, alpha=0.35, zorder=look.order - 1)
    if curve.seeds > 1:
        axes.fill_between(
            smoothed.steps, smoothed.low, smoothed.high, color=look.colour, alpha=0.16, linewidth=0, zorder=2
        )
    axes.plot(
        smoothed.steps,
        smoothed.mean,
        linestyle=look.dashes,
        linewidth=look.width,
        zorder=look.order,
        markevery=(look.phase / MARKS, 1.0 / MARKS) if len(curve.steps) > MARKS else None,
        **_marks(look),
    )


def _has_values(curve: Curve | None) -> bool:
    return curve is not None and any(map(math.isfinite, curve.mean))


def _curves(looks: Looks, of: Callable[[Group], Curve | None]) -> list[tuple[Curve, Line]]:
    found = [(of(group), look) for group, look in looks]
    return [(curve, look) for curve, look in found if curve is not None and _has_values(curve)]


def _differences(looks: Looks) -> list[tuple[Curve, Line]]:
    groups = [group for group, _ in looks]

    def of(group: Group) -> Curve | None:
        baseline = baseline_of(group, groups)
        return None if baseline is None else difference_curve(group, baseline, "loss")

    return _curves(looks, of)


def draw_loss(looks: Looks) -> Figure | None:
    """Training loss against the step; below it, where there is a baseline, the difference from it."""
    losses, differences = _curves(looks, lambda group: group_curve(group, "loss")), _differences(looks)
    if not losses:
        return None
    figure = _figure(5.4 if differences else 3.6)
    ratios = [3, 2] if differences else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for curve, look in losses:
        _draw_curve(panels[0], curve, look, raw=True)
    _tidy(panels[0], "training loss\n(nats per token)")
    if differences:
        ink = next((look.colour for group, look in looks if group.strategy == BASELINE), "gray")
        panels[1].axhline(0.0, color=ink, linewidth=2.2, zorder=2.5)
        for curve, look in differences:
            _draw_curve(panels[1], curve, look, raw=False)
        _tidy(panels[1], f"training loss\nminus {BASELINE}")
    panels[-1].set_xlabel("optimizer step")
    _legend(figure, looks)
    return figure


def draw_updates(looks: Looks) -> Figure | None:
    """EDQ ratio and lost updates against the step, on the audited steps."""
    ratios = _curves(looks, lambda group: group_curve(group, "edq_ratio"))
    if not ratios:
        return None
    figure = _figure(5.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for curve, look in ratios:
        _draw_curve(upper, curve, look, raw=False)
    for curve, look in _curves(looks, lambda group: group_curve(group, "lost_fraction")):
        _draw_curve(lower, _times(curve, 100.0), look, raw=False)
    low, high = upper.get_ylim()
    upper.set_ylim(min(low, 0.0), max(high, 1.08))
    lower.set_ylim(-4.0, 104.0)
    _tidy(upper, "EDQ ratio\n(1 = nothing lost)")
    _tidy(lower, "lost updates\n(% of weights)")
    lower.set_xlabel("optimizer step")
    _legend(figure, looks)
    return figure


def _times(curve: Curve, factor: float) -> Curve:
    mean_, low, high = (tuple(factor * value for value in line) for line in (curve.mean, curve.low, curve.high))
    return Curve(curve.steps, mean_, low, high, curve.seeds)


def _close(points: Sequence[Points]) -> list[Points]:
    """The groups that lie so near zero, beside one far off, that they need a panel of their own."""
    reach = [max(map(abs, each.values)) for each in points]
    near = [each for each, own in zip(points, reach, strict=True) if own < 0.2 * max(reach)]
    return near if any(max(map(abs, each.values)) for each in near) else []


def draw_validation(looks: Looks) -> Figure | None:
    """Validation loss of each group: its difference from the baseline where there is one, a mark for each seed.

    Groups whose difference is small beside the largest one are shown again below, enlarged.
    """
    points, differences = validation_points([group for group, _ in looks])
    if not points:
        return None
    rows = [points, _close(points)] if differences else [points]
    rows = [row for row in rows if row]
    figure = _figure(0.5 + sum(0.5 + 0.45 * len(row) for row in rows))
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[0.4 + len(row) for row in rows])[:, 0]
    ink = next((look.colour for group, look in looks if group.strategy == BASELINE), "gray")
    for axes, row in zip(panels, rows, strict=True):
        _draw_panel(axes, row, {group.label: look for group, look in looks})
        if differences:
            axes.axvline(0.0, color=ink, linewidth=2.2, zorder=2.5)
    what = f"validation loss minus {BASELINE}" if differences else "validation loss"
    panels[-1].set_xlabel(f"{what} (nats per token)" + ("; below: enlarged" if len(rows) > 1 else ""))
    return figure


def _draw_panel(axes: Axes, points: Sequence[Points], looks: Mapping[str, Line]) -> None:
    for y, each in enumerate(points):
        _draw_points(axes, float(y), each, looks[each.group.label])
    axes.set_yticks(range(len(points)), [each.group.label for each in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.margins(x=0.08)
    _tidy(axes, "", steps=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))


def _draw_points(axes: Axes, y: float, points: Points, look: Line) -> None:
    colour, centre, reach = look.colour, points.mean, points.spread
    if reach is not None and centre is not None:
        axes.errorbar(centre, y, xerr=reach, color=colour, capsize=5, linewidth=2, marker="|", markersize=16, zorder=3)
    axes.plot(
        points.values,
        [y] * len(points.values),
        linestyle="none",
        marker=look.marker,
        markersize=7,
        markerfacecolor="none" if reach is not None else colour,
        markeredgecolor=colour,
        markeredgewidth=1.5,
        zorder=4,
    )
    axes.annotate(
        points.text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize="small", annotation_clip=False
    )


def draw_memory(looks: Looks, theme: Theme) -> Figure | None:
    """Bytes per parameter as stacked bars."""
    splits = [(group.label, parts) for group, _ in looks if (parts := group_split(group))]
    if not splits:
        return None
    figure = _figure(1.2 + 0.42 * len(splits))
    axes = figure.subplots()
    used = [part for part in FILLS if any(parts.get(part) for _, parts in splits)]
    for y, (_, parts) in enumerate(splits):
        _draw_bar(axes, y, {part: (parts.get(part, 0.0), theme.palette[FILLS[part]]) for part in used}, theme)
    for part in used:
        axes.barh([0], [0], color=theme.palette[FILLS[part]], label=part)
    axes.set_yticks(range(len(splits)), [label for label, _ in splits])
    axes.set_ylim(len(splits) - 0.5, -0.5)
    axes.margins(x=0.1)
    _tidy(axes, "", steps=False)
    axes.grid(False, axis="y")
    axes.set_xlabel("bytes per parameter")
    figure.legend(loc="outside upper center", ncols=len(used), frameon=False, handlelength=1.1, columnspacing=1.2)
    return figure


def _draw_bar(axes: Axes, y: int, parts: Mapping[str, tuple[float, str]], theme: Theme) -> None:
    left = 0.0
    for value, colour in parts.values():
        if value:
            axes.barh(y, value, left=left, height=0.66, color=colour, edgecolor=theme.background, linewidth=1.2)
            axes.text(
                left + value / 2, y, plain(value, ".3g"), ha="center", va="center", fontsize="small", color="#000000"
            )
        left += value
    axes.annotate(plain(left, ".4g"), (left, y), (5, 0), textcoords="offset points", va="center", fontweight="bold")


@dataclass(frozen=True)
class Plot:
    """One plot of the report: the stem of its file, its heading, what it shows in words, and how it is drawn."""

    stem: str
    heading: str
    caption: str
    draw: Callable[[Looks, Theme], Figure | None]


PLOTS = (
    Plot(
        "loss",
        "Training loss",
        "Thick: moving mean over a twentieth of the steps. Thin, above: the unsmoothed loss. Shaded: from the "
        f"smallest to the largest of the seeds. Below: the same, minus {BASELINE} at the same seed and step, which "
        "tells apart curves that lie on top of each other.",
        lambda looks, theme: draw_loss(looks),
    ),
    Plot(
        "updates",
        "What became of the updates",
        "Above: how far the stored weights moved along the intended way. Below: the share of weights that should "
        "have changed in a step and did not. Lines that lie on top of each other differ in width, and their "
        "marks take turns.",
        lambda looks, theme: draw_updates(looks),
    ),
    Plot(
        "validation",
        "Validation loss",
        "A mark for each seed; the bar is the mean ± the standard deviation over the seeds, in figures on the right.",
        lambda looks, theme: draw_validation(looks),
    ),
    Plot(
        "memory",
        "Memory",
        "Bytes kept for each parameter while training, activations apart; m and v are the two moving averages.",
        draw_memory,
    ),
)


def theme_settings(theme: Theme) -> dict[Any, Any]:
    """A theme as matplotlib's settings."""
    colours = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    return {
        **dict.fromkeys(colours, theme.ink),
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "font.family": "DejaVu Sans",
        "font.size": 11.5,
        "axes.formatter.use_mathtext": True,
    }


def render(plot: Plot, groups: Sequence[Group], theme: Theme) -> bytes | None:
    """The plot of `groups` as a PNG file's bytes, or None where the runs have nothing to draw in it."""
    with rc_context(theme_settings(theme)):
        figure = plot.draw(list(zip(groups, lines(groups, theme), strict=True)), theme)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

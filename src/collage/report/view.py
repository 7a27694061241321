"""All that the page draws, as plain JSON types: groups with their looks, runs with their series, bars and points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from collage.report.groups import BASELINE, Group, baseline_of
from collage.report.memory import FILLS, group_split
from collage.report.runs import Run, number
from collage.report.series import by_module, digits, figures, histogram, module_names, module_points, shortened
from collage.report.style import DARK, LIGHT, Line, lines
from collage.report.validation import validation_points

FORMAT = 1


def view(groups: Sequence[Group]) -> dict[str, Any]:
    """The data of the page for `groups`.

    Returns:
        `groups` (label, colours for light and dark, line, memory parts), `runs` (the group's number, seed, status,
        `series` by figure, `modules`, `histogram`), `modules` (names), `parts` (of memory), `validation`.
    """
    runs = [run for group in groups for run in group.runs]
    names = module_names(runs)
    points = module_points(runs, len(names))
    return {
        "format": FORMAT,
        "baseline": BASELINE,
        "groups": _groups(groups),
        "runs": [_run(run, index, groups, points) for index, group in enumerate(groups) for run in group.runs],
        "modules": names,
        "parts": [{"name": part, "colours": _shades(colour)} for part, colour in FILLS.items()],
        "validation": _validation(groups),
    }


def _shades(colour: str) -> list[str]:
    return [LIGHT.palette[colour], DARK.palette[colour]]


def _groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    looks = zip(lines(groups, LIGHT), lines(groups, DARK), strict=True)
    return [
        {
            "label": group.label,
            "colours": [light.colour, dark.colour],
            "dash": _dash(light),
            "width": round(light.width, 2),
            "order": light.order,
            "bytes": group_split(group),
        }
        for group, (light, dark) in zip(groups, looks, strict=True)
    ]


def _dash(line: Line) -> str:
    """The line's dashes as in CSS; matplotlib gives them in widths of the line."""
    if line.dashes == "solid":
        return "solid"
    return ",".join(f"{length * line.width:.1f}px" for length in line.dashes[1])


def _run(run: Run, index: int, groups: Sequence[Group], points: int) -> dict[str, Any]:
    group = groups[index]
    return {
        "name": run.name,
        "group": index,
        "seed": run.seed,
        "status": run.status,
        "step": run.last_step,
        "steps": number(run.config.get("steps")),
        "counted": run.finished or not group.finished,
        "tokens_per_step": _tokens_per_step(run),
        "series": figures(run) | _loss_difference(run, group, groups),
        "modules": by_module(run, points),
        "histogram": histogram(run),
    }


def _tokens_per_step(run: Run) -> float | None:
    last = run.metrics[-1] if run.metrics else {}
    tokens, step = number(last.get("tokens")), number(last.get("step"))
    return digits(tokens / step) if tokens and step else None


def _loss_difference(run: Run, group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """The training loss minus the baseline's at the same seed, step by step, where there is a baseline."""
    baseline = baseline_of(group, groups)
    others = [each for each in baseline.runs if each.seed == run.seed] if baseline else []
    if not others:
        return {}
    own, other = run.series("loss"), others[0].series("loss")
    paired = {step: own[step] - other[step] for step in own if step in other}
    return {"loss_difference": shortened(paired)} if paired else {}


def _validation(groups: Sequence[Group]) -> dict[str, Any]:
    points, differences = validation_points(groups)
    indices = {group.label: index for index, group in enumerate(groups)}
    rows = [
        {
            "group": indices[each.group.label],
            "seeds": each.seeds,
            "values": each.values,
            "mean": each.mean,
            "spread": each.spread,
            "text": each.text,
        }
        for each in points
    ]
    return {"differences": differences, "rows": rows}

"""How plots look: light and dark themes, and a colour and line for each group (Okabe and Ito's palette)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from collage.report.groups import BASELINE, Group

WIDTH, DPI = 6.4, 200
"""Inches and dots per inch: 1,280 pixels, shown at 640, so that 10-point text is readable there and on a phone."""


@dataclass(frozen=True)
class Theme:
    """Colours of one scheme; `palette` maps the palette's names to the shades used in it."""

    name: str
    background: str
    ink: str
    faint: str
    palette: dict[str, str]


_OKABE_ITO = {
    "vermillion": "#D55E00",
    "green": "#009E73",
    "blue": "#0072B2",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
}

LIGHT = Theme("light", "#ffffff", "#1c2128", "#c8cdd4", {**_OKABE_ITO, "ink": "#000000", "gray": "#7a7f87"})
DARK = Theme(
    "dark",
    "#1b1f26",
    "#e3e6ea",
    "#4a505a",
    {**_OKABE_ITO, "blue": "#3D9BD9", "vermillion": "#F0772B", "green": "#1DBF92", "ink": "#ffffff", "gray": "#9aa0a8"},
)
"""The dark shades of blue, vermillion and green are lighter: Okabe and Ito's own are too dim there."""

COLOURS = {
    "plain": "vermillion",
    "stochastic": "orange",
    "kahan": "purple",
    "light": "green",
    "plus": "blue",
    "fp32-states": "sky",
    "mixed": "ink",
    "fp32": "gray",
}
_OTHERS = ("sky", "purple", "orange", "green", "blue", "vermillion", "gray", "ink")
_DASHES: tuple[Any, ...] = ("solid", (0, (3.5, 1.2)), (0, (1.2, 1.2)), (0, (6, 1.4, 1.4, 1.4)), (0, (2.2, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


@dataclass(frozen=True)
class Line:
    """The look of one group, the same in every plot; `phase` in [0, 1) is where its marks begin."""

    colour: str
    edge: str
    dashes: Any
    marker: str
    width: float
    order: float
    phase: float


def lines(groups: Sequence[Group], theme: Theme) -> list[Line]:
    """A look for each group.

    Curves that lie on top of each other stay readable: the baseline is the widest line and lies undermost, the
    others are drawn over it, thinner one by one and dashed, so that each shows beside or between the next.
    """
    drawn = sorted(range(len(groups)), key=lambda i: (groups[i].strategy != BASELINE, i))
    used: set[str] = set()
    looks: dict[int, Line] = {}
    for rank, index in enumerate(drawn):
        name = COLOURS.get(groups[index].strategy)
        if name is None or name in used:
            unused = (other for other in _OTHERS if other not in used)
            name = next(unused, _OTHERS[rank % len(_OTHERS)])
        used.add(name)
        looks[index] = Line(
            colour=theme.palette[name],
            edge=theme.background,
            dashes=_DASHES[rank % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            width=3.6 - 2.2 * rank / max(1, len(groups) - 1),
            order=3.0 + 0.1 * rank,
            phase=rank / len(groups),
        )
    return [looks[index] for index in range(len(groups))]

"""Copies of some of a parameter's elements before a step, and the row of figures that comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from collage.metrics.family import Family
from collage.optim.sharding import local
from collage.storage import form_of

# Elements that are replayed at a time, and the shortest run of them where a parameter is sampled: whole blocks of every
# storage and of every vector unit.
PIECE, RUN = 1 << 17, 1 << 12


@dataclass
class Row:
    """What one parameter contributes to an audited step.

    Attributes:
        group: index of its parameter group.
        param: the parameter.
        name: its name if the optimizer was given named parameters, else None.
        elements: of its local part.
        sums: float64 tensor of :data:`collage.kernels.SUMS`; None if the step could not be replayed.
        more: float64 tensor of :data:`collage.metrics.figures.MORE`; None if nobody asked.
        histogram: see :func:`collage.metrics.figures.histogram`; None likewise.
        reason: why the step could not be replayed.
    """

    group: int
    param: Tensor
    name: str | None
    elements: int
    sums: Tensor | None = None
    more: Tensor | None = None
    histogram: Tensor | None = None
    reason: str | None = None


@dataclass
class Piece:
    """Copies of some of a parameter's elements before the step."""

    start: int
    end: int
    parts: list[Tensor]
    grad: Tensor
    state: dict[str, Any]
    raw: dict[str, Any] | None


@dataclass
class Held:
    """A parameter that takes part in the step, and its copies."""

    row: Row
    options: dict[str, Any]
    pieces: list[Piece] = field(default_factory=list)
    reason: str | None = None


Rows = Sequence[Row]


def bytes_of(held: Held, family: Family) -> int:
    """What copies of all its elements would take."""
    param, group = held.row.param, held.options
    assert param.grad is not None
    states = [*family.state(param).values(), *(family.raw(param) or {}).values()]
    tensors = [*family.parts(group, param), local(param.grad), *states]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def copied(held: Held, family: Family, scale: Tensor | None, start: int, end: int) -> Piece:
    """Copies of its elements from ``start`` to ``end``; ``scale`` is what gradients have been multiplied with."""
    param, group = held.row.param, held.options
    assert param.grad is not None
    whole = end - start == held.row.elements

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if family.elementwise and value.shape == local(param).shape:
            return value.reshape(-1)[start:end].clone()
        return value.clone()

    grad = cut(local(param.grad))
    repeatable = family.bits and scale is None and (whole or family.bits_of_pieces)
    repeatable = repeatable and (family.bits_of_tiles or form_of(param) is None)
    state, raw = {name: cut(value) for name, value in family.state(param).items()}, None
    if repeatable:
        own = family.raw(param)
        raw = state if own is None else {name: value.clone() for name, value in own.items()}
    return Piece(
        start,
        end,
        [cut_part(part, held.row.elements, start, end, family) for part in family.parts(group, param)],
        grad if scale is None else grad.to(torch.float64) / scale.to(grad.device, torch.float64),
        state,
        raw,
    )


def cut_part(part: Tensor, elements: int, start: int, end: int, family: Family) -> Tensor:
    """A component's entries for the elements start to end, copied; an entry may serve several."""
    if not family.elementwise:
        return part.clone()
    each = max(1, elements // max(1, part.numel()))
    return part.reshape(-1)[start // each : -(-end // each)].clone()


def runs(elements: int, share: float, block: int) -> list[tuple[int, int]]:
    """Evenly spaced runs that hold this share of the elements; all of them, in pieces, where the share is 1. No block
    of so many elements is cut."""
    piece, run = PIECE - PIECE % block, RUN + -RUN % block
    if share >= 1 or elements <= run:
        return [(start, min(start + piece, elements)) for start in range(0, elements, piece)] or [(0, 0)]
    count = max(1, int(elements * share) // run)
    places = (elements // run) * torch.arange(count, dtype=torch.float64) / count
    return [(int(place) * run, int(place) * run + run) for place in places.tolist()]

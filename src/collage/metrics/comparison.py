"""One parameter's step: what it stored beside what a replay in float64 intended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collage.kernels import SUMS
from collage.metrics import figures
from collage.metrics.copies import Held, Piece, Row, cut_part
from collage.metrics.family import Family, second_moment
from collage.metrics.replay import widened
from collage.numerics import format_of
from collage.optim.sharding import local
from collage.storage import Rounded

# Of the elements, how many a replay of an unknown rule must come near to.
_EXPLAINED = 0.99


@dataclass(frozen=True)
class Sample:
    """What some elements of a parameter were to do in a step; flat float64 tensors.

    Attributes:
        param: the parameter.
        elements: of its local part.
        weight: how many of them each element here stands for.
        value: the whole value before the step.
        u: the intended update.
        m: first moment before and after, in float64; None if the optimizer has none.
        v: second moment, likewise.
        update: the intended update, had the moments before the step been these two.
    """

    param: Tensor
    elements: int
    weight: float
    value: Tensor
    u: Tensor
    m: tuple[Tensor, Tensor] | None
    v: tuple[Tensor, Tensor] | None
    update: Callable[[Tensor, Tensor], Tensor]


def compared(held: Held, family: Family | None) -> Row:
    """The row with the figures of a step that has been made; the copies are let go."""
    row = held.row
    if held.reason is not None or family is None:
        row.reason = held.reason
        row.more = _seen_only(held)
        return row
    try:
        _add_up(held, family)
    except Exception as error:
        # Somebody else's code on copies that it was not written for: the run goes on, the report says what it was.
        row.sums = row.histogram = None
        row.reason, row.more = f"the replay raised {type(error).__name__}: {error}", _seen_only(held)
    if row.sums is not None and row.more is not None and not family.known:
        explained, seen = (float(row.more[figures.MORE.index(name)]) for name in ("explained", "seen"))
        if explained < _EXPLAINED * seen:
            row.reason = f"a replay in float64 comes near to {explained / seen:.0%} of the elements alone"
            row.sums = row.histogram = None
    held.pieces.clear()
    return row


def _add_up(held: Held, family: Family) -> None:
    row = held.row
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    more = torch.zeros(len(figures.MORE), dtype=torch.float64)
    histogram = torch.zeros(2, figures.BINS, dtype=torch.float64)
    fmt, v_format = format_of(row.param), family.v_format(held.options, row.param)
    after, state = family.parts(held.options, row.param), family.state(row.param)
    for piece in held.pieces:
        values = _values(held, piece, family, after, state)
        sums += figures.sums(values)
        more += figures.more(values, fmt, v_format, family.known)
        histogram += figures.histogram(values, fmt).cpu()
    # Runs that stand for the whole parameter.
    share = row.elements / max(1.0, float(more[figures.MORE.index("seen")]))
    row.sums, row.more, row.histogram = sums * share, more * share, histogram * share


def _values(held: Held, piece: Piece, family: Family, after: list[Tensor], state: dict[str, Any]) -> figures.Values:
    group, row = held.options, held.row
    new = [cut_part(part, row.elements, piece.start, piece.end, family) for part in after]
    storage = family.storage(group, row.param)
    # A low part that the step itself created held nothing before.
    before = storage if len(piece.parts) == len(new) else Rounded()
    old_value = before.exact(piece.parts).view_as(piece.grad)
    grad = piece.grad.to(torch.float64)
    value, replayed = family.intended(group, old_value, grad, widened(piece.state))
    u = _update(family, group, piece, old_value, value, grad)
    moved = storage.moved(new, piece.parts) if before is storage else storage.exact(new) - old_value.flatten()
    old_hi, new_hi = before.seen(piece.parts).view_as(u), storage.seen(new).view_as(u)
    decayed, lost = _decay(family, held, piece, new, old_value)
    return figures.Values(
        u,
        moved.view_as(u),
        new_hi - old_hi,
        old_hi,
        new_hi,
        _moments(piece, replayed, state, family),
        decayed,
        lost,
    )


def _update(family: Family, group: dict[str, Any], piece: Piece, old: Tensor, new: Tensor, grad: Tensor) -> Tensor:
    """New minus old; where even float64 saw nothing of the update beside the value, the update of a zero."""
    u = new - old
    if family.elementwise and bool(((u == 0) & (old != 0)).any()):
        alone, _ = family.intended(group, torch.zeros_like(old), grad, widened(piece.state))
        u = torch.where((u == 0) & (old != 0), alone, u)
    return u


def _decay(
    family: Family, held: Held, piece: Piece, new: list[Tensor], value: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Where weight decay acts and the step's bits could be repeated; where a step without it stores the same."""
    group, like = held.options, local(held.row.param)
    if piece.raw is None or not float(group.get("weight_decay") or 0) or not float(group["lr"]):
        return None, None
    again, without = (
        family.stored(group, piece.parts, piece.grad, piece.raw, like, **changed)
        for changed in ({}, {"weight_decay": 0.0})
    )
    storage = family.storage(group, held.row.param)
    flat = [[part.flatten() for part in parts] for parts in (again, without, new)]
    same = [(storage.moved(parts, flat[-1]) == 0).view_as(value) for parts in flat[:-1]]
    return (value != 0) & same[0], same[1]


def _seen_only(held: Held) -> Tensor | None:
    """Subnormal and saturated elements; what moved follows from the window."""
    values = local(held.row.param.detach())
    if not values.is_floating_point():
        return None
    info, size = torch.finfo(values.dtype), values.to(torch.float64).abs()
    row = dict.fromkeys(figures.MORE, 0.0) | {
        "subnormal": float(((size > 0) & (size < info.smallest_normal)).sum()),
        "saturated": float((size >= info.max).sum()),
        "seen": float(values.numel()),
    }
    return torch.tensor(list(row.values()), dtype=torch.float64)


def sampled(family: Family, held: Held, piece: Piece, weight: float) -> Sample:
    """What the step is to do with the elements of a piece, each of which stands for ``weight``."""
    group, row = held.options, held.row
    storage = family.storage(group, row.param)
    old = (storage if len(piece.parts) == len(storage.components(row.param.dtype)) else Rounded()).exact(piece.parts)
    old, grad = old.view_as(piece.grad), piece.grad.to(torch.float64)
    new, after = family.intended(group, old, grad, widened(piece.state))
    u = _update(family, group, piece, old, new, grad)

    def moment(name: str | None) -> tuple[Tensor, Tensor] | None:
        if name is None or name not in after:
            return None
        before = piece.state.get(name)
        before = torch.zeros_like(after[name]) if before is None else before.to(torch.float64)
        return before.flatten(), after[name].flatten()

    def update(m: Tensor, v: Tensor) -> Tensor:
        if not piece.state or second is None:
            return u.flatten()
        state = widened(piece.state) | {"exp_avg": m.view_as(old).clone(), second: v.view_as(old).clone()}
        return (family.intended(group, old, grad, state)[0] - old).flatten()

    second = second_moment(after)
    m, v = moment("exp_avg"), moment(second)
    return Sample(row.param, row.elements, weight, old.flatten(), u.flatten(), m, v, update)


def _moments(
    piece: Piece, replayed: dict[str, Any], state: dict[str, Any], family: Family
) -> tuple[Tensor, Tensor, Tensor] | None:
    name = second_moment(replayed)
    if name is None or name not in state or state[name].numel() == 0:
        return None
    stored = state[name].reshape(-1)[piece.start : piece.end] if family.elementwise else state[name]
    stored = stored.to(torch.float64)
    old = piece.state.get(name)
    return (torch.zeros_like(stored) if old is None else old.to(torch.float64), stored, replayed[name])

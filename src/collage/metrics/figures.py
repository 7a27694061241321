"""What one piece of a step adds to the figures: the sums of :data:`collage.kernels.SUMS` and those beyond them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collage.kernels import SUMS, total
from collage.numerics import Format

# Beyond SUMS; all are counts of elements but the first.
MORE = (
    "moved_squared",  # sum of e * e
    "seen",  # elements looked at
    "unchanged",  # of these, the stored value did not change
    "subnormal",  # the parameter that the model reads is subnormal
    "saturated",  # its magnitude is the format's largest, or it is infinite
    "v_positive",  # the intended v is > 0
    "v_subnormal",  # of these, the stored v is subnormal or 0
    "explained",  # the stored value is within a unit in the last place and a sixteenth of u of the intended one
    "decayed",  # weight decay acts: a decay rate, a value that is not 0, and the bits of the step could be repeated
    "lost_weight_decays",  # of these, a step without weight decay stores the same
)
# log2(|u| / ulp) in whole steps from _LOWEST on; what lies beyond is counted in the first and the last.
LOWEST, BINS = -32, 48


@dataclass(frozen=True)
class Values:
    """Float64 values of the elements of a piece, flat or not.

    Attributes:
        u: the intended update.
        moved: what the stored value moved.
        moved_hi: what the parameter that the model reads moved.
        old_hi, new_hi: that parameter.
        v: (old, stored, intended) second moment, or None.
        lost_decay: bool: where weight decay acts, whether a step without it stores the same; with ``decayed``, or None.
    """

    u: Tensor
    moved: Tensor
    moved_hi: Tensor
    old_hi: Tensor
    new_hi: Tensor
    v: tuple[Tensor, Tensor, Tensor] | None
    decayed: Tensor | None
    lost_decay: Tensor | None


def sums(piece: Values) -> Tensor:
    """The piece's row of :data:`collage.kernels.SUMS`, float64."""
    u, wanted = piece.u.flatten(), piece.u.flatten() != 0
    moved, moved_hi = piece.moved.flatten(), piece.moved_hi.flatten()
    decays = lost_decays = torch.zeros((), device=u.device)
    if piece.v is not None:
        old, stored, intended = (each.flatten() for each in piece.v)
        decaying = (old > 0) & (intended != old)
        decays, lost_decays = decaying.sum(), (decaying & (stored == old)).sum()
    row = {
        "moved_dot_update": total(moved * u),
        "moved_hi_dot_update": total(moved_hi * u),
        "update_dot_update": total(u * u),
        "updates": wanted.sum(),
        "lost": (wanted & (moved == 0)).sum(),
        "lost_hi": (wanted & (moved_hi == 0)).sum(),
        "decays": decays,
        "lost_decays": lost_decays,
    }
    return _stacked(row, SUMS)


def more(piece: Values, fmt: Format, v_format: Format | None, known: bool) -> Tensor:
    """The piece's row of :data:`MORE`, float64.

    Args:
        piece: its values.
        fmt: the parameter's format.
        v_format: that of the stored second moment, or None.
        known: whether the rule is known: all elements then count as explained.
    """
    size = piece.new_hi.abs()
    row = {
        "moved_squared": total((piece.moved * piece.moved).flatten()),
        "seen": torch.tensor(piece.u.numel()),
        "unchanged": (piece.moved == 0).sum(),
        "subnormal": ((size > 0) & (size < fmt.smallest_normal)).sum(),
        "saturated": (size >= fmt.max).sum(),
        "explained": torch.tensor(piece.u.numel()),
    }
    if not known:
        near = (piece.moved - piece.u).abs() <= fmt.ulp(piece.old_hi) + piece.u.abs() / 16
        row["explained"] = near.sum()
    if piece.v is not None and v_format is not None:
        _, stored, intended = piece.v
        row["v_positive"] = (intended > 0).sum()
        row["v_subnormal"] = ((intended > 0) & (stored < v_format.smallest_normal)).sum()
    if piece.decayed is not None and piece.lost_decay is not None:
        row["decayed"] = piece.decayed.sum()
        row["lost_weight_decays"] = (piece.decayed & piece.lost_decay).sum()
    return _stacked({name: row.get(name, torch.zeros(())) for name in MORE}, MORE)


def histogram(piece: Values, fmt: Format) -> Tensor:
    """float64 [2, BINS]: elements, and the sum of their u * u, by floor(log2(|u| / ulp)); the ulp is that of the
    parameter before the step. Elements with u = 0, and those that are not finite, are in none."""
    u = piece.u.flatten()
    # The ulp is a power of two: the quotient's exponent is the difference of theirs, whatever u's fraction.
    spacing = _exponent(piece.old_hi.flatten()).clamp_(min=fmt.emin) - (fmt.precision - 1)
    counted = (u != 0) & torch.isfinite(u) & torch.isfinite(piece.old_hi.flatten())
    place = (_exponent(u) - spacing - LOWEST).clamp_(0, BINS - 1)[counted]
    energy = u[counted] ** 2
    rows = (torch.bincount(place, minlength=BINS), torch.bincount(place, weights=energy, minlength=BINS))
    return torch.stack([row.to(torch.float64) for row in rows])


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|) of float64 numbers, from their bits; below every other for 0 and float64's subnormals."""
    return ((x.view(torch.int64) >> 52) & 0x7FF) - 1023


def _stacked(row: dict[str, Tensor], columns: tuple[str, ...]) -> Tensor:
    return torch.stack([row[name].to("cpu", torch.float64) for name in columns])

"""From a step's sums to the figures that people read (paper section 5).

With u the intended update and e what the stored value moved, over the elements of a set of parameters:

- edq = <e, u> / ||u||, effective descent quality, in the units of the parameters;
- edq_ratio = <e, u> / ||u||^2: 1 when nothing is lost;
- lost_fraction: of the elements with u != 0, the share whose stored value did not change; ``lost_fraction_hi`` counts
  the parameter that the model reads instead of the whole value;
- v_lost_fraction: of the elements with v > 0 and |b2 v + (1 - b2) g^2 - v| > 0, the share whose stored v did not
  change.

Those that come from outside the step beside them:

- decay_lost_fraction: of the elements on which weight decay acts (a rate and a value that are not 0), the share for
  which the same step without weight decay stores the same bits;
- unchanged_fraction: the share of all elements whose stored value did not change; displacement = ||e||;
- subnormal_fraction, saturated_fraction: of the parameter that the model reads, the share of elements below the
  format's smallest normal number (and not 0), and at its largest or beyond;
- v_subnormal_fraction: of the elements whose intended v is > 0, the share whose stored v is subnormal or 0;
- update_ulps: elements, and their share of ||u||^2, by floor(log2(|u| / ulp)), with the spacing of the format at the
  parameter that the model reads. An update below -1 is less than half a unit.

A figure whose denominator is zero is None, not 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from collage.kernels import SUMS
from collage.metrics.copies import Row
from collage.metrics.figures import LOWEST, MORE


class UpdateUlps(TypedDict):
    """A histogram of |u| in units in the last place.

    ``log2`` names the bins from the first to the last that is not empty.
    """

    log2: list[int]
    elements: list[float]
    energy: list[float]


class BaseRecord(TypedDict):
    """The figures of a set of parameters at one step."""

    step: int
    edq: float | None
    edq_ratio: float | None
    lost_fraction: float | None
    lost_fraction_hi: float | None
    v_lost_fraction: float | None
    update_norm: float
    elements: int


class Record(BaseRecord, total=False):
    """The same with what comes from outside the step, where it was looked at.

    ``replayed`` is False if the intended update of some parameters is not known; ``reasons`` then says why, and the
    figures about updates are those of the others.
    """

    replayed: bool
    reasons: list[str]
    decay_lost_fraction: float | None
    unchanged_fraction: float | None
    displacement: float
    subnormal_fraction: float | None
    saturated_fraction: float | None
    v_subnormal_fraction: float | None
    update_ulps: UpdateUlps


def record(step: int, sums: Tensor, elements: int) -> Record:
    """The figures of one step.

    Args:
        step: the step's number, from 1.
        sums: float64 tensor of :data:`collage.kernels.SUMS`, added up over the parameters.
        elements: number of elements of the parameters.
    """
    s = dict(zip(SUMS, sums.to("cpu", torch.float64).tolist(), strict=True))
    norm = math.sqrt(s["update_dot_update"]) if s["update_dot_update"] >= 0 else math.nan
    return Record(
        step=step,
        edq=_ratio(s["moved_dot_update"], norm),
        edq_ratio=_ratio(s["moved_dot_update"], s["update_dot_update"]),
        lost_fraction=_ratio(s["lost"], s["updates"]),
        lost_fraction_hi=_ratio(s["lost_hi"], s["updates"]),
        v_lost_fraction=_ratio(s["lost_decays"], s["decays"]),
        update_norm=norm,
        elements=elements,
    )


def record_of(step: int, rows: Sequence[Row]) -> Record:
    """The figures of some parameters at one step; those from outside the step if any parameter was looked at."""
    sums = [row.sums.to("cpu", torch.float64) for row in rows if row.sums is not None]
    found = record(step, _added(sums, len(SUMS)), sum(row.elements for row in rows))
    more = [row.more for row in rows if row.more is not None]
    if not more:
        return found
    m = dict(zip(MORE, _added(more, len(MORE)).tolist(), strict=True))
    reasons = sorted({row.reason for row in rows if row.reason is not None})
    found["replayed"] = not reasons
    if reasons:
        found["reasons"] = reasons
    found["decay_lost_fraction"] = _ratio(m["lost_weight_decays"], m["decayed"])
    found["unchanged_fraction"] = _ratio(m["unchanged"], m["seen"])
    found["displacement"] = math.sqrt(m["moved_squared"]) if m["moved_squared"] >= 0 else math.nan
    found["subnormal_fraction"] = _ratio(m["subnormal"], m["seen"])
    found["saturated_fraction"] = _ratio(m["saturated"], m["seen"])
    found["v_subnormal_fraction"] = _ratio(m["v_subnormal"], m["v_positive"])
    histograms = [row.histogram for row in rows if row.histogram is not None]
    if histograms:
        found["update_ulps"] = _histogram(torch.stack(histograms).sum(0))
    return found


def _histogram(counts: Tensor) -> UpdateUlps:
    places = counts[0].nonzero().flatten().tolist()
    first, last = (places[0], places[-1] + 1) if places else (0, 0)
    elements, energy = counts[:, first:last].tolist()
    whole = sum(energy)
    return UpdateUlps(
        log2=list(range(LOWEST + first, LOWEST + last)),
        elements=elements,
        energy=[each / whole if whole else 0.0 for each in energy],
    )


def _added(rows: list[Tensor], columns: int) -> Tensor:
    return torch.stack(rows).sum(0) if rows else torch.zeros(columns, dtype=torch.float64)


def _ratio(numerator: float, denominator: float) -> float | None:
    return None if denominator == 0 else numerator / denominator

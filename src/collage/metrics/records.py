"""From a step's sums to the figures that people read (paper section 5).

With u the intended update and e what the stored value moved, over the elements of a set of parameters:

- edq = <e, u> / ||u||, effective descent quality, in the units of the parameters;
- edq_ratio = <e, u> / ||u||^2: 1 when nothing is lost;
- lost_fraction: of the elements with u != 0, the share whose stored value did not change; ``lost_fraction_hi`` counts
  the parameter that the model reads instead of the whole value;
- v_lost_fraction: of the elements with v > 0 and |b2 v + (1 - b2) g^2 - v| > 0, the share whose stored v did not
  change.

A figure whose denominator is zero is None, not 1.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from collage.kernels import SUMS


class Record(TypedDict):
    """The figures of a set of parameters at one step."""

    step: int
    edq: float | None
    edq_ratio: float | None
    lost_fraction: float | None
    lost_fraction_hi: float | None
    v_lost_fraction: float | None
    update_norm: float
    elements: int


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


def _ratio(numerator: float, denominator: float) -> float | None:
    return None if denominator == 0 else numerator / denominator

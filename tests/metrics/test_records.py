"""From sums to figures."""

from __future__ import annotations

import math

import pytest
import torch

from collage.kernels import SUMS
from collage.metrics import record


def figures(**sums: float) -> dict:
    values = torch.tensor([sums.get(name, 0.0) for name in SUMS], dtype=torch.float64)
    return dict(record(7, values, 100))


def test_the_figures_are_the_papers_quotients() -> None:
    assert figures(
        moved_dot_update=3.0, moved_hi_dot_update=1.0, update_dot_update=4.0, updates=80, lost=20, lost_hi=60,
        decays=50, lost_decays=5,
    ) == {
        "step": 7,
        "edq": 1.5,
        "edq_ratio": 0.75,
        "lost_fraction": 0.25,
        "lost_fraction_hi": 0.75,
        "v_lost_fraction": 0.1,
        "update_norm": 2.0,
        "elements": 100,
    }  # fmt: skip


def test_figures_without_a_denominator_are_none_not_one() -> None:
    found = figures()
    assert all(found[name] is None for name in found if name not in ("step", "elements", "update_norm"))
    assert found["update_norm"] == 0.0
    only_v = figures(decays=4, lost_decays=4)
    assert (only_v["v_lost_fraction"], only_v["edq_ratio"], only_v["lost_fraction"]) == (1.0, None, None)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_update_that_is_not_finite_shows_and_raises_nothing(bad: float) -> None:
    found = figures(moved_dot_update=bad, update_dot_update=bad, updates=3)
    assert not math.isfinite(found["update_norm"])
    assert math.isnan(found["edq_ratio"])

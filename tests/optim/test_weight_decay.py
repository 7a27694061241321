"""Weight decay alone, lr * weight_decay = 1e-5 for 5,000 steps: who delivers (1 - 1e-5)^5000 = .95123."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import collage

STARTS = [1.0, 1.25, 0.75, 0.02]
STEPS = 5_000
EXACT = (1 - 1e-5) ** STEPS


def factors(
    strategy: str, arithmetic: str = "fp32", dtype: torch.dtype = torch.bfloat16, count: int = 512, steps: int = STEPS
) -> list[float]:
    """What is left of each start after zero gradients, as a share of it: the mean over ``count`` elements."""
    param = nn.Parameter(torch.tensor(STARTS, dtype=torch.float64).repeat_interleave(count).to(dtype))
    start = param.detach().double()
    opt = collage.AdamW([param], lr=1e-3, weight_decay=1e-2, eps=1e-6, strategy=strategy, arithmetic=arithmetic)
    param.grad = torch.zeros_like(param)
    for _ in range(steps):
        opt.step()
    return (opt.full_param(param, torch.float64) / start).view(len(STARTS), count).mean(1).tolist()


def test_the_exact_factor_is_the_issues() -> None:
    assert round(EXACT, 5) == 0.95123


@pytest.mark.parametrize(
    ("strategy", "dtype"), [("light", torch.bfloat16), ("plus", torch.bfloat16), ("light", torch.float16)]
)
def test_an_unbiased_low_part_delivers_weight_decay_from_every_start(strategy: str, dtype: torch.dtype) -> None:
    for factor in factors(strategy, dtype=dtype):
        assert factor == pytest.approx(0.9512, abs=3e-4)


def test_a_master_copy_delivers_it_too() -> None:
    assert factors("mixed", count=1) == pytest.approx([EXACT] * 4, abs=1e-4)


@pytest.mark.parametrize(("arithmetic", "steps"), [("fp32", STEPS), ("working", 50)])
def test_plain_loses_all_of_it(arithmetic: str, steps: int) -> None:
    # A step that changes nothing is followed by no other: few show what many would.
    assert factors("plain", arithmetic, count=1, steps=steps) == [1.0] * 4


# Deterministic, so that a single element says what all do: what the others deliver, as the documentation shows it.
DELIVERED = {
    ("kahan", "fp32"): [0.95571, 0.99687, 0.99740, 0.99695],
    ("light-nearest", "fp32"): [0.95592, 0.94347, 0.94933, 0.94455],
    ("light-nearest", "working"): [0.95572, 0.99687, 0.99740, 0.99695],
}


@pytest.mark.parametrize(("strategy", "arithmetic"), DELIVERED)
def test_to_nearest_the_delivery_depends_on_where_the_low_part_stalls(strategy: str, arithmetic: str) -> None:
    found = factors(strategy, arithmetic, count=1)
    assert found == pytest.approx(DELIVERED[strategy, arithmetic], abs=1e-5)
    assert max(abs(factor - EXACT) for factor in found) > 4e-3

"""The second moment against the exact moving average: noise, constant gradients, both arithmetics, every beta2."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import collage

COUNT = 512
# 5,000 where the average needs them; the others are steady long before.
STEPS = {0.9: 300, 0.95: 500, 0.98: 1000, 0.99: 2000, 0.999: 5000}
WORKING_STEPS = {0.9: 200, 0.95: 250, 0.98: 500, 0.99: 1000, 0.999: 5000}


@cache
def gradients() -> tuple[torch.Generator, Tensor]:
    generator = torch.Generator()
    generator.manual_seed(1)
    return generator, torch.rand(COUNT, generator=generator, dtype=torch.float64).mul(1.5).add(0.5).to(torch.bfloat16)


def track(strategy: str, arithmetic: str, beta2: float, steps: int) -> tuple[float, Tensor]:
    """The held v over the exact one, less 1: for the sum over noisy elements, and for each constant element."""
    param = nn.Parameter(torch.zeros(2 * COUNT, dtype=torch.bfloat16))
    opt = collage.AdamW([param], lr=0.0, weight_decay=0.0, betas=(0.9, beta2), strategy=strategy, arithmetic=arithmetic)
    generator, constant = gradients()
    generator.manual_seed(2)
    exact = torch.zeros(2 * COUNT, dtype=torch.float64)
    for _ in range(steps):
        noise = torch.randn(COUNT, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        param.grad = torch.cat([noise, constant])
        opt.step()
        exact.mul_(beta2).add_(param.grad.double() ** 2 * (1 - beta2))
    state = opt.state[param]
    held = state["exp_avg_sq"].double()
    if "exp_avg_sq_lo" in state:
        held = held + state["exp_avg_sq_lo"].double()
    noisy = (held[:COUNT].sum() / exact[:COUNT].sum() - 1).item()
    return noisy, held[COUNT:] / exact[COUNT:] - 1


@pytest.mark.parametrize("beta2", STEPS)
def test_plus_follows_the_exact_average(beta2: float) -> None:
    noisy, constant = track("plus", "fp32", beta2, STEPS[beta2])
    assert abs(noisy) < 2e-4
    assert constant.abs().max() < 1e-3
    assert abs(constant.mean()) < 1e-4


@pytest.mark.parametrize("beta2", WORKING_STEPS)
def test_plus_in_working_arithmetic_follows_noise_and_stalls_on_constants_at_slow_decay(beta2: float) -> None:
    noisy, constant = track("plus-nearest", "working", beta2, WORKING_STEPS[beta2])
    assert abs(noisy) < 1.5e-3
    mean = constant.mean().item()
    if beta2 <= 0.98:
        assert abs(mean) < 1e-3
    elif beta2 == 0.99:
        assert -2.5e-3 < mean < -1e-3
    else:
        assert -1.2e-2 < mean < -5e-3


def test_to_nearest_the_low_part_follows_noise_but_stalls_on_constants_later() -> None:
    noisy, constant = track("plus-nearest", "fp32", 0.999, 7_500)
    assert abs(noisy) < 2e-4
    assert -6e-3 < constant.mean() < -3e-3


def test_plain_is_far_off_at_slow_decay_and_near_at_fast() -> None:
    noisy, constant = track("plain", "fp32", 0.999, 2_000)
    assert noisy > 0.1
    assert constant.mean() < -0.3
    noisy, _ = track("plain", "fp32", 0.95, 300)
    assert abs(noisy) < 0.01

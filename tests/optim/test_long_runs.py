"""What thousands of small steps add up to: weight decay alone, and the second moment against the exact average."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import collage

STARTS = (1.0, 1.25, 0.75, 0.02)
EXACT = (1 - 1e-5) ** 5000
REPEATS = 256


@cache
def decayed(strategy: str, arithmetic: str = "fp32", steps: int = 5000) -> tuple[float, ...]:
    """Share of each start that is left after steps with gradients of zero and lr * weight_decay = 1e-5: mean over equal
    elements, which differ by their random bits alone."""
    param = nn.Parameter(torch.tensor(STARTS).repeat_interleave(REPEATS).to(torch.bfloat16))
    opt = collage.AdamW([param], lr=1e-4, weight_decay=0.1, strategy=strategy, arithmetic=arithmetic)
    before = opt.full_param(param, torch.float64)
    param.grad = torch.zeros_like(param)
    for _ in range(steps):
        opt.step()
    left = opt.full_param(param, torch.float64) / before
    return tuple(left.view(len(STARTS), REPEATS).mean(1).tolist())


def test_the_exact_factor_is_the_documented_one() -> None:
    assert pytest.approx(0.95123, abs=5e-6) == EXACT


@pytest.mark.parametrize("strategy", ["light", "plus"])
def test_weight_decay_alone_is_delivered_from_every_start(strategy: str) -> None:
    assert decayed(strategy) == pytest.approx([EXACT] * 4, abs=3e-4)


# As docs/strategies.md states. The update of every step is the same number, so lo to nearest errs to one side for long.
OTHERS = {
    ("plain", "fp32"): (1.0, 1.0, 1.0, 1.0),
    ("light-nearest", "fp32"): (0.9559, 0.9435, 0.9493, 0.9446),
    ("kahan", "fp32"): (0.9557, 0.9969, 0.9974, 0.9970),
}


@pytest.mark.parametrize(("strategy", "arithmetic"), OTHERS, ids=["-".join(key) for key in OTHERS])
def test_weight_decay_alone_in_the_strategies_to_nearest_delivers_the_documented_part(
    strategy: str, arithmetic: str
) -> None:
    assert decayed(strategy, arithmetic) == pytest.approx(OTHERS[strategy, arithmetic], abs=5e-5)


def test_weight_decay_alone_is_delivered_on_average_when_the_parameter_is_rounded_stochastically() -> None:
    # One element wanders by .017 of the weight; the mean of 256 by .001.
    assert decayed("stochastic") == pytest.approx([EXACT] * 4, abs=4e-3)


def test_weight_decay_alone_stalls_in_working_arithmetic_once_it_is_below_half_an_ulp_of_lo() -> None:
    # From 1.25, .75 and .02; from 1.0 it goes on, because 1.0 leaves its binade at once.
    early, late = (decayed("light-nearest", "working", steps) for steps in (500, 1000))
    assert early[1:] == late[1:] == pytest.approx([0.9969, 0.9974, 0.9970], abs=5e-5)
    assert late[0] < early[0]


# ---- the second moment ---------------------------------------------------------------------------------------------

HALF = 256
# Twenty time constants of the average: what came before weighs 2e-9. The documentation's table has 5,000 for each.
STEPS = {0.9: 200, 0.95: 400, 0.98: 1000, 0.99: 2000, 0.999: 5000}
every_beta2 = pytest.mark.parametrize("beta2", STEPS)


@cache
def second_moment(
    strategy: str, beta2: float, arithmetic: str = "fp32", steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Stored v, exact v (float64), and the low part's ulp, after noise (first half) and constant gradients (second)."""
    param = nn.Parameter(torch.zeros(2 * HALF, dtype=torch.bfloat16))
    opt = collage.AdamW([param], betas=(0.9, beta2), weight_decay=0.0, strategy=strategy, arithmetic=arithmetic)
    generator = torch.Generator().manual_seed(1)
    constant = torch.logspace(-3, 0, HALF, dtype=torch.float64)
    exact = torch.zeros(2 * HALF, dtype=torch.float64)
    for _ in range(steps or STEPS[beta2]):
        noise = torch.randn(HALF, generator=generator, dtype=torch.float64) * 0.1
        param.grad = torch.cat([noise, constant]).to(torch.bfloat16)
        opt.step()
        exact = beta2 * exact + (1 - beta2) * param.grad.double() ** 2
    state = opt.state[param]
    low = state.get("exp_avg_sq_lo", torch.zeros_like(param))
    return state["exp_avg_sq"].double() + low.double(), exact, low


def sum_error(stored: Tensor, exact: Tensor) -> float:
    """Relative error of the sum over the noisy elements."""
    return (stored[:HALF].sum() / exact[:HALF].sum() - 1).item()


def element_errors(stored: Tensor, exact: Tensor) -> Tensor:
    """Relative errors of the elements with constant gradients."""
    return (stored / exact - 1)[HALF:]


@every_beta2
def test_v_of_plus_follows_the_exact_average(beta2: float) -> None:
    stored, exact, _ = second_moment("plus", beta2)
    assert abs(sum_error(stored, exact)) < 2e-4
    assert element_errors(stored, exact).abs().max() < 1e-3


@every_beta2
def test_v_of_plus_in_working_arithmetic_follows_noise(beta2: float) -> None:
    stored, exact, _ = second_moment("plus-nearest", beta2, "working")
    assert abs(sum_error(stored, exact)) < 1.5e-3


def test_v_of_plus_in_working_arithmetic_stalls_under_constant_gradients() -> None:
    means = {
        b: element_errors(*second_moment("plus-nearest", b, "working")[:2]).mean().item() for b in (0.9, 0.99, 0.999)
    }
    assert abs(means[0.9]) < 1e-3
    assert means[0.99] == pytest.approx(-0.0017, abs=5e-4)
    assert means[0.999] == pytest.approx(-0.008, abs=1e-3)


def test_lo_to_nearest_stalls_later_where_lo_unbiased_does_not() -> None:
    at_5000, at_10000 = (second_moment("plus-nearest", 0.999, steps=steps) for steps in (5000, 10_000))
    unbiased = second_moment("plus", 0.999)
    assert element_errors(*at_5000[:2]).abs().max() < 1e-3
    errors = element_errors(*at_10000[:2])
    assert errors.max() < -1e-3
    assert errors.min().item() == pytest.approx(-0.0075, abs=5e-4)
    assert element_errors(*unbiased[:2]).mean().abs() < 1e-4


def test_v_without_a_low_part_is_too_large_under_noise_and_too_small_under_constant_gradients() -> None:
    stored, exact, _ = second_moment("light", 0.999)
    assert sum_error(stored, exact) > 0.5
    assert element_errors(stored, exact).mean() < -0.6
    enough, exact, _ = second_moment("light", 0.98)
    assert abs(sum_error(enough, exact)) < 0.01


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("strategy", "arithmetic"), [("plus", "fp32"), ("plus-nearest", "working")])
def test_v_has_the_same_bits_under_any_default_dtype(strategy: str, arithmetic: str, default: torch.dtype) -> None:
    usual = second_moment.__wrapped__(strategy, 0.999, arithmetic, 50)
    torch.set_default_dtype(default)
    other = second_moment.__wrapped__(strategy, 0.999, arithmetic, 50)
    assert torch.equal(other[0], usual[0])
    assert torch.equal(other[2], usual[2])

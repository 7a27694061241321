"""The verdict: which words for which figures, and what a schedule has in store."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import collage
from collage.metrics.schedules import learning_rates
from collage.metrics.verdict import kept, stops_after
from comparing import values


def audited(make: Any, steps: int = 3, spread: float = 0.05, dtype: torch.dtype = torch.bfloat16) -> collage.Audit:
    """An audit of two modules: the weights of "norm" are all 1, those of "head" small."""
    norm, head = nn.Parameter(torch.ones(400, dtype=dtype)), nn.Parameter(values((20, 40), 1, dtype, spread=1e-3))
    opt = make([("norm.weight", norm), ("head.weight", head)])
    audit = collage.audit(opt, every=1, details=True)
    for seed in range(1, steps + 1):
        norm.grad, head.grad = values((400,), seed, dtype, spread), values((20, 40), seed + 50, dtype, spread)
        opt.step()
    return audit


def test_a_module_that_loses_is_named_with_the_share_the_remedy_and_its_bytes() -> None:
    lines = audited(lambda p: torch.optim.AdamW(p, lr=1e-4)).verdict()
    assert len(lines) == 1
    assert lines[0].startswith("norm: 100 % of updates lost (EDQ ratio 0.00), weight decay without effect on 100 %")
    assert lines[0].endswith("; light would keep them at 2 more bytes per parameter")


def test_of_collages_own_optimizer_the_bytes_are_those_beyond_its_strategy() -> None:
    lines = audited(lambda p: collage.AdamW(p, lr=1e-4, strategy="fp32-states")).verdict()
    assert lines[0].endswith("; light would keep them")
    lines = audited(lambda p: collage.AdamW(p, lr=1e-4, strategy="plain"), steps=30).verdict()
    assert "the second moment stands still in" in lines[0]
    assert lines[0].endswith("at beta2 = 0.999; plus would keep them at 4 more bytes per parameter")


def test_another_rule_than_adams_is_sent_to_the_wrapper() -> None:
    lines = audited(lambda p: torch.optim.SGD(p, lr=1e-3)).verdict()
    assert lines[0].startswith("norm: ")
    assert "collage.Compensated round the optimizer would keep them at 2 more bytes per parameter" in lines[0]


@pytest.mark.parametrize("strategy", ["plus", "mixed", "exact"])
def test_where_nothing_is_lost_one_line_says_so(strategy: str) -> None:
    [line] = audited(lambda p: collage.AdamW(p, lr=1e-4, weight_decay=0.1, strategy=strategy), steps=5).verdict()
    assert line.startswith("nothing is lost: EDQ ratio ")


def test_float32_parameters_have_nothing_to_lose() -> None:
    audit = audited(lambda p: torch.optim.AdamW(p, lr=1e-4), dtype=torch.float32)
    assert audit.verdict(schedule=lambda step: 1e-9, last_step=10) == ["nothing is lost: EDQ ratio 1.000"]


def test_underflow_and_overflow_have_their_own_words() -> None:
    half = audited(lambda p: torch.optim.AdamW(p, lr=1e-3), dtype=torch.float16, spread=1e-3)
    assert all(
        "the second moment of " in line and " underflows; strategy fp16 would" in line for line in half.verdict()
    )
    param = nn.Parameter(torch.tensor([torch.inf, 1.0, 1.0, 1.0], dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    opt = torch.optim.SGD([("a.weight", param)], lr=1.0)
    audit = collage.audit(opt, every=1)
    opt.step()
    assert audit.verdict() == [
        "a: 25 % of the weights at the largest number or beyond; look at the learning rate, the clipping and the loss "
        "scale"
    ]


def test_what_was_not_replayed_is_said() -> None:
    param = nn.Parameter(torch.ones(4))
    opt = torch.optim.LBFGS([param])
    audit = collage.audit(opt, every=1)
    param.grad = torch.zeros(4)
    opt.step(lambda: torch.zeros(()))  # type: ignore[arg-type]
    [line] = audit.verdict()
    assert line == (
        "all parameters: the intended update is not known (LBFGS reevaluates the model within a step); 100 % of the "
        "elements did not move"
    )


def test_without_an_update_there_is_nothing_to_judge() -> None:
    param = nn.Parameter(torch.ones(4))
    opt = torch.optim.SGD([param], lr=0.1)
    audit = collage.audit(opt, every=1)
    with pytest.raises(RuntimeError, match="no step has been audited yet"):
        audit.verdict()
    param.grad = torch.zeros(4)
    opt.step()
    assert audit.verdict() == ["no update to judge"]


# ---- what a schedule has in store ------------------------------------------------------------------------------------


def test_the_kept_share_is_that_of_updates_of_half_a_unit_or_more() -> None:
    histogram = {"log2": [-2, -1, 0], "elements": [1.0, 1.0, 1.0], "energy": [0.2, 0.3, 0.5]}
    assert kept(histogram, 1.0) == pytest.approx(0.8)  # type: ignore[arg-type]
    assert kept(histogram, 2.0) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert kept(histogram, 0.25) == pytest.approx(0.0)  # type: ignore[arg-type]
    assert kept(histogram, 2**-1.5) == pytest.approx(0.25)  # type: ignore[arg-type]
    assert kept(histogram, 0.0) == 0.0  # type: ignore[arg-type]


def test_the_step_from_which_a_run_stands_still_is_the_last_that_learns() -> None:
    histogram = {"log2": [0], "elements": [1.0], "energy": [1.0]}
    # From half a unit down to a quarter the one bin is lost bit by bit.
    factors = [1.0, 0.1, 1.0, 0.5, 0.25, 0.1]
    assert stops_after(histogram, factors, first=11) == 14  # type: ignore[arg-type]
    assert stops_after(histogram, factors[:3], first=11) is None  # type: ignore[arg-type]
    assert stops_after(histogram, [0.1], first=11) == 10  # type: ignore[arg-type]


def test_the_forecast_is_where_a_plain_run_of_that_schedule_stops() -> None:
    def rate(step: int) -> float:
        return 1e-2 * 0.9 ** (step - 1)

    param = nn.Parameter(torch.full((500,), 1.5, dtype=torch.bfloat16))
    opt = torch.optim.AdamW([param], lr=rate(1), weight_decay=0.0)
    audit = collage.audit(opt, every=10)
    moved, lines = [], []
    for step in range(1, 81):
        opt.param_groups[0]["lr"] = rate(step)
        param.grad = torch.full_like(param, 0.1)
        before = param.detach().clone()
        opt.step()
        moved.append(not torch.equal(before, param))
        if step == 10:
            lines = audit.verdict(schedule=rate, last_step=80)
    last = max(step for step, each in enumerate(moved, 1) if each)
    [found] = [int(line.split(" after step ")[1].split(":")[0]) for line in lines if "stops learning" in line]
    # Half a unit of 1.5 is 2^-8 = lr; within a binade the histogram knows the updates to a factor of two: 7 steps.
    assert abs(found - last) <= 7
    assert 0 < last < 20


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12, eta_min=1e-3),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=20),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
    ],
    ids=["lambda", "cosine", "one cycle", "sequential"],
)
def test_a_schedulers_rates_are_known_in_advance_and_it_is_not_moved(make: Any) -> None:
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    scheduler = make(opt)
    for _ in range(2):
        opt.step()
        scheduler.step()
    before = copy.deepcopy((scheduler.state_dict(), opt.param_groups[0]["lr"]))
    foreseen = learning_rates(scheduler, 3, 12)
    assert (scheduler.state_dict(), opt.param_groups[0]["lr"]) == before
    came = []
    for _ in range(10):
        came.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    assert foreseen == came


def test_a_schedule_is_a_function_or_a_scheduler_that_needs_no_metric() -> None:
    assert learning_rates(lambda step: step / 10, 3, 5) == [0.3, 0.4, 0.5]
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)

    class Holder:
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)

    assert learning_rates(Holder(), 1, 2) == [0.1, 0.05]
    with pytest.raises(TypeError, match="follows a metric that is not known in advance"):
        learning_rates(lr_scheduler.ReduceLROnPlateau(opt), 1, 2)
    with pytest.raises(TypeError, match="schedule must be a function of the step or a torch LRScheduler, got int"):
        learning_rates(3, 1, 2)
    audit = audited(lambda p: torch.optim.SGD(p, lr=1e-3))
    with pytest.raises(ValueError, match="needs last_step"):
        audit.verdict(schedule=lambda step: 0.1)
    assert not math.isnan(audit.report()["total"]["update_norm"])

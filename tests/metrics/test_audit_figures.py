"""The audit's figures against exact counts, and that it observes without touching the step."""

from __future__ import annotations

import gc
import math
import random
import weakref
from fractions import Fraction

import pytest
import torch
from torch import nn

import collage
from collage.kernels import SUMS
from collage.metrics import record
from collage.numerics import random_bits
from comparing import LOW, STRATEGIES, assert_same, dtype_of, values
from step_oracle import STRATEGIES as WORDS
from step_oracle import Element, Hyper, nearest

FIELDS = {"step", "edq", "edq_ratio", "lost_fraction", "lost_fraction_hi", "v_lost_fraction", "update_norm", "elements"}


def whole(element: Element) -> Fraction:
    if element.words.param == "master":
        return Fraction(element.extra)
    return Fraction(element.param) + Fraction(element.extra)


def exact_figures(
    elements: list[Element], grads: list[float], hyper: Hyper, draws: list[list[int]]
) -> dict[str, float]:
    """Steps the oracle's elements and counts what happened with rationals."""
    edq, edq_hi, uu = Fraction(0), Fraction(0), Fraction(0)
    updates = lost = lost_hi = decays = lost_decays = 0
    b2 = Fraction(hyper.beta2)
    for i, (element, grad) in enumerate(zip(elements, grads, strict=True)):
        p, hi, v = whole(element), Fraction(element.param), Fraction(element.v) + Fraction(element.v_lo)
        u = Fraction(element.step_fp32(grad, hyper, lambda draw, i=i: draws[draw][i]))
        e, e_hi = whole(element) - p, Fraction(element.param) - hi
        edq, edq_hi, uu = edq + e * u, edq_hi + e_hi * u, uu + u * u
        updates += u != 0
        lost += u != 0 and e == 0
        lost_hi += u != 0 and e_hi == 0
        decaying = v > 0 and b2 * v + (1 - b2) * Fraction(grad) ** 2 != v
        decays += decaying
        lost_decays += decaying and Fraction(element.v) + Fraction(element.v_lo) == v
    return {
        "edq": float(edq) / math.sqrt(uu),
        "edq_ratio": float(edq / uu),
        "lost_fraction": lost / updates,
        "lost_fraction_hi": lost_hi / updates,
        "v_lost_fraction": lost_decays / decays if decays else None,
        "update_norm": math.sqrt(uu),
    }  # type: ignore[return-value]


@pytest.mark.parametrize("lr", [1e-2, 1e-5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_figures_are_the_exact_counts(strategy: str, lr: float) -> None:
    rng = random.Random(f"{strategy} {lr}")
    dtype, fmt = dtype_of(strategy), "fp32" if strategy == "fp32" else "bf16"
    hyper = Hyper(lr=lr, weight_decay=0.0)
    start = [nearest(rng.gauss(0, 0.1), fmt) for _ in range(40)]
    param = nn.Parameter(torch.tensor(start, dtype=torch.float64).to(dtype))
    opt = collage.AdamW([param], lr=lr, weight_decay=0.0, strategy=strategy)
    audit = collage.audit(opt, every=1)
    words = WORDS["plain"] if strategy == "fp32" else WORDS[strategy]
    elements = [Element(words, fmt, value) for value in start]
    for step in range(1, 5):
        # The last ten never have a gradient: u = 0 there.
        grads = [nearest(rng.gauss(0, 1), fmt) for _ in range(30)] + [0.0] * 10
        draws = [random_bits(0, 0, step, 0, 40, number).tolist() for number in (0, 1)]
        wanted = exact_figures(elements, grads, hyper, draws)
        param.grad = torch.tensor(grads, dtype=torch.float64).to(dtype)
        opt.step()
        found = audit.report()["total"]
        assert set(found) == FIELDS
        assert (found["step"], found["elements"]) == (step, 40)
        for name, value in wanted.items():
            assert found[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-15)), name


def audited(strategy: str, lr: float = 1e-3, steps: int = 5, **options) -> tuple[collage.AdamW, collage.Audit]:
    param = nn.Parameter(values((2000,), 0, dtype_of(strategy), spread=0.02))
    opt = collage.AdamW([param], lr=lr, strategy=strategy, **options)
    audit = collage.audit(opt, every=1)
    for seed in range(steps):
        param.grad = values((2000,), seed + 1, param.dtype)
        opt.step()
    return opt, audit


@pytest.mark.parametrize("strategy", ["fp32", "mixed", "light", "plus"])
def test_nothing_is_lost_in_float32_and_in_expansions(strategy: str) -> None:
    total = audited(strategy)[1].report()["total"]
    assert total["edq_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert total["lost_fraction"] < 1e-3


def test_plain_loses_the_decay_of_a_slow_second_moment_and_plus_does_not() -> None:
    losses = {}
    for strategy in ("plain", "plus"):
        opt, audit = audited(strategy, steps=60, betas=(0.9, 0.999))
        opt.param_groups[0]["params"][0].grad.zero_()
        opt.step()
        losses[strategy] = audit.report()["total"]["v_lost_fraction"]
    assert losses["plain"] == 1.0
    assert losses["plus"] < 0.05


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_figures_without_a_denominator_are_none(strategy: str) -> None:
    param = nn.Parameter(values((20,), 0, dtype_of(strategy)))
    opt = collage.AdamW([param], weight_decay=0.0, strategy=strategy)
    audit = collage.audit(opt, every=1)
    param.grad = torch.zeros_like(param)
    opt.step()
    total = audit.report()["total"]
    nulls = ("edq", "edq_ratio", "lost_fraction", "lost_fraction_hi", "v_lost_fraction")
    assert [total[name] for name in nulls] == [None] * 5
    assert (total["update_norm"], total["elements"], total["step"]) == (0.0, 20, 1)


@pytest.mark.parametrize("arithmetic", ["fp32", "working"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_audited_steps_are_bit_equal_to_steps_that_are_not(strategy: str, arithmetic: str) -> None:
    if arithmetic == "working" and not collage.strategies()[strategy].has_working_arithmetic:
        strategy = "plus-nearest"

    def run(audit: bool) -> collage.AdamW:
        params = [nn.Parameter(values(shape, i, dtype_of(strategy))) for i, shape in enumerate([(300,), (5, 6)])]
        opt = collage.AdamW(params, strategy=strategy, arithmetic=arithmetic)
        if audit:
            collage.audit(opt, every=2)
            collage.audit(opt, every=3)
        for seed in range(6):
            for i, param in enumerate(params):
                param.grad = values(tuple(param.shape), 10 * seed + i, param.dtype)
            opt.step()
        return opt

    assert_same(run(True), run(False))


@pytest.mark.parametrize("strategy", ["plus-nearest", "plain", "kahan"])
def test_working_arithmetic_is_audited_too(strategy: str) -> None:
    _, audit = audited(strategy, arithmetic="working", lr=1e-2)
    total = audit.report()["total"]
    assert total["edq_ratio"] == pytest.approx(1.0, abs=0.05)
    assert total["update_norm"] > 0


# ---- groups, modules, total ----------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(torch.bfloat16)


def step_network(net: nn.Module, opt: collage.AdamW, seed: int = 0) -> None:
    for i, param in enumerate(net.parameters()):
        param.grad = values(tuple(param.shape), seed + i, param.dtype)
    opt.step()


def added_up(records: list) -> tuple[float, float, int]:
    """update_norm^2, <e, u> and elements over records."""
    return (
        sum(r["update_norm"] ** 2 for r in records),
        sum((r["edq"] or 0.0) * r["update_norm"] for r in records),
        sum(r["elements"] for r in records),
    )


@pytest.mark.parametrize("by", ["named parameters", "model"])
def test_groups_and_modules_add_up_to_the_total(by: str) -> None:
    net = network()
    first, second = (list(part.named_parameters(prefix=str(i))) for i, part in enumerate(net.children()))
    pick = (lambda pairs: pairs) if by == "named parameters" else (lambda pairs: [p for _, p in pairs])
    opt = collage.AdamW([{"params": pick(first)}, {"params": pick(second), "lr": 0.1, "strategy": "mixed"}])
    audit = collage.audit(opt, every=1, model=net if by == "model" else None)
    step_network(net, opt)
    report = audit.report()
    assert list(report) == ["total", "groups", "modules"]
    assert list(report["modules"]) == ["0", "1"]
    assert [r["elements"] for r in report["groups"]] == [28, 15]
    for parts in (report["groups"], list(report["modules"].values())):
        assert added_up(parts) == pytest.approx(added_up([report["total"]]), rel=1e-12)
        assert all(r["step"] == 1 for r in parts)
    assert report["groups"][1] == report["modules"]["1"]


def test_without_names_there_are_no_modules_and_a_group_without_gradients_counts_nothing() -> None:
    net = network()
    weights, biases = [[p for p in net.parameters() if p.dim() == dim] for dim in (2, 1)]
    opt = collage.AdamW([{"params": weights}, {"params": biases}])
    audit = collage.audit(opt, every=1)
    for i, param in enumerate(weights):
        param.grad = values(tuple(param.shape), i)
    opt.step()
    report = audit.report()
    assert report["modules"] == {}
    assert report["groups"][0] == report["total"]
    assert (report["groups"][1]["elements"], report["groups"][1]["edq"]) == (0, None)


def test_a_parameter_of_the_root_module_is_named_after_itself() -> None:
    param = nn.Parameter(values((5,), 0))
    opt = collage.AdamW([("scale", param)])
    audit = collage.audit(opt, every=1)
    param.grad = values((5,), 1)
    opt.step()
    assert list(audit.report()["modules"]) == ["scale"]


@pytest.mark.parametrize("threads", [2, 3])
def test_the_figures_do_not_depend_on_the_thread_count(threads: int) -> None:
    def total(count: int):
        torch.set_num_threads(count)
        param = nn.Parameter(values((150_001,), 0))
        opt = collage.AdamW([param], strategy="light")
        audit = collage.audit(opt, every=1)
        param.grad = values((150_001,), 1)
        opt.step()
        return audit.report()["total"]

    assert total(threads) == total(1)


# ---- when ----------------------------------------------------------------------------------------------------------


def test_steps_that_every_divides_are_audited_and_every_may_change_during_a_run() -> None:
    net = network()
    opt = collage.AdamW(net.parameters())
    audit = collage.audit(opt, every=3)
    for step in range(1, 8):
        step_network(net, opt, step)
        assert audit.steps == [n for n in (3, 6) if n <= step]
    audit.every = 1
    step_network(net, opt, 8)
    audit.every = 5
    for step in (9, 10, 11):
        step_network(net, opt, step)
    assert audit.steps == [3, 6, 8, 10]
    assert audit.report()["total"]["step"] == 10


def test_fifty_is_the_default_interval() -> None:
    assert collage.audit(collage.AdamW(network().parameters())).every == 50


def test_before_the_first_audited_step_last_is_none_and_a_report_is_an_error_that_says_when() -> None:
    net = network()
    opt = collage.AdamW(net.parameters())
    audit = collage.audit(opt, every=4)
    step_network(net, opt)
    assert audit.last is None
    with pytest.raises(RuntimeError, match="with every=4 the first is step 4"):
        audit.report()
    audit.every = 2
    step_network(net, opt)
    assert audit.last == audit.report()


def test_a_detached_audit_keeps_what_it_saw_and_sees_no_more() -> None:
    net = network()
    opt = collage.AdamW(net.parameters())
    audit, other = collage.audit(opt, every=1), collage.audit(opt, every=1)
    step_network(net, opt)
    kept = audit.report()
    audit.detach()
    audit.detach()
    step_network(net, opt, 7)
    assert audit.report() == kept
    assert audit.steps == [1]
    assert other.steps == [1, 2]


def test_steps_that_nobody_audits_compute_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from collage.kernels import eager

    net = network()
    opt = collage.AdamW(net.parameters())
    collage.audit(opt, every=2)
    sums, calls = eager._sums, []
    monkeypatch.setattr(eager, "_sums", lambda *args: calls.append(1) or sums(*args))
    step_network(net, opt)
    assert calls == []
    step_network(net, opt)
    assert len(calls) == 4


@pytest.mark.parametrize("every", [0, -1, 2.5, "3", None])
def test_an_interval_that_is_no_positive_integer_is_refused(every) -> None:
    with pytest.raises(ValueError, match="every must be an integer >= 1, got"):
        collage.audit(collage.AdamW(network().parameters()), every=every)


def test_an_optimizer_within_a_wrapper_is_found_and_others_are_refused() -> None:
    class Wrapper:
        def __init__(self, optimizer) -> None:
            self.optimizer = optimizer

    opt = collage.AdamW(network().parameters())
    assert collage.audit(Wrapper(Wrapper(opt)), every=2).every == 2  # type: ignore[arg-type]
    for other in (torch.optim.AdamW(network().parameters()), Wrapper(torch.optim.SGD(network().parameters()))):
        with pytest.raises(TypeError, match=r"from collage's own step, got .*collage\.AdamW"):
            collage.audit(other)  # type: ignore[arg-type]


def test_a_copied_optimizer_is_not_watched_by_the_originals_audit() -> None:
    import copy

    net = network()
    opt = collage.AdamW(net.parameters())
    audit = collage.audit(opt, every=1)
    twin = copy.deepcopy(opt)
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    assert audit.steps == []


def test_a_detached_audit_lets_the_optimizer_go() -> None:
    audit = collage.audit(collage.AdamW(network().parameters()), every=1)
    watched = weakref.ref(audit)
    audit.detach()
    del audit
    gc.collect()
    assert watched() is None


# ---- the record ----------------------------------------------------------------------------------------------------


def test_a_record_divides_the_sums_as_defined() -> None:
    sums = dict(zip(SUMS, [6.0, 3.0, 9.0, 8.0, 2.0, 4.0, 5.0, 1.0], strict=True))
    found = record(7, torch.tensor(list(sums.values()), dtype=torch.float64), 11)
    assert found == {
        "step": 7,
        "edq": 2.0,
        "edq_ratio": 6.0 / 9.0,
        "lost_fraction": 0.25,
        "lost_fraction_hi": 0.5,
        "v_lost_fraction": 0.2,
        "update_norm": 3.0,
        "elements": 11,
    }


@pytest.mark.parametrize("strategy", LOW)
def test_an_overflown_update_gives_figures_that_are_not_numbers_but_no_error(strategy: str) -> None:
    param = nn.Parameter(values((10,), 0))
    opt = collage.AdamW([param], strategy=strategy)
    audit = collage.audit(opt, every=1)
    param.grad = values((10,), 1)
    param.grad[2] = torch.nan
    opt.step()
    assert math.isnan(audit.report()["total"]["edq"])

"""The audit: sums of the very step, against exact rationals; who is watched, when, and under which names."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from collage import kernels
from collage.kernels import SUMS, eager
from collage.metrics import Record
from collage.numerics import random_bits
from collage.optim import StepRow
from comparing import STRATEGIES, WORKING, Keeper, assert_same, dtype_of, values
from step_oracle import CASES, Arithmetic, Element, Hyper, nearest, scalars
from step_oracle import STRATEGIES as WORDS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def v_of(element: Element) -> Fraction:
    return Fraction(element.v) + Fraction(element.v_lo)


def exact_sums(
    before: list[Element], after: list[Element], updates: list[float], grads: list[float], beta2: float
) -> dict[str, Fraction]:
    """The sums by their definition (docs/audit.md), as rationals."""
    sums = dict.fromkeys(SUMS, Fraction(0))
    for old, new, update, grad in zip(before, after, updates, grads, strict=True):
        u, e, e_hi = Fraction(update), new.held - old.held, Fraction(new.param) - Fraction(old.param)
        decay = Fraction(beta2) * v_of(old) + (1 - Fraction(beta2)) * Fraction(grad) ** 2 - v_of(old)
        sums["moved_dot_update"] += e * u
        sums["moved_hi_dot_update"] += e_hi * u
        sums["update_dot_update"] += u * u
        sums["updates"] += u != 0
        sums["lost"] += u != 0 and e == 0
        sums["lost_hi"] += u != 0 and e_hi == 0
        sums["decays"] += v_of(old) > 0 and decay != 0
        sums["lost_decays"] += v_of(old) > 0 and decay != 0 and v_of(new) == v_of(old)
    return sums


def assert_sums(row: StepRow, exact: dict[str, Fraction]) -> None:
    """Counts exactly; sums, which are added up in float64, nearly."""
    found = dict(zip(SUMS, row.sums.tolist(), strict=True))
    for column in SUMS[3:]:
        assert found[column] == exact[column], column
    scale = float(exact["update_dot_update"])
    for column in SUMS[:3]:
        assert found[column] == pytest.approx(float(exact[column]), rel=1e-12, abs=1e-14 * scale), column


@pytest.mark.parametrize("lr", [1e-3, 1e-6])
@pytest.mark.parametrize(("name", "fmt"), CASES, ids=[f"{name}-{fmt}" for name, fmt in CASES])
def test_the_sums_of_a_step_are_the_exact_ones(name: str, fmt: str, lr: float) -> None:
    rng = random.Random(f"{name} {fmt} {lr}")

    def draw(low: float, high: float) -> float:
        return nearest(rng.choice([-1.0, 0.0, 1.0, 1.0, -1.0]) * 10 ** rng.uniform(low, high), fmt)

    start = [draw(-4, 1) for _ in range(60)]
    param = nn.Parameter(torch.tensor(start, dtype=torch.float64).to(DTYPES[fmt]))
    opt = collage.AdamW([param], lr=lr, weight_decay=0.01, strategy=name)
    keeper = Keeper()
    opt.add_observer(keeper)
    elements = [Element(WORDS["plain" if fmt == "fp32" else name], fmt, value) for value in start]
    hyper = Hyper(lr=lr)
    for step in range(1, 5):
        grads = [draw(-2, 0) for _ in start]
        draws = [random_bits(0, 0, step, 0, len(start), number).tolist() for number in (0, 1)]
        before = copy.deepcopy(elements)
        updates = [
            element.step_fp32(grad, hyper, lambda number, i=i, draws=draws: draws[number][i])
            for i, (element, grad) in enumerate(zip(elements, grads, strict=True))
        ]
        param.grad = torch.tensor(grads, dtype=torch.float64).to(param.dtype)
        opt.step()
        assert_sums(keeper.rows[-1], exact_sums(before, elements, updates, grads, hyper.beta2))


def working_update(old: Element, new: Element, hyper: Hyper) -> float:
    """u of a step in working arithmetic, which reads hi alone."""
    f, k = Arithmetic(new.fmt), scalars(hyper, new.step)
    u = f.div(f.mul(new.m, k["step_size"]), f.add(f.div(f.sqrt(new.v), k["root_bc2"]), k["eps"]))
    return f.sub(u, f.mul(old.param, k["decay"]))


@pytest.mark.parametrize("lr", [1e-3, 1e-6])
@pytest.mark.parametrize("name", WORKING)
def test_the_sums_of_a_step_in_working_arithmetic_are_the_exact_ones(name: str, lr: float) -> None:
    start = values((60,), 3)
    param, hyper, keeper = nn.Parameter(start.clone()), Hyper(lr=lr), Keeper()
    opt = collage.AdamW([param], lr=lr, weight_decay=0.01, strategy=name, arithmetic="working")
    opt.add_observer(keeper)
    elements = [Element(WORDS[name], "bf16", value) for value in start.tolist()]
    for step in range(1, 4):
        param.grad = values((60,), step)
        before = copy.deepcopy(elements)
        for element, grad in zip(elements, param.grad.tolist(), strict=True):
            element.step_working(grad, hyper)
        opt.step()
        updates = [working_update(old, new, hyper) for old, new in zip(before, elements, strict=True)]
        assert_sums(keeper.rows[-1], exact_sums(before, elements, updates, param.grad.tolist(), hyper.beta2))


# ---- the figures -----------------------------------------------------------------------------------------------------


def run(
    strategy: str, steps: int = 30, count: int = 4000, lr: float = 1e-5, beta2: float = 0.95, **options: Any
) -> tuple[collage.AdamW, collage.Audit]:
    param = nn.Parameter(values((count,), 0, dtype_of(strategy), spread=1.0))
    opt = collage.AdamW([param], lr=lr, betas=(0.9, beta2), strategy=strategy, **options)
    audit = collage.audit(opt, every=1)
    for seed in range(1, steps + 1):
        param.grad = values((count,), seed, param.dtype)
        opt.step()
    return opt, audit


@pytest.mark.parametrize("strategy", ["fp32", "mixed"])
def test_nothing_is_lost_in_float32_and_mixed_precision(strategy: str) -> None:
    total = run(strategy, lr=1e-3)[1].report()["total"]
    assert total["edq_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert total["edq"] == pytest.approx(total["update_norm"], rel=1e-3)
    # The values span many binades: what is below half a unit of float32 is lost there too.
    assert total["lost_fraction"] is not None
    assert total["lost_fraction"] < 0.02


@pytest.mark.parametrize("strategy", ["light", "plus"])
def test_collage_keeps_the_update_though_the_leading_component_seldom_moves(strategy: str) -> None:
    total = run(strategy)[1].report()["total"]
    assert total["edq_ratio"] == pytest.approx(1.0, abs=0.1)
    assert total["lost_fraction_hi"] is not None
    assert total["lost_fraction_hi"] > 0.95
    assert total["lost_fraction"] is not None
    assert total["lost_fraction"] < 0.6


@pytest.mark.parametrize("strategy", ["plain", "fp32-states"])
def test_where_one_component_is_rounded_to_nearest_most_of_the_update_is_lost(strategy: str) -> None:
    total = run(strategy)[1].report()["total"]
    assert total["edq_ratio"] is not None
    assert total["edq_ratio"] < 0.5
    assert total["lost_fraction"] == total["lost_fraction_hi"]
    assert total["lost_fraction"] is not None
    assert total["lost_fraction"] > 0.95


def test_the_loss_of_the_second_moment_tells_light_from_plus() -> None:
    light, plus, wide = (
        run(name, steps=200, count=1000, beta2=0.999)[1].report()["total"] for name in ("light", "plus", "mixed")
    )
    assert light["v_lost_fraction"] is not None
    assert light["v_lost_fraction"] > 0.2
    assert plus["v_lost_fraction"] is not None
    assert plus["v_lost_fraction"] < light["v_lost_fraction"] / 5
    assert wide["v_lost_fraction"] == 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_update_of_zero_gives_none(strategy: str) -> None:
    param = nn.Parameter(values((50,), 0, dtype_of(strategy)))
    opt = collage.AdamW([param], weight_decay=0.0, strategy=strategy)
    audit = collage.audit(opt, every=1)
    param.grad = torch.zeros_like(param)
    opt.step()
    total = audit.report()["total"]
    assert (total["update_norm"], total["elements"], total["step"]) == (0.0, 50, 1)
    for name in ("edq", "edq_ratio", "lost_fraction", "lost_fraction_hi", "v_lost_fraction"):
        assert total[name] is None


def test_a_parameter_without_elements_counts_none() -> None:
    params = [nn.Parameter(values((0, 3), 0)), nn.Parameter(values((4,), 1))]
    opt = collage.AdamW(params)
    audit = collage.audit(opt, every=1)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    assert audit.report()["total"]["elements"] == 4


# ---- the audit does not disturb --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "arithmetic"), [(s, "fp32") for s in STRATEGIES] + [(s, "working") for s in WORKING]
)
def test_an_audited_run_has_the_bits_of_an_unaudited_one(strategy: str, arithmetic: str) -> None:
    def trained(every: int | None) -> collage.AdamW:
        params = [nn.Parameter(values(shape, i, dtype_of(strategy))) for i, shape in enumerate([(70,), (5, 4), ()])]
        opt = collage.AdamW(params, strategy=strategy, arithmetic=arithmetic)
        if every is not None:
            collage.audit(opt, every=every)
        for seed in range(1, 5):
            for i, param in enumerate(params):
                param.grad = values(tuple(param.shape), 10 * seed + i, param.dtype)
            opt.step()
        return opt

    plain = trained(None)
    for every in (1, 2):
        assert_same(trained(every), plain)


@pytest.mark.parametrize("strategy", ["plain", "plus", "mixed"])
def test_the_figures_do_not_depend_on_the_thread_count(strategy: str) -> None:
    reports = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        reports.append(run(strategy, steps=2, count=eager.CHUNK)[1].report())
    assert reports[0] == reports[1] == reports[2]


def test_a_step_that_nobody_audits_computes_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    _, opt = small()
    opt.param_groups[0]["backend"] = "eager"
    collage.audit(opt, every=2)
    calls, sums = [], eager._sums
    monkeypatch.setattr(eager, "_sums", lambda *args: calls.append(1) or sums(*args))
    advance(opt, 1)
    assert not calls
    advance(opt, 1)
    assert calls == [1]


def test_the_counts_do_not_depend_on_the_length_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels._STEPS, "native", eager.step)
    whole = run("plus", steps=2)[1].report()["total"]
    monkeypatch.setattr(eager, "CHUNK", 64)
    monkeypatch.setattr(eager, "_buffers", eager._Buffers())
    pieces = run("plus", steps=2)[1].report()["total"]
    for name in ("lost_fraction", "lost_fraction_hi", "v_lost_fraction", "elements"):
        assert pieces[name] == whole[name]
    assert pieces["edq"] == pytest.approx(whole["edq"], rel=1e-12)


def test_parameters_and_gradients_that_are_not_contiguous_are_audited_alike() -> None:
    def audited(turned: bool) -> Record:
        value = values((30, 20), 0)
        param = nn.Parameter(value.t().contiguous().t() if turned else value)
        opt = collage.AdamW([param])
        audit = collage.audit(opt, every=1)
        param.grad = values((30, 20), 1)
        opt.step()
        return audit.report()["total"]

    assert audited(True) == audited(False)


# ---- groups, modules, total ------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), nn.Linear(4, 2))
    with torch.no_grad():
        for i, param in enumerate(net.parameters()):
            param.copy_(values(tuple(param.shape), i, torch.float32, spread=0.3))
    return net.to(torch.bfloat16)


def set_grads(params: Iterator[Tensor]) -> None:
    for i, param in enumerate(params):
        param.grad = values(tuple(param.shape), 50 + i, param.dtype)


def energy(record: Record) -> tuple[int, float, float]:
    """What adds up over sets of parameters: elements, ||u||^2, <e, u>."""
    ratio = record["edq_ratio"] or 0.0
    return record["elements"], record["update_norm"] ** 2, ratio * record["update_norm"] ** 2


def assert_adds_up(records: list[Record], total: Record) -> None:
    parts = [sum(column) for column in zip(*(energy(each) for each in records), strict=True)]
    assert parts == pytest.approx(list(energy(total)), rel=1e-9)


def test_groups_and_modules_add_up_to_the_total_and_are_named_after_the_model() -> None:
    net = network()
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1, "strategy": "plain"}, {"params": vectors, "lr": 0.1}]
    opt = collage.AdamW(groups)
    audit = collage.audit(opt, every=1, model=net)
    set_grads(net.parameters())
    opt.step()
    report = audit.report()
    assert [each["elements"] for each in report["groups"]] == [6 * 5 + 5 * 4 + 4 * 2, 5 + 4 + 4 + 4 + 2]
    assert set(report["modules"]) == {"0", "1.0", "1.1", "2"}
    assert report["modules"]["1.1"]["elements"] == 8
    assert_adds_up(report["groups"], report["total"])
    assert_adds_up(list(report["modules"].values()), report["total"])
    assert report["groups"][1]["update_norm"] > 10 * report["groups"][0]["update_norm"]


def test_the_optimizers_own_names_serve_without_a_model_and_a_lone_parameter_is_its_module() -> None:
    net = network()
    scale = nn.Parameter(values((3,), 9))
    opt = collage.AdamW([*net.named_parameters(), ("scale", scale)])
    audit = collage.audit(opt, every=1)
    set_grads(iter([*net.parameters(), scale]))
    opt.step()
    assert list(audit.report()["modules"]) == ["0", "1.0", "1.1", "2", "scale"]


def test_without_names_there_are_no_modules() -> None:
    opt, audit = run("plus", steps=1)
    assert audit.report()["modules"] == {}
    assert len(audit.report()["groups"]) == len(opt.param_groups) == 1


def test_a_group_that_took_no_part_has_an_empty_record() -> None:
    first, second = (nn.Parameter(values((5,), i)) for i in range(2))
    opt = collage.AdamW([{"params": [first]}, {"params": [second]}])
    audit = collage.audit(opt, every=1)
    second.grad = values((5,), 3)
    opt.step()
    empty, full = audit.report()["groups"]
    assert (empty["elements"], empty["edq_ratio"]) == (0, None)
    assert full == audit.report()["total"]


# ---- when ------------------------------------------------------------------------------------------------------------


def advance(opt: collage.AdamW, steps: int) -> None:
    for _ in range(steps):
        for group in opt.param_groups:
            set_grads(iter(group["params"]))
        opt.step()


def small() -> tuple[nn.Parameter, collage.AdamW]:
    param = nn.Parameter(values((20,), 0))
    return param, collage.AdamW([param])


def test_steps_that_every_divides_are_audited_and_every_may_change() -> None:
    _, opt = small()
    audit = collage.audit(opt, every=3)
    assert audit.last is None
    with pytest.raises(RuntimeError, match="no step has been audited yet: with every=3 the first is step 3"):
        audit.report()
    advance(opt, 7)
    assert audit.steps == [3, 6]
    assert audit.last == audit.report()
    assert audit.report()["total"]["step"] == 6
    audit.every = 1
    advance(opt, 2)
    audit.every = 10
    advance(opt, 1)
    assert audit.steps == [3, 6, 8, 9, 10]


def test_numbers_go_on_after_a_resumed_run() -> None:
    param, opt = small()
    advance(opt, 5)
    other = collage.AdamW([nn.Parameter(param.detach().clone())])
    other.load_state_dict(opt.state_dict())
    audit = collage.audit(other, every=2)
    advance(other, 3)
    assert audit.steps == [6, 8]


def test_a_skipped_or_empty_step_is_no_audited_one() -> None:
    param, opt = small()
    audit = collage.audit(opt, every=1)
    opt.step()
    param.grad = torch.zeros_like(param)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    opt.found_inf = torch.ones(())  # type: ignore[attr-defined]
    param.grad = torch.ones_like(param)
    opt.step()
    assert audit.steps == []
    assert audit.last is None


def test_a_detached_audit_watches_no_more_and_keeps_what_it_has() -> None:
    _, opt = small()
    audit, other = collage.audit(opt, every=1), collage.audit(opt, every=1)
    advance(opt, 2)
    kept = audit.report()
    audit.detach()
    audit.detach()
    advance(opt, 1)
    assert audit.report() == kept
    assert (audit.steps, other.steps) == ([1, 2], [1, 2, 3])


def test_a_copy_of_the_optimizer_is_not_watched() -> None:
    _, opt = small()
    audit = collage.audit(opt, every=1)
    twin = copy.deepcopy(opt)
    advance(twin, 1)
    assert audit.steps == []


def test_a_record_of_an_earlier_step_does_not_change_later() -> None:
    _, opt = small()
    audit = collage.audit(opt, every=1)
    advance(opt, 1)
    first = audit.report()
    kept = copy.deepcopy(first)
    advance(opt, 3)
    assert first == kept
    assert audit.report() != kept


# ---- whom ------------------------------------------------------------------------------------------------------------


class Wrapper:
    """Like Accelerate's: holds the optimizer as ``.optimizer``."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_a_wrapped_optimizer_is_watched_within() -> None:
    _, opt = small()
    audit = collage.audit(Wrapper(Wrapper(opt)), every=1)  # type: ignore[arg-type]
    advance(opt, 1)
    assert audit.steps == [1]


def test_what_is_no_optimizer_is_refused() -> None:
    for each in (nn.Linear(2, 2), Wrapper(None), [object()]):
        with pytest.raises(TypeError, match=r"the audit takes an optimizer, or what holds one as \.optimizer, got"):
            collage.audit(each)


@pytest.mark.parametrize("every", [0, -1, 2.5, None])
def test_every_must_be_a_positive_integer(every: Any) -> None:
    _, opt = small()
    with pytest.raises(ValueError, match="every must be an integer >= 1, got"):
        collage.audit(opt, every=every)
    audit = collage.audit(opt, every=5)
    audit.every = every
    with pytest.raises(ValueError, match="every must be an integer >= 1, got"):
        advance(opt, 1)

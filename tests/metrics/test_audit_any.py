"""The audit of any optimizer: exact counts, the run as it was, no memory, who is replayed and who is not."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import collage
from collage.metrics import comparison, copies, figures, watch
from collage.metrics.copies import Row
from collage.metrics.watch import Watch
from comparing import Keeper, bits, parameter, values

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def step_with(optimizer: Any, seed: int, zeros: float = 0.0, spread: float = 0.05) -> None:
    """One step on gradients that depend on the seed; a share of them is zero."""
    place = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            grad = values(tuple(param.shape), 1000 * seed + place, param.dtype, spread=spread)
            where = torch.rand(param.shape, generator=torch.Generator().manual_seed(seed)) < zeros
            param.grad = torch.where(where, torch.zeros_like(grad), grad)
            place += 1
    optimizer.step()


def total_of(optimizer: Any, steps: int = 3, **options: Any) -> collage.metrics.Record:
    audit = collage.audit(optimizer, every=1, **options)
    for seed in range(1, steps + 1):
        step_with(optimizer, seed)
    return audit.report()["total"]


# ---- against rationals -----------------------------------------------------------------------------------------------


def adamw_update_is_not_zero(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]
) -> list[bool]:
    """Whether AdamW's exact update differs from 0, for each element: by rationals, squaring the root away."""
    lr, decay, eps = (Fraction(group[name]) for name in ("lr", "weight_decay", "eps"))
    b1, b2 = map(Fraction, group["betas"])
    found = []
    for pi, gi, mi, vi in zip(*(each.double().tolist() for each in (p, g, m, v)), strict=True):
        first = lr / (1 - b1**step) * (b1 * Fraction(mi) + (1 - b1) * Fraction(gi))
        second = (b2 * Fraction(vi) + (1 - b2) * Fraction(gi) ** 2) / (1 - b2**step)
        pull = lr * decay * Fraction(pi)
        if first == 0 or pull == 0:
            found.append(first != 0 or pull != 0)
        else:
            root = -first / pull - eps
            found.append(not (root >= 0 and root**2 == second))
    return found


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("lr", [1e-3, 1e-5])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_lost_fraction_of_torchs_adamw_is_the_exact_count(name: str, lr: float, weight_decay: float) -> None:
    draw = random.Random(f"{name} {lr}")
    start = [draw.choice([-1.0, 0.0, 1.0]) * 10 ** draw.uniform(-4, 1) for _ in range(300)]
    param = nn.Parameter(torch.tensor(start).to(torch.bfloat16))
    opt = torch.optim.AdamW([param], lr=lr, weight_decay=weight_decay, **IMPLEMENTATIONS[name])
    audit = collage.audit(opt, every=1)
    for step in range(1, 5):
        # Gradients of 1e-30 leave first moments that move a weight by less than float64 can see beside it.
        grads = [draw.choice([0.0, 1.0, -1.0]) * 10 ** draw.choice([-30.0, -2.0, 0.0]) for _ in start]
        param.grad = torch.tensor(grads).to(torch.bfloat16)
        state = opt.state[param]
        zeros = torch.zeros_like(param)
        m, v = (state.get(key, zeros).clone() for key in ("exp_avg", "exp_avg_sq"))
        before = param.detach().clone()
        wanted = adamw_update_is_not_zero(before, param.grad, m, v, step, opt.param_groups[0])
        opt.step()
        stayed = [Fraction(a) == Fraction(b) for a, b in zip(before.tolist(), param.tolist(), strict=True)]
        lost = sum(w and s for w, s in zip(wanted, stayed, strict=True))
        total = audit.report()["total"]
        assert total["lost_fraction"] == lost / sum(wanted)
        assert total["lost_fraction_hi"] == total["lost_fraction"]
        assert 0 < lost < sum(wanted)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_intended_update_is_adamws_to_the_last_digits(name: str) -> None:
    param = nn.Parameter(values((500,), 0, spread=1.0))
    opt = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.1, **IMPLEMENTATIONS[name])
    audit = collage.audit(opt, every=1)
    for seed in (1, 2, 3):
        m, v = (opt.state[param].get(key, torch.zeros_like(param)).double() for key in ("exp_avg", "exp_avg_sq"))
        old = param.detach().double()
        step_with(opt, seed)
        g = param.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = -1e-3 / (1 - 0.9**seed) * m / ((v / (1 - 0.999**seed)).sqrt() + 1e-8) - 1e-4 * old
        e = param.detach().double() - old
        total = audit.report()["total"]
        assert total["update_norm"] == pytest.approx(float(u.norm()), rel=1e-9)
        assert total["edq"] == pytest.approx(float((e * u).sum() / u.norm()), rel=1e-9)
        assert total["displacement"] == pytest.approx(float(e.norm()), rel=1e-12)


# ---- which optimizers ------------------------------------------------------------------------------------------------

TORCH: dict[str, Callable[[list[Any]], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "Adam with L2": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "Adam, maximize": lambda p: torch.optim.Adam(p, lr=1e-3, maximize=True),
    "Adam, lr as tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, maximize=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Compensated": lambda p: collage.Compensated(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}
MATRICES = {"Muon": lambda p: torch.optim.Muon(p, lr=1e-2)}


def parameters(dtype: torch.dtype, scalars: bool = True) -> list[nn.Parameter]:
    shapes = [(12, 30), (7, 5), *([(40,), ()] if scalars else [])]
    return [nn.Parameter(values(shape, i, dtype)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", [*TORCH, *MATRICES])
def test_with_float32_parameters_nothing_is_lost(name: str) -> None:
    opt = {**TORCH, **MATRICES}[name](parameters(torch.float32, scalars=name in TORCH))
    total = total_of(opt, steps=4)
    assert total["replayed"] is True
    assert total["edq_ratio"] == pytest.approx(1.0, abs=2e-3 if name in MATRICES else 1e-5)
    assert total["lost_fraction"] < 0.01


@pytest.mark.parametrize("name", [*TORCH, *MATRICES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_an_audited_run_has_the_bits_and_the_random_state_of_one_that_is_not(name: str, dtype: torch.dtype) -> None:
    def trained(audited: bool) -> tuple[Optimizer, Tensor]:
        torch.manual_seed(5)
        opt = {**TORCH, **MATRICES}[name](parameters(dtype, scalars=name in TORCH))
        if audited:
            collage.audit(opt, every=2)
        for seed in range(1, 6):
            step_with(opt, seed, zeros=0.2)
        return opt, torch.get_rng_state()

    (one, one_random), (two, two_random) = trained(False), trained(True)
    assert torch.equal(one_random, two_random)
    for a, b in zip(tensors_of(one), tensors_of(two), strict=True):
        assert torch.equal(bits(a), bits(b))


def tensors_of(optimizer: Any) -> list[Tensor]:
    """Parameters, gradients and states, in order."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            found += [param.detach(), *([] if param.grad is None else [param.grad])]
    state = optimizer.state_dict()["state"]
    return found + [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]


def test_compensated_weights_keep_what_bare_ones_lose() -> None:
    bare = total_of(torch.optim.SGD(parameters(torch.bfloat16), lr=1e-3))
    kept = total_of(collage.Compensated(torch.optim.SGD(parameters(torch.bfloat16), lr=1e-3)))
    assert bare["edq_ratio"] < 0.8
    assert kept["edq_ratio"] == pytest.approx(1.0, abs=0.02)
    assert kept["lost_fraction"] < 0.2 < bare["lost_fraction"]
    assert kept["lost_fraction_hi"] > 0.5


class Signs(Optimizer):
    """An optimizer that nobody here knows: moves each element by lr against its gradient's sign."""

    def __init__(self, params: Any, lr: float, wrong: float = 1.0) -> None:
        self.wrong = wrong
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                # In float64 an unfaithful one does something else than in the parameter's own dtype.
                factor = self.wrong if param.dtype == torch.float64 else 1.0
                param.add_(param.grad.sign(), alpha=-group["lr"] * factor)


def test_an_unknown_optimizer_is_replayed_by_its_own_step_if_that_explains_what_was_stored() -> None:
    total = total_of(Signs(parameters(torch.bfloat16), lr=1e-3))
    assert total["replayed"] is True
    assert total["update_norm"] == pytest.approx(1e-3 * total["elements"] ** 0.5)
    doubtful = total_of(Signs(parameters(torch.bfloat16), lr=0.1, wrong=30.0))
    assert doubtful["replayed"] is False
    assert "comes near to" in doubtful["reasons"][0]
    assert (doubtful["edq_ratio"], doubtful["lost_fraction"]) == (None, None)


class Quantised(Optimizer):
    """Its state is codes that only it can read."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            self.state[param].setdefault("codes", torch.zeros(param.shape, dtype=torch.uint8)).add_(1)
            param[:6].sub_(0.5)


@pytest.mark.parametrize(("window", "steps"), [(1, 1), (3, 3)])
def test_what_cannot_be_replayed_says_so_and_reports_what_can_be_seen(window: int, steps: int) -> None:
    param = nn.Parameter(torch.ones(12))
    opt = Quantised([param])
    param.grad = torch.ones(12)
    opt.step()
    audit = collage.audit(opt, every=4, window=window)
    for _ in range(4):
        opt.step()
    total = audit.report()["total"]
    assert total["replayed"] is False
    assert total["reasons"] == ["its state 'codes' is quantised in a way not known here"]
    assert (total["edq_ratio"], total["lost_fraction"], total["elements"]) == (None, None, 12)
    assert total["unchanged_fraction"] == 0.5
    assert total["displacement"] == pytest.approx(0.5 * steps * 6**0.5)
    assert "update_ulps" not in total


class Plain:
    """No torch optimizer: it has groups and a step, and no hooks."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": params, "lr": 1.0}]

    def step(self) -> str:
        for param in self.param_groups[0]["params"]:
            param.data[:2] += 1
        return "stepped"


def test_an_object_without_hooks_is_watched_round_its_step_until_the_audit_is_detached() -> None:
    param = nn.Parameter(torch.ones(8))
    param.grad = torch.ones(8)
    opt = Plain([param])
    audit = collage.audit(opt, every=2)
    assert [opt.step() for _ in range(4)] == ["stepped"] * 4
    assert audit.steps == [2, 4]
    total = audit.report()["total"]
    assert (total["replayed"], total["unchanged_fraction"], total["displacement"]) == (False, 0.75, 2**0.5)
    audit.detach()
    assert "step" not in vars(opt)
    opt.step()
    opt.step()
    assert audit.steps == [2, 4]


def test_lbfgs_is_not_replayed() -> None:
    param = nn.Parameter(torch.ones(5))
    opt = torch.optim.LBFGS([param], lr=0.1)
    audit = collage.audit(opt, every=1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    opt.step(closure)  # type: ignore[arg-type]
    total = audit.report()["total"]
    assert (total["replayed"], total["reasons"]) == (False, ["LBFGS reevaluates the model within a step"])
    assert total["displacement"] > 0


def test_a_gradient_that_a_closure_computes_within_the_step_is_the_one_that_counts() -> None:
    def audited(with_closure: bool) -> dict[str, Any]:
        param = nn.Parameter(values((50,), 0))
        opt = torch.optim.AdamW([param], lr=1e-3)
        audit = collage.audit(opt, every=1)

        def closure() -> Tensor:
            param.grad = values((50,), 7)
            return torch.ones(())

        param.grad = torch.ones_like(param) if with_closure else values((50,), 7)
        opt.step(closure) if with_closure else opt.step()  # type: ignore[arg-type]
        return dict(audit.report()["total"])

    assert audited(True) == audited(False)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_weight_decay_below_half_a_unit_is_counted_as_lost_and_a_larger_one_is_not() -> None:
    def lost(implementation: str, decay: float) -> Any:
        param = nn.Parameter(torch.full((256,), 1.5, dtype=torch.bfloat16))
        param.grad = torch.zeros_like(param)
        opt = torch.optim.AdamW([param], lr=1e-3, weight_decay=decay, **IMPLEMENTATIONS[implementation])
        audit = collage.audit(opt, every=1)
        opt.step()
        return audit.report()["total"]["decay_lost_fraction"]

    for name in IMPLEMENTATIONS:
        assert [lost(name, decay) for decay in (0.0, 0.1, 20.0)] == [None, 1.0, 0.0]


@pytest.mark.parametrize("strategy", ["plain", "plus", "exact", "mixed", "compact"])
def test_the_figures_from_outside_of_collages_own_step_agree_with_its_sums(strategy: str) -> None:
    params = [nn.Parameter(values((64, 128), 0, spread=1.0)), nn.Parameter(values((40,), 1, spread=1.0))]
    opt = collage.AdamW(params, lr=1e-4, weight_decay=0.1, strategy=strategy)
    inner, outer = collage.audit(opt, every=1), collage.audit(opt, every=1, details=True)
    alone = watch.Watch(opt, lambda step: True, lambda step, rows: kept.append(rows), None)
    kept: list[Any] = []
    for seed in (1, 2, 3):
        step_with(opt, seed)
    alone.detach()
    summed, detailed = inner.report()["total"], outer.report()["total"]
    assert {key: value for key, value in detailed.items() if key in summed} == summed
    seen = sum(row.sums for row in kept[-1])
    own = sum(row.sums for rows in inner._rows for row in rows)
    # The step computes u in float32, the replay in float64.
    assert seen[:3].tolist() == pytest.approx(own[:3].tolist(), rel=1e-3)
    assert seen[3:6].tolist() == own[3:6].tolist()
    assert detailed["replayed"] is True
    assert sum(detailed["update_ulps"]["elements"]) == pytest.approx(64 * 128 + 40, rel=0.01)
    if strategy == "plain":
        assert detailed["decay_lost_fraction"] > 0.9
    else:
        assert detailed["decay_lost_fraction"] < 0.7


TILED = [name for name, strategy in collage.strategies().items() if strategy.param.borne]


def watched(param: Any, opt: Optimizer, steps: int, memory: int | None = None) -> tuple[Row, dict[str, float], Tensor]:
    """The row of the last of some steps on a parameter in tiles, its further figures, and its value before that."""
    rows: list[Row] = []
    looking = Watch(opt, lambda _: True, lambda _, seen: rows.extend(seen), memory)
    before = param.exact(torch.float64)
    for seed in range(1, steps + 1):
        before = param.exact(torch.float64)
        step_with(opt, seed)
    looking.detach()
    more = rows[-1].more
    assert more is not None
    return rows[-1], dict(zip(figures.MORE, more.tolist(), strict=True)), before


# A last tile that is less high, and rows that no power of two divides.
@pytest.mark.parametrize("shape", [(150, 122), (64, 64)])
@pytest.mark.parametrize("strategy", TILED)
def test_of_a_parameter_in_tiles_the_whole_value_is_looked_at(strategy: str, shape: tuple[int, int]) -> None:
    param: Any = parameter(values(shape, 0), strategy)
    opt = collage.AdamW([param], lr=1e-4, weight_decay=0.1, strategy=strategy)
    keeper = Keeper()
    opt.add_observer(keeper)
    for seed in (5, 6):
        step_with(opt, seed)
    # The same step without weight decay.
    other, without = copy.deepcopy((param, opt))
    without.param_groups[0]["weight_decay"] = 0.0
    step_with(without, 1)
    row, more, before = watched(param, opt, 1)
    after = param.exact(torch.float64)
    moved, still = after - before, other.exact(torch.float64) == after
    assert row.reason is None
    assert more["moved_squared"] == pytest.approx(float(moved.square().sum()), rel=1e-12)
    assert (more["seen"], more["unchanged"]) == (moved.numel(), (moved == 0).sum())
    assert (more["decayed"], more["lost_weight_decays"]) == ((before != 0).sum(), (still & (before != 0)).sum())
    # As the very step has them, whose update is of float32.
    assert row.sums is not None
    assert torch.equal(row.sums[3:], keeper.rows[-1].sums[3:])
    assert row.sums[:3].tolist() == pytest.approx(keeper.rows[-1].sums[:3].tolist(), rel=1e-6)


def test_updates_of_a_parameter_in_tiles_are_counted_in_units_of_bfloat16() -> None:
    param: Any = parameter(torch.ones(64, 64, dtype=torch.bfloat16), "fp8")
    param.grad = torch.full((64, 64), 2.0**-7, dtype=torch.bfloat16)
    param.grad[0] = 2.0**-9
    histogram = total_of_one(torch.optim.SGD([param], lr=1.0, foreach=False))["update_ulps"]
    assert histogram["log2"] == [-2, -1, 0]
    assert histogram["elements"] == [64, 0, 64 * 63]


@pytest.mark.parametrize("strategy", TILED)
def test_pieces_cut_no_row_of_a_tile(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Scales that differ from row to row, and pieces that are no multiple of 122 elements.
    start = values((90, 122), 0) * torch.exp2(torch.arange(90.0) % 7)[:, None]
    form = replace(parameter(start.bfloat16(), strategy).form, rows=1)  # type: ignore[attr-defined]
    param: Any = nn.Parameter(collage.TiledTensor.of(start, form))
    opt = collage.AdamW([param], lr=1e-3, strategy=strategy)
    monkeypatch.setattr(copies, "PIECE", 1000)
    _, more, before = watched(param, opt, 2)
    moved = param.exact(torch.float64) - before
    assert more["moved_squared"] == pytest.approx(float(moved.square().sum()), rel=1e-12)
    assert (more["seen"], more["unchanged"]) == (moved.numel(), (moved == 0).sum())
    for begin, end in (*copies.runs(90 * 122, 1.0, 122), *copies.runs(900 * 122, 0.1, 122)):
        assert begin % 122 == end % 122 == 0


@pytest.mark.parametrize("strategy", TILED)
def test_a_memory_bound_samples_whole_rows_of_tiles(strategy: str) -> None:
    found = []
    for memory in (None, 1 << 18):
        param: Any = parameter(values((600, 122), 0), strategy)
        opt = collage.AdamW([param], lr=1e-3, strategy=strategy)
        found.append(watched(param, opt, 2, memory))
    (whole, all_of_it, _), (sampled, some, _) = found
    assert some["seen"] == all_of_it["seen"]
    assert (some["decayed"], all_of_it["decayed"]) == (0, all_of_it["seen"])
    assert whole.sums is not None
    assert sampled.sums is not None
    assert sampled.sums[:6].tolist() == pytest.approx(whole.sums[:6].tolist(), rel=0.1, abs=300)


def test_another_optimizer_is_seen_to_lose_what_it_writes_into_tiles() -> None:
    param: Any = parameter(values((64, 96), 0), "fp8")
    opt = torch.optim.AdamW([param], lr=1e-4, foreach=False)
    row, more, before = watched(param, opt, 2)
    moved = param.exact(torch.float64) - before
    assert more["moved_squared"] == pytest.approx(float(moved.square().sum()), rel=1e-12)
    assert (more["unchanged"], more["decayed"]) == ((moved == 0).sum(), 0)
    assert row.sums is not None
    assert 0.5 < row.sums[0] / row.sums[2] < 1.5


def test_subnormal_and_saturated_weights_are_counted_and_so_are_second_moments_that_underflow() -> None:
    start = torch.tensor([1e-39, 1.0, -3.3895e38, torch.inf], dtype=torch.bfloat16)
    param = nn.Parameter(start)
    param.grad = torch.zeros_like(param)
    opt = torch.optim.SGD([param], lr=1e-3)
    total = total_of_one(opt)
    assert (total["subnormal_fraction"], total["saturated_fraction"]) == (0.25, 0.5)
    half = nn.Parameter(torch.ones(4, dtype=torch.float16))
    half.grad = torch.tensor([1.0, 1e-3, 1e-3, 0.0], dtype=torch.float16)
    total = total_of_one(torch.optim.AdamW([half], lr=1e-3))
    assert total["v_subnormal_fraction"] == pytest.approx(2 / 3)


def total_of_one(opt: Any) -> Any:
    audit = collage.audit(opt, every=1)
    opt.step()
    return audit.report()["total"]


def test_the_histogram_counts_units_of_the_last_place() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    param.grad = torch.tensor([2.0**-7, 2.0**-8, -(2.0**-10), 0.0], dtype=torch.bfloat16)
    histogram = total_of_one(torch.optim.SGD([param], lr=1.0))["update_ulps"]
    assert histogram["log2"] == [-3, -2, -1, 0]
    assert histogram["elements"] == [1.0, 0.0, 1.0, 1.0]
    assert histogram["energy"][-1] == pytest.approx(1 / (1 + 2**-2 + 2**-6))


def test_the_figures_do_not_depend_on_the_thread_count() -> None:
    reports = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        reports.append(total_of(torch.optim.AdamW([nn.Parameter(values((300_000,), 0))], lr=1e-3), steps=1))
    assert reports[0] == reports[1] == reports[2]


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_between_audited_steps_no_memory_is_held() -> None:
    def tensors() -> int:
        gc.collect()
        # By type: isinstance looks at the class of every object there is, and some warn when they are looked at.
        found = (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))
        # Other tests' sparse tensors have no bytes of their own.
        return sum(each.nbytes for each in found if each.layout is torch.strided)

    opt = torch.optim.AdamW([nn.Parameter(values((50_000,), 0))], lr=1e-3)
    step_with(opt, 1)
    before = tensors()
    audit = collage.audit(opt, every=1)
    for seed in (2, 3, 4):
        step_with(opt, seed)
    assert audit.steps == [2, 3, 4]
    # The sums and the histogram of the last audited step.
    assert tensors() - before < 4096


def test_a_memory_bound_samples_runs_of_the_elements_and_scales_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def audited(memory: int | None) -> tuple[Any, int]:
        opt = torch.optim.AdamW([nn.Parameter(values((400_000,), 0)), nn.Parameter(values((50,), 1))], lr=1e-3)
        audit = collage.audit(opt, every=2, memory=memory)
        step_with(opt, 1)
        with_pieces: list[int] = []
        compared = comparison.compared
        monkeypatch.setattr(
            watch,
            "compared",
            lambda held, family: with_pieces.append(_nbytes(held.pieces)) or compared(held, family),
        )
        step_with(opt, 2)
        monkeypatch.undo()
        return audit.report()["total"], sum(with_pieces)

    whole, used = audited(None)
    # p, g, m and v of 2 bytes, the moments' copies once more for the repetition of the step.
    assert used >= 400_050 * 8
    sampled, bounded = audited(1 << 20)
    assert bounded <= 1 << 20
    assert sampled["elements"] == whole["elements"]
    for name in ("lost_fraction", "edq_ratio", "decay_lost_fraction", "unchanged_fraction"):
        assert sampled[name] == pytest.approx(whole[name], abs=0.02)
    assert sampled["update_norm"] == pytest.approx(whole["update_norm"], rel=0.02)


def _nbytes(pieces: list[Any]) -> int:
    found = {}
    for piece in pieces:
        kept = [*piece.parts, piece.grad, *piece.state.values(), *(piece.raw or {}).values()]
        found |= {id(each): each.nbytes for each in kept if isinstance(each, Tensor)}
    return sum(found.values())


def test_a_rule_that_needs_whole_parameters_is_replayed_as_far_as_they_fit() -> None:
    total = total_of(torch.optim.Adafactor(parameters(torch.float32), lr=1e-2), memory=2000)
    assert total["replayed"] is False
    assert "needs the whole parameter" in total["reasons"][0]
    assert total["edq_ratio"] == pytest.approx(1.0, abs=1e-3)


def test_a_step_that_fails_leaves_the_audit_usable() -> None:
    param = nn.Parameter(values((6,), 0))
    opt = torch.optim.SGD([param], lr=1.0)
    audit = collage.audit(opt, every=1)

    def fails() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        opt.step(fails)  # type: ignore[arg-type]
    assert audit.last is None
    step_with(opt, 1)
    assert audit.steps == [1]


# ---- when and whom ---------------------------------------------------------------------------------------------------


def test_steps_count_from_the_state_that_was_loaded() -> None:
    opt = torch.optim.AdamW([nn.Parameter(values((6,), 0))])
    for seed in range(1, 6):
        step_with(opt, seed)
    other = torch.optim.AdamW([nn.Parameter(values((6,), 0))])
    audit = collage.audit(other, every=2)
    step_with(other, 1)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in (6, 7, 8):
        step_with(other, seed)
    assert audit.steps == [6, 8]


def test_a_step_without_gradients_is_no_audited_one() -> None:
    opt = torch.optim.SGD([nn.Parameter(values((6,), 0))], lr=1.0)
    audit = collage.audit(opt, every=1)
    opt.step()
    assert audit.last is None


def test_a_list_of_optimizers_and_a_container_are_audited_as_one() -> None:
    class Container:
        def __init__(self, members: list[Any]) -> None:
            self.optimizers = members

    def members() -> list[Any]:
        first, second = parameters(torch.bfloat16)[:2]
        return [torch.optim.AdamW([("a.weight", first)], lr=1e-3), collage.AdamW([("b.weight", second)], lr=1e-3)]

    for wrap in (list, Container):
        opts = members()
        audit = collage.audit(wrap(opts), every=1)
        for opt in opts:
            step_with(opt, 1)
        report = audit.report()
        assert audit.steps == [1]
        assert list(report["modules"]) == ["a", "b"]
        assert [group["elements"] for group in report["groups"]] == [360, 35]
        assert report["total"]["elements"] == 395


def test_parameters_of_an_order_of_their_own_are_audited_alike() -> None:
    def audited(turned: bool) -> Any:
        value = values((30, 20), 0)
        param = nn.Parameter(value.t().contiguous().t() if turned else value)
        opt = torch.optim.AdamW([param], lr=1e-3)
        return total_of(opt)

    one, other = audited(False), audited(True)
    assert one.pop("update_ulps")["elements"] == other.pop("update_ulps")["elements"]
    assert one == pytest.approx(other)


@pytest.mark.parametrize("options", [{"window": 0}, {"memory": 0}, {"memory": 1.5}])
def test_bounds_must_be_positive_integers(options: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer >= 1, got"):
        collage.audit(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), **options)

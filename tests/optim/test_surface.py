"""collage.AdamW is a torch.optim.Optimizer: everything that people do with one works."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import collage
from comparing import LOW, STRATEGIES, assert_same, bits, dtype_of, snapshot, values


def hashed(x: Tensor | None) -> str:
    assert x is not None
    return hashlib.sha256(bits(x).numpy().tobytes()).hexdigest()


def set_grads(opt: torch.optim.Optimizer, seed: int) -> None:
    params = [param for group in opt.param_groups for param in group["params"]]
    for i, param in enumerate(params):
        param.grad = values(tuple(param.shape), 1000 * seed + i, param.dtype)


def steps(opt: collage.AdamW, count: int, first: int = 1) -> collage.AdamW:
    for seed in range(first, first + count):
        set_grads(opt, seed)
        opt.step()
    return opt


def small_params(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(values(shape, i, dtype)) for i, shape in enumerate([(20,), (3, 7), (), (66, 64)])]


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for i, param in enumerate(net.parameters()):
            param.copy_(values(tuple(param.shape), i, torch.float32, spread=0.3))
    return net.to(dtype)


# ---- agreement with torch ------------------------------------------------------------------------------------------


def test_it_is_a_torch_optimizer_that_defaults_to_plus_and_torchs_adamw_values() -> None:
    opt = collage.AdamW(small_params())
    assert isinstance(opt, torch.optim.Optimizer)
    reference = torch.optim.AdamW(small_params()).defaults
    for key in ("lr", "betas", "eps", "weight_decay", "maximize", "foreach", "capturable", "fused"):
        assert opt.defaults[key] == reference[key]
    assert (opt.defaults["strategy"], opt.defaults["arithmetic"], opt.defaults["seed"]) == ("plus", "fp32", 0)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_agrees_with_torchs_adamw(maximize: bool, weight_decay: float) -> None:
    mine, theirs = small_params(torch.float32), small_params(torch.float32)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": weight_decay, "maximize": maximize}
    opt = collage.AdamW(mine, strategy="fp32", **options)
    reference = torch.optim.AdamW(theirs, foreach=False, **options)
    for seed in range(1, 30):
        for each in (opt, reference):
            set_grads(each, seed)
            each.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["light", "plus", "mixed", "kahan"])
def test_low_precision_strategies_follow_float32(strategy: str) -> None:
    low = [nn.Parameter(values((2000,), 0, torch.bfloat16, spread=1.0))]
    wide = [nn.Parameter(low[0].detach().float())]
    opts = [collage.AdamW(low, lr=1e-3, strategy=strategy), collage.AdamW(wide, lr=1e-3, strategy="fp32")]
    for seed in range(1, 41):
        grad = values((2000,), seed, torch.bfloat16) + 0.02
        low[0].grad, wide[0].grad = grad, grad.float()
        for opt in opts:
            opt.step()
    travelled = (wide[0] - values((2000,), 0, torch.bfloat16, spread=1.0).float()).norm()
    assert (opts[0].full_param(low[0]) - wide[0]).norm() / travelled < 0.02


# ---- groups, options, schedulers -----------------------------------------------------------------------------------


def test_groups_step_with_options_of_their_own_and_keep_unknown_keys() -> None:
    a, b = small_params()[:2]
    groups = [
        {"params": [a], "lr": 0.1, "strategy": "plain", "note": "keep me", "tags": ["x"]},
        {"params": [b], "weight_decay": 0.0, "strategy": "mixed", "betas": (0.5, 0.9)},
    ]
    opt = steps(collage.AdamW(groups, lr=1e-3), 3)
    assert opt.param_groups[0]["note"] == "keep me"
    assert opt.state_dict()["param_groups"][0]["tags"] == ["x"]
    assert set(opt.state[a]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "master_param" in opt.state[b]
    alone = collage.AdamW([nn.Parameter(values((3, 7), 1))], weight_decay=0.0, strategy="mixed", betas=(0.5, 0.9))
    for seed in (1, 2, 3):
        alone.param_groups[0]["params"][0].grad = values((3, 7), 1000 * seed + 1)
        alone.step()
    assert torch.equal(alone.param_groups[0]["params"][0], b)


def test_named_parameters_are_accepted_and_named_in_errors() -> None:
    net = model()
    opt = collage.AdamW(net.named_parameters())
    assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    reference = collage.AdamW(model().parameters())
    assert_same(steps(opt, 2), steps(reference, 2))


def test_add_param_group_joins_later_and_leaves_the_others_as_they_were() -> None:
    a, b = small_params()[:2]
    opt = steps(collage.AdamW([a]), 2)
    opt.add_param_group({"params": [b], "lr": 0.5})
    steps(opt, 1, first=3)
    assert opt.state[a]["step"].item() == 3
    assert opt.state[b]["step"].item() == 1
    assert opt.state[b]["ordinal"].item() == 1


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: (step + 1) / 10),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=20),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-4, 1e-2, step_size_up=3),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 3), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_drive_learning_rate_and_momentum(make) -> None:
    opt, reference = collage.AdamW(small_params(), lr=1e-2), torch.optim.AdamW(small_params(), lr=1e-2)
    schedulers = [make(opt), make(reference)]
    by_hand = collage.AdamW(small_params())
    for step in range(1, 8):
        by_hand.param_groups[0].update(lr=opt.param_groups[0]["lr"], betas=opt.param_groups[0]["betas"])
        for each in (opt, by_hand):
            steps(each, 1, first=step)
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
        assert opt.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
        assert opt.param_groups[0]["betas"] == reference.param_groups[0]["betas"]
    assert_same(opt, by_hand)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_learning_rate_and_betas_may_be_tensors(shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.015625, dtype=torch.float32)
    betas = (torch.tensor(0.875), torch.tensor(0.984375))
    opt = steps(collage.AdamW(small_params(), lr=lr, betas=betas), 3)
    assert_same(opt, steps(collage.AdamW(small_params(), lr=0.015625, betas=(0.875, 0.984375)), 3))
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    steps(opt, 1, first=4)
    scheduler.step()
    assert opt.param_groups[0]["lr"].item() == 0.0078125


@pytest.mark.parametrize("option", ["foreach", "fused", "capturable"])
def test_torchs_speed_options_are_accepted_without_effect(option: str) -> None:
    opt = collage.AdamW(small_params(), **{option: True})
    assert_same(steps(opt, 2), steps(collage.AdamW(small_params()), 2))


@pytest.mark.parametrize(
    ("option", "message"), [("amsgrad", "amsgrad=True is not"), ("differentiable", "differentiab")]
)
def test_options_that_cannot_be_served_are_clear_errors(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collage.AdamW(small_params(), **{option: True})


# ---- the step ------------------------------------------------------------------------------------------------------


def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned() -> None:
    net, calls = model(), []
    opt = collage.AdamW(net.parameters())

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = net(values((4, 6), 9)).square().mean()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True]
    assert isinstance(loss, float)
    assert opt.state[next(net.parameters())]["step"].item() == 1
    assert opt.step() is None


def test_step_hooks_run_around_the_step_and_can_be_removed() -> None:
    opt, seen = collage.AdamW(small_params()), []
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("before")),
        opt.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    steps(opt, 1)
    for handle in handles:
        handle.remove()
    steps(opt, 1)
    assert seen == ["before", "after"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("audited", [False, True])
def test_the_gradient_is_never_written(strategy: str, audited: bool) -> None:
    opt = collage.AdamW(small_params(dtype_of(strategy)), strategy=strategy, maximize=True)
    if audited:
        collage.audit(opt, every=1)
    for seed in (1, 2):
        set_grads(opt, seed)
        grads = [param.grad for param in opt.param_groups[0]["params"]]
        before = [hashed(grad) for grad in grads]
        opt.step()
        assert [hashed(grad) for grad in grads] == before
        assert all(param.grad is grad for param, grad in zip(opt.param_groups[0]["params"], grads, strict=True))


@pytest.mark.parametrize("arithmetic", ["fp32", "working"])
def test_the_gradient_is_never_written_in_either_arithmetic_nor_when_scaled(arithmetic: str) -> None:
    opt = collage.AdamW(small_params(), strategy="plus-nearest", arithmetic=arithmetic)
    opt.grad_scale = torch.tensor(8.0)
    set_grads(opt, 1)
    before = [hashed(param.grad) for param in opt.param_groups[0]["params"]]
    opt.step()
    assert [hashed(param.grad) for param in opt.param_groups[0]["params"]] == before


def test_float32_gradients_on_bf16_parameters_accumulate_and_step() -> None:
    param = nn.Parameter(values((64,), 0))
    param.grad_dtype = torch.float32
    opt = collage.AdamW([param])
    for seed in (1, 2):
        (param * values((64,), seed)).sum().backward()
    assert param.grad is not None
    assert param.grad.dtype == torch.float32
    opt.step()
    assert opt.state[param]["exp_avg"].dtype == torch.bfloat16


def test_clip_grad_norm_and_zero_grad_work_on_its_parameters() -> None:
    net = model()
    opt = collage.AdamW(net.parameters())
    (net(values((4, 6), 9)).square().mean() * 1e4).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    assert all(param.grad is None for param in net.parameters())
    before = snapshot(opt)
    opt.step()
    assert_same(opt, before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fresh_step_with_zero_lr_and_gradients_creates_the_state_and_is_not_counted(strategy: str) -> None:
    params = small_params(dtype_of(strategy))
    opt = collage.AdamW(params, lr=0.0, strategy=strategy)
    before = [bits(param).clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert all(torch.equal(bits(param), old) for param, old in zip(params, before, strict=True))
    for param in params:
        assert opt.state[param]["step"].item() == 0
        zeros = [
            t
            for name, t in opt.state[param].items()
            if name not in ("master_param", "ordinal") and "_scale" not in name
        ]
        assert not any(t.any() for t in zeros)
    # From here on it is as if that step had not been.
    opt.param_groups[0]["lr"] = 1e-3
    assert_same(steps(opt, 2), steps(collage.AdamW(small_params(dtype_of(strategy)), strategy=strategy), 2))


def test_a_step_with_zero_lr_and_real_gradients_counts() -> None:
    opt = steps(collage.AdamW(small_params(), lr=0.0), 1)
    assert all(opt.state[param]["step"].item() == 1 for param in opt.param_groups[0]["params"])


def test_a_zero_step_later_in_a_run_counts() -> None:
    opt = steps(collage.AdamW(small_params()), 1)
    opt.param_groups[0]["lr"] = 0.0
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert all(opt.state[param]["step"].item() == 2 for param in opt.param_groups[0]["params"])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_not_finite_spoils_the_elements_it_touches_alone(strategy: str, bad: float) -> None:
    dtype = dtype_of(strategy)

    def run(spoiled: bool) -> collage.AdamW:
        opt = collage.AdamW([nn.Parameter(values((30,), 0, dtype))], strategy=strategy)
        for seed in (1, 2, 3):
            set_grads(opt, seed)
            if spoiled and seed == 2:
                opt.param_groups[0]["params"][0].grad[7] = bad
            opt.step()
        return opt

    opt, clean = run(True), run(False)
    others = torch.arange(30) != 7
    for (name, _, a), (_, _, b) in zip(snapshot(opt), snapshot(clean), strict=True):
        if a.dim():
            assert torch.equal(a[others], b[others]), name
    param = opt.param_groups[0]["params"][0]
    assert not torch.isfinite(param[7])
    assert not torch.isfinite(opt.state[param]["exp_avg"][7])
    assert not torch.isfinite(opt.full_param(param)[7])


@pytest.mark.parametrize("strategy", ["light", "plus", "light-nearest", "plus-nearest"])
def test_beside_a_leading_component_that_is_not_finite_the_low_one_is_zero(strategy: str) -> None:
    opt = collage.AdamW([nn.Parameter(values((30,), 0))], strategy=strategy)
    for seed in (1, 2):
        set_grads(opt, seed)
        opt.param_groups[0]["params"][0].grad[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        opt.step()
    param = opt.param_groups[0]["params"][0]
    state = opt.state[param]
    for hi, lo in ((param, "param_lo"), (state["exp_avg_sq"], "exp_avg_sq_lo")):
        if lo in state:
            assert not torch.isfinite(hi[:3]).any()
            assert not state[lo][:3].any()


def test_a_parameter_that_overflows_its_format_becomes_infinite_as_in_torch() -> None:
    param = nn.Parameter(torch.tensor([65000.0, 1.0], dtype=torch.float16))
    opt = collage.AdamW([param], lr=1000.0, weight_decay=0.0)
    param.grad = torch.full_like(param, -1.0)
    opt.step()
    assert param.tolist() == [torch.inf, 1001.0]
    assert opt.state[param]["param_lo"].tolist()[0] == 0.0


# ---- copies, pickles, compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", LOW)
def test_deep_copies_and_pickles_continue_alike_and_apart(strategy: str) -> None:
    opt = steps(collage.AdamW(small_params(dtype_of(strategy)), strategy=strategy), 3)
    copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    before = snapshot(opt)
    for each in copies:
        assert_same(each, before)
        steps(each, 2, first=4)
    assert_same(opt, before)
    steps(opt, 2, first=4)
    for each in copies:
        assert_same(each, opt)


def test_a_copy_of_model_and_optimizer_together_stays_one() -> None:
    net = model()
    opt = steps(collage.AdamW(net.parameters()), 1)
    other_net, other = copy.deepcopy((net, opt))
    assert [id(p) for p in other_net.parameters()] == [id(p) for p in other.param_groups[0]["params"]]
    steps(other, 1, first=2)
    assert not torch.equal(next(net.parameters()), next(other_net.parameters()))


def test_a_strategy_record_in_a_group_is_copied_pickled_and_saved() -> None:
    mine = collage.Strategy("mine", collage.Expansion(3), collage.Rounded("fp32"), collage.Rounded())
    opt = steps(collage.AdamW(small_params(), strategy=mine), 2)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = collage.AdamW(small_params(), strategy=mine)
    with torch.no_grad():
        for a, b in zip(other.param_groups[0]["params"], opt.param_groups[0]["params"], strict=True):
            a.copy_(b)
    other.load_state_dict(torch.load(file, weights_only=True))
    again = pickle.loads(pickle.dumps(opt))
    for each in (opt, other, again):
        steps(each, 1, first=3)
    assert_same(other, opt)
    assert_same(again, opt)


def test_it_stands_beside_a_compiled_model_and_outside_of_a_compiled_step() -> None:
    def train(compiled: bool) -> collage.AdamW:
        net = model()
        opt = collage.AdamW(net.parameters())

        def step(x: Tensor) -> None:
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for seed in (1, 2):
            run(values((4, 6), seed))
        return opt

    assert_same(train(True), train(False))


def test_full_param_is_what_is_held_and_a_new_tensor() -> None:
    opt = steps(collage.AdamW(small_params(), strategy="plus"), 3)
    param = opt.param_groups[0]["params"][1]
    hi, lo = param.detach(), opt.state[param]["param_lo"]
    assert torch.equal(opt.full_param(param, torch.float64), hi.double() + lo.double())
    assert torch.equal(opt.full_param(param), hi.float() + lo.float())
    opt.full_param(param).zero_()
    assert param.any()
    fresh = collage.AdamW(small_params())
    first = fresh.param_groups[0]["params"][0]
    assert torch.equal(fresh.full_param(first), first.float())


@pytest.mark.parametrize("strategy", ["plain", "fp32-states", "mixed", "kahan"])
def test_full_param_is_the_strategys_own_value(strategy: str) -> None:
    opt = steps(collage.AdamW(small_params(), strategy=strategy), 3)
    param = opt.param_groups[0]["params"][0]
    state = opt.state[param]
    wanted = {"mixed": state.get("master_param"), "kahan": param.double() + state.get("param_lo", 0)}
    assert torch.equal(opt.full_param(param, torch.float64), wanted.get(strategy, param).double())


def test_full_param_refuses_strangers_and_other_dtypes() -> None:
    opt = collage.AdamW(small_params())
    with pytest.raises(ValueError, match="in none of its groups"):
        opt.full_param(nn.Parameter(values((2,), 0)))
    with pytest.raises(ValueError, match=r"torch.float32 or torch.float64, got torch.bfloat16"):
        opt.full_param(opt.param_groups[0]["params"][0], torch.bfloat16)

"""State dicts: exact dtypes, no shared memory, bit-equal continuation, and refusal before anything has changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import collage
from comparing import CASES, STRATEGIES, WORKING, assert_same, dtype_of, snapshot, values

SHAPES = [(40,), (3, 7), (), (66, 64)]


def build(strategy: str, dtype: torch.dtype | None = None, **options: Any) -> collage.AdamW:
    dtype = dtype or dtype_of(strategy)
    params = [nn.Parameter(values(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    groups = [{"params": params[:2], "lr": 3e-3, "tag": "body"}, {"params": params[2:], "weight_decay": 0.0}]
    return collage.AdamW(groups, strategy=strategy, **options)


def params_of(opt: collage.AdamW) -> list[nn.Parameter]:
    return [param for group in opt.param_groups for param in group["params"]]


def steps(opt: collage.AdamW, count: int, first: int = 1) -> collage.AdamW:
    for seed in range(first, first + count):
        for i, param in enumerate(params_of(opt)):
            param.grad = values(tuple(param.shape), 1000 * seed + i, param.dtype)
        opt.step()
    return opt


def take_parameters(opt: collage.AdamW, source: collage.AdamW) -> collage.AdamW:
    with torch.no_grad():
        for mine, theirs in zip(params_of(opt), params_of(source), strict=True):
            mine.copy_(theirs)
    return opt


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


HALF = (torch.bfloat16, torch.float16)
SERVED = [*CASES, *((name, torch.float32) for name in STRATEGIES)]


@pytest.mark.parametrize(("strategy", "dtype"), SERVED)
def test_a_run_continued_from_its_state_is_the_run_that_went_on(strategy: str, dtype: torch.dtype) -> None:
    opt = steps(build(strategy, dtype, seed=5), 3)
    saved = through_file(opt.state_dict())
    resumed = take_parameters(build(strategy, dtype), opt)
    resumed.load_state_dict(saved)
    assert_same(resumed, opt)
    assert_same(steps(resumed, 3, first=4), steps(opt, 3, first=4))


@pytest.mark.parametrize("strategy", WORKING)
def test_a_run_in_working_arithmetic_continues_in_it(strategy: str) -> None:
    opt = steps(build(strategy, arithmetic="working"), 2)
    resumed = take_parameters(build(strategy), opt)
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert [group["arithmetic"] for group in resumed.param_groups] == ["working"] * 2
    assert_same(steps(resumed, 2, first=3), steps(opt, 2, first=3))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strategy", ["plus", "mixed", "fp32-states"])
def test_loading_under_another_default_dtype_changes_no_bit_and_still_counts(strategy: str, default) -> None:
    opt = steps(build(strategy), 2)
    for param in params_of(opt):
        opt.state[param]["step"].fill_(300)
    saved = opt.state_dict()
    torch.set_default_dtype(default)
    resumed = take_parameters(build(strategy), opt)
    resumed.load_state_dict(saved)
    assert_same(resumed, opt)
    steps(resumed, 1, first=3)
    assert {float(resumed.state[param]["step"]) for param in params_of(resumed)} == {301.0}


def test_the_groups_of_a_state_hold_plain_types_and_what_people_put_there() -> None:
    opt = build("plus", betas=(0.8, 0.9))
    for group in through_file(opt.state_dict())["param_groups"]:
        assert set(group) >= {*opt.defaults, "params"}
        for key, value in group.items():
            assert type(value) in (str, float, int, bool, list, tuple, type(None)), key
    assert opt.state_dict()["param_groups"][0]["tag"] == "body"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_shares_no_memory_with_the_optimizer_it_came_from(strategy: str) -> None:
    lr = torch.tensor(1e-3)
    opt = steps(build(strategy, lr=lr, betas=(torch.tensor(0.9), torch.tensor(0.99))), 2)
    opt.param_groups[0]["tags"] = ["a"]
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    steps(opt, 1, first=3)
    lr.fill_(7.0)
    opt.param_groups[1]["betas"][0].fill_(0.1)
    opt.param_groups[0]["tags"].append("b")
    assert_equal_states(saved, kept)
    before = snapshot(opt)
    for entry in saved["state"].values():
        for tensor in entry.values():
            tensor.fill_(77)
    assert_same(opt, before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_shares_no_memory_with_the_optimizer_it_went_into(strategy: str) -> None:
    source = steps(build(strategy), 2)
    saved = source.state_dict()
    kept = copy.deepcopy(saved)
    first, second = (take_parameters(build(strategy), source) for _ in range(2))
    first.load_state_dict(saved)
    second.load_state_dict(saved)
    steps(first, 2, first=3)
    assert_equal_states(saved, kept)
    assert_same(second, source)


def assert_equal_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert repr(one["param_groups"]) == repr(other["param_groups"])
    assert one["state"].keys() == other["state"].keys()
    for key, entry in one["state"].items():
        assert entry.keys() == other["state"][key].keys()
        assert all(torch.equal(value, other["state"][key][name]) for name, value in entry.items())


def test_an_empty_state_loads_as_trainers_do_when_they_wrap() -> None:
    opt = build("plus")
    opt.load_state_dict(opt.state_dict())
    assert not opt.state
    assert_same(steps(opt, 2), steps(build("plus"), 2))


def test_a_state_with_some_parameters_untouched_loads() -> None:
    opt = build("plus")
    params_of(opt)[1].grad = values((3, 7), 9)
    opt.step()
    resumed = take_parameters(build("plus"), opt)
    resumed.load_state_dict(through_file(opt.state_dict()))
    assert_same(resumed, opt)
    assert_same(steps(resumed, 1), steps(opt, 1))


def test_hooks_of_state_dicts_run_and_may_change_them() -> None:
    opt = steps(build("plus"), 1)
    seen = []
    opt.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    saved = opt.state_dict()
    assert saved["extra"] == 1
    other = take_parameters(build("plus"), opt)
    other.register_load_state_dict_pre_hook(
        lambda _, state: seen.append("pre") or {**state, "state": dict(state["state"])}
    )
    other.register_load_state_dict_post_hook(lambda each: seen.append(bool(each.state)))
    other.load_state_dict(saved)
    assert seen == ["pre", True]
    assert_same(other, opt)


def test_loading_keeps_the_dtypes_that_torchs_own_loading_casts() -> None:
    opt = steps(build("mixed"), 1)
    other = take_parameters(build("mixed"), opt)
    torch.optim.Optimizer.load_state_dict(other, opt.state_dict())
    assert other.state[params_of(other)[0]]["master_param"].dtype == torch.bfloat16
    other.load_state_dict(opt.state_dict())
    assert other.state[params_of(other)[0]]["master_param"].dtype == torch.float32


# ---- refusals ------------------------------------------------------------------------------------------------------


def edit(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets an entry of a nested state dict; removes it where the value is None."""

    def change(state: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value

    return change


def group_merge(state: dict[str, Any]) -> None:
    first, second = state["param_groups"]
    first["params"] += second["params"]
    del state["param_groups"][1]


WRONG = {
    "strategy": (
        edit(["param_groups", 0, "strategy"], "mixed"),
        "saved with strategy 'mixed', the optimizer has 'plus'",
    ),
    "unknown strategy": (edit(["param_groups", 0, "strategy"], "minus"), "no strategy is called 'minus'"),
    "no strategy": (edit(["param_groups", 0, "strategy"], None), "not a state of a collage optimizer"),
    "no lr": (edit(["param_groups", 1, "lr"], None), "a parameter group of the state lacks lr"),
    "groups": (group_merge, r"groups of \[4\] parameters, the optimizer of \[2, 2\]"),
    "missing": (edit(["state", 1, "param_lo"], None), r"the state of parameter 1 has \['exp_avg'"),
    "extra": (edit(["state", 1, "max_exp_avg_sq"], torch.zeros(3, 7)), "strategy 'plus' on torch.bfloat16 keeps"),
    "dtype": (edit(["state", 0, "exp_avg"], torch.zeros(40)), r"exp_avg of parameter 0 is torch.float32 \(40,\)"),
    "shape": (
        edit(["state", 0, "param_lo"], torch.zeros(41, dtype=torch.bfloat16)),
        r"keeps torch.bfloat16 \(40,\) there",
    ),
    "step dtype": (
        edit(["state", 2, "step"], torch.tensor(3.0, dtype=torch.bfloat16)),
        "step of parameter 2 is torch.bf",
    ),
    "step number": (edit(["state", 2, "step"], 3), "step of parameter 2 is int"),
    "ordinal": (edit(["state", 2, "ordinal"], torch.tensor(2.0)), "ordinal of parameter 2 is torch.float32"),
    "stranger": (edit(["state", 9], {"step": torch.tensor(1.0)}), r"entries \['9'\] that belong to no parameter"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_state_that_does_not_fit_is_refused_and_leaves_everything_as_it_was(change, message: str) -> None:
    saved = steps(build("plus"), 3).state_dict()
    change(saved)
    opt = steps(build("plus", seed=4), 1)
    before, groups = snapshot(opt), repr(opt.param_groups)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert_same(opt, before)
    assert repr(opt.param_groups) == groups
    # The refusal leaves no hook behind.
    good = steps(build("plus"), 3).state_dict()
    opt.load_state_dict(good)
    assert opt.state[params_of(opt)[0]]["step"].item() == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_of_every_other_strategy_is_refused(strategy: str) -> None:
    dtype = dtype_of(strategy)
    saved = steps(build(strategy), 1).state_dict()
    for other in STRATEGIES:
        if other != strategy and dtype_of(other) == dtype:
            with pytest.raises(ValueError, match=f"saved with strategy '{strategy}', .*strategy='{strategy}'"):
                build(other).load_state_dict(saved)


def test_a_state_of_torchs_adamw_is_refused_with_the_way_to_convert_it() -> None:
    params = [nn.Parameter(values(shape, i)) for i, shape in enumerate(SHAPES)]
    reference = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises(ValueError, match=r"not a state of a collage optimizer.*collage\.convert"):
        build("plus").load_state_dict(reference.state_dict())

"""to_low_precision rounds a model and keeps what it rounded away until an optimizer takes it."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

import collage
from comparing import CASES, values

DTYPES = (torch.bfloat16, torch.float16)
KEEPS_ALL = ("mixed", "exact", "exact-fp32-states", "fp8-3")
KEEPS_MORE = ("kahan", "light", "plus", "light-nearest", "plus-nearest", "compact", "compact-4bit", "fp16")
KEEPS_MORE += ("fp8", "fp8-native")


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    with torch.no_grad():
        for i, param in enumerate(net.parameters()):
            param.copy_(values(tuple(param.shape), i, torch.float32, spread=0.3))
    return net


def full(net: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def low_part_error(opt: collage.AdamW, net: nn.Module, wanted: list[Tensor]) -> float:
    pairs = zip(net.parameters(), wanted, strict=True)
    return max(((opt.full_param(p) - w).abs() / w.abs()).max().item() for p, w in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_rounded_in_place_and_buffers_and_others_stay(dtype: torch.dtype) -> None:
    net = model()
    net.register_buffer("table", torch.ones(3))
    net.double_one = nn.Parameter(torch.ones(2, dtype=torch.float64))
    before, objects = full(net), list(net.parameters())
    assert collage.to_low_precision(net, dtype) is net
    assert all(a is b for a, b in zip(net.parameters(), objects, strict=True))
    for param, old in zip(net.parameters(), before, strict=True):
        if old.dtype == torch.float32:
            assert torch.equal(param, old.to(dtype))
            assert param.requires_grad
    assert net.get_buffer("table").dtype == torch.float32
    assert net.double_one.dtype == torch.float64


def test_bfloat16_is_the_default_and_other_dtypes_are_refused() -> None:
    net = collage.to_low_precision(model())
    assert {param.dtype for param in net.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"torch.bfloat16 or torch.float16, got torch.float32"):
        collage.to_low_precision(model(), torch.float32)


@pytest.mark.parametrize(("strategy", "dtype"), CASES)
def test_the_optimizer_holds_what_its_strategy_can_before_the_first_step(strategy: str, dtype: torch.dtype) -> None:
    net = model()
    wanted = full(net)
    opt = collage.AdamW(collage.to_low_precision(net, dtype).parameters(), strategy=strategy)
    for param, value in zip(net.parameters(), wanted, strict=True):
        assert torch.equal(param, opt.full_param(param).to(dtype))
        assert opt.state[param]["step"].item() == 0
        assert (param.float() - value).abs().max() <= value.abs().max() * torch.finfo(dtype).eps / 2
    error = low_part_error(opt, net, wanted)
    if strategy in KEEPS_ALL:
        assert error == 0
    elif strategy in KEEPS_MORE:
        assert error < 2**-16
    else:
        assert error > 2**-13


@pytest.mark.parametrize("strategy", ["plus", "mixed"])
def test_the_first_step_starts_from_the_full_value(strategy: str) -> None:
    net = model()
    wanted = full(net)
    opt = collage.AdamW(collage.to_low_precision(net).parameters(), strategy=strategy, lr=1e-6, weight_decay=0.0)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    for param, value in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(opt.full_param(param), value - 1e-6, rtol=2e-5, atol=1e-7)


def test_a_state_from_before_the_first_step_keeps_the_low_parts() -> None:
    net = model()
    wanted = full(net)
    opt = collage.AdamW(collage.to_low_precision(net).parameters())
    saved = copy.deepcopy(opt.state_dict())
    again = copy.deepcopy(net)
    resumed = collage.AdamW(again.parameters())
    assert low_part_error(resumed, again, wanted) > 2**-13
    resumed.load_state_dict(saved)
    assert low_part_error(resumed, again, wanted) < 2**-16


def test_the_first_optimizer_takes_the_low_parts_and_they_wait_no_longer() -> None:
    net = model()
    wanted = full(net)
    collage.to_low_precision(net)
    assert low_part_error(collage.AdamW(net.parameters()), net, wanted) < 2**-16
    assert low_part_error(collage.AdamW(net.parameters()), net, wanted) > 2**-13


def test_a_refused_constructor_leaves_the_low_parts_for_the_next() -> None:
    net = model()
    wanted = full(net)
    first, *others = collage.to_low_precision(net).parameters()
    with pytest.raises(ValueError, match="lr must be"):
        collage.AdamW([{"params": [first]}, {"params": others, "lr": -1.0}])
    assert low_part_error(collage.AdamW(net.parameters()), net, wanted) < 2**-16


def test_a_group_added_later_takes_its_low_parts() -> None:
    net = model()
    wanted = full(net)
    first, *others = collage.to_low_precision(net).parameters()
    opt = collage.AdamW([first])
    opt.add_param_group({"params": others})
    assert low_part_error(opt, net, wanted) < 2**-16
    assert [opt.state[param]["ordinal"].item() for param in net.parameters()] == list(range(len(wanted)))


def test_tied_weights_are_cast_once_and_stay_tied() -> None:
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    net[1].weight = net[0].weight
    wanted = full(net)
    opt = collage.AdamW(collage.to_low_precision(net).parameters())
    assert net[1].weight is net[0].weight
    assert len(opt.param_groups[0]["params"]) == 1
    assert low_part_error(opt, net, wanted) < 2**-16


def test_a_gradient_of_the_old_dtype_is_dropped() -> None:
    net = model()
    net(torch.ones(1, 5)).sum().backward()
    collage.to_low_precision(net)
    assert all(param.grad is None for param in net.parameters())
    net(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()


def test_changing_a_parameter_before_the_optimizer_warns_and_drops_its_low_part() -> None:
    net = collage.to_low_precision(model())
    weight = next(net.parameters())
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.warns(UserWarning, match="'weight' was changed after collage.to_low_precision"):
        opt = collage.AdamW(net.parameters())
    assert torch.equal(opt.full_param(weight), weight.float())


def test_replacing_a_parameter_before_the_optimizer_warns() -> None:
    net = collage.to_low_precision(model())
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())
    with pytest.warns(UserWarning, match="1 parameters .*'weight'.* were replaced after collage.to_low_precision"):
        collage.AdamW(net.parameters())


def test_an_unharmed_model_gives_no_warning_even_beside_dead_ones() -> None:
    collage.to_low_precision(model())
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collage.AdamW(collage.to_low_precision(model()).parameters())


def test_float32_parameters_left_in_the_model_are_served_beside_cast_ones() -> None:
    net = model()
    wide = net[1]
    net[1] = nn.Identity()
    collage.to_low_precision(net)
    net[1] = wide
    opt = collage.AdamW(net.parameters(), strategy="plus")
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    assert set(opt.state[wide.weight]) == {"step", "exp_avg", "exp_avg_sq"}

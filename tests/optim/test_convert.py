"""Checkpoints between float32 AdamW and precision strategies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import collage
from collage import convert
from comparing import LOW, dtype_of

# Worst error of a parameter as a share of the tensor's largest magnitude: half a unit of the last kept bit.
NEAREST = ("plain", "stochastic", "fp32-states", "naive-8bit", "naive-fp8")
BOUNDS = {**dict.fromkeys(NEAREST, 2**-8), **dict.fromkeys(("mixed", "exact", "exact-fp32-states", "fp8-3"), 0.0)}
BOUNDS |= {"compact": 2**-16, "compact-4bit": 2**-12}
PAIR_BOUND = 2**-17


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 66), nn.LayerNorm(66), nn.Linear(66, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(steps):
        give_gradients(net, step)
        optimizer.step()
    return net, optimizer


def give_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)


def loaded(result: convert.Conversion, strategy: str, dtype: torch.dtype) -> tuple[nn.Module, collage.AdamW]:
    net = copy.deepcopy(trained(0)[0]).to(torch.float32 if strategy == "fp32" else dtype)
    net.load_state_dict(result.model)
    optimizer = collage.AdamW(net.parameters(), strategy=strategy)
    assert result.optimizer is not None
    optimizer.load_state_dict(result.optimizer)
    return net, optimizer


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("strategy", LOW)
def test_a_float32_checkpoint_becomes_a_strategys_within_its_storages_bound(strategy: str, steps: int) -> None:
    net, optimizer = trained(steps)
    dtype = dtype_of(strategy)
    result = convert.from_fp32(net.state_dict(), optimizer.state_dict(), strategy=strategy, dtype=dtype)
    low, taken = loaded(result, strategy, dtype)
    bound = BOUNDS.get(strategy, PAIR_BOUND)
    worst = 0.0
    for param, full in zip(low.parameters(), net.parameters(), strict=True):
        error = (taken.full_param(param, torch.float64) - full.double()).abs().max().item()
        worst = max(worst, error / (full.abs().max().item() or 1.0))
        # A store rounds to the last bit that it keeps before it rounds to the format: near a tie that may differ.
        spacing = (full.abs() * torch.finfo(dtype).eps).clamp(min=torch.finfo(dtype).smallest_normal * 2**-7)
        assert ((param.float() - full).abs() <= spacing * (0.5 + 2**-4)).all()
        assert taken.state[param]["step"].item() == steps
    assert worst <= bound
    assert result.worst["param"] == worst


@pytest.mark.parametrize("strategy", ["mixed", "fp32"])
def test_where_storages_are_float32_the_way_there_and_back_is_exact_and_training_goes_on_bit_equal(
    strategy: str,
) -> None:
    net, optimizer = trained()
    result = convert.from_fp32(net.state_dict(), optimizer.state_dict(), strategy=strategy)
    assert set(result.worst.values()) == {0.0}
    low, taken = loaded(result, strategy, torch.bfloat16)
    back = convert.to_fp32(low.state_dict(), taken.state_dict())
    for name, tensor in net.state_dict().items():
        assert torch.equal(back.model[name], tensor)
    assert back.optimizer is not None
    again = torch.optim.AdamW(copy.deepcopy(net).parameters())
    again.load_state_dict(back.optimizer)
    for entry, twin in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(entry[name], twin[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("strategy", LOW)
def test_to_float32_and_back_restores_a_low_precision_checkpoint_bit_for_bit(strategy: str) -> None:
    net, optimizer = trained()
    dtype = dtype_of(strategy)
    low, taken = loaded(
        convert.from_fp32(net.state_dict(), optimizer.state_dict(), strategy=strategy, dtype=dtype), strategy, dtype
    )
    for step in range(3, 6):
        give_gradients(low, step)
        taken.step()
    saved, model = taken.state_dict(), low.state_dict()
    full = convert.to_fp32(model, saved)
    again = convert.from_fp32(full.model, full.optimizer, strategy=strategy, dtype=dtype)
    assert again.optimizer is not None
    if strategy == "kahan":  # its c is not bound to p: the pair may come back as another pair of the same value
        return
    for name, tensor in model.items():
        assert torch.equal(again.model[name], tensor)
    for key, entry in saved["state"].items():
        assert entry.keys() == again.optimizer["state"][key].keys()
        assert all(torch.equal(value, again.optimizer["state"][key][name]) for name, value in entry.items())


def test_a_model_without_an_optimizer_is_rounded_and_widened() -> None:
    net, _ = trained(0)
    low = convert.from_fp32(net.state_dict(), strategy="plus")
    assert low.optimizer is None
    assert all(torch.equal(low.model[name], tensor.bfloat16()) for name, tensor in net.state_dict().items())
    back = convert.to_fp32(low.model)
    assert all(torch.equal(back.model[name], low.model[name].float()) for name in low.model)


def test_low_parts_from_before_the_first_step_reach_the_float32_checkpoint() -> None:
    net, _ = trained(0)
    wanted = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    collage.to_low_precision(net)
    optimizer = collage.AdamW(net.parameters(), strategy="mixed")
    back = convert.to_fp32(net.state_dict(), optimizer.state_dict())
    assert all(torch.equal(back.model[name], tensor) for name, tensor in wanted.items())


def test_tied_weights_and_buffers_and_names_are_followed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False))
    net[2].weight = net[0].weight
    optimizer = torch.optim.AdamW(net.named_parameters())
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    result = convert.from_fp32(net.state_dict(), optimizer.state_dict(), strategy="light")
    assert torch.equal(result.model["0.weight"], result.model["2.weight"])
    assert result.model["2.weight"].dtype == torch.bfloat16
    assert result.model["1.running_mean"].dtype == torch.float32
    unnamed = torch.optim.AdamW(net.parameters()).state_dict()
    with pytest.raises(ValueError, match="names="):
        convert.from_fp32(net.state_dict(), unnamed)


def test_what_does_not_fit_is_refused_in_words() -> None:
    net, optimizer = trained()
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="no strategy is called"):
        convert.from_fp32(net.state_dict(), state, strategy="pluss")
    with pytest.raises(ValueError, match="to_fp32 first"):
        convert.from_fp32({n: t.bfloat16() for n, t in net.state_dict().items()}, state)
    amsgrad = torch.optim.AdamW(net.parameters(), amsgrad=True)
    give_gradients(net, 0)
    amsgrad.step()
    with pytest.raises(ValueError, match="amsgrad"):
        convert.from_fp32(net.state_dict(), amsgrad.state_dict())
    reordered = list(net.state_dict())[::-1]
    with pytest.raises(ValueError, match="names="):
        convert.from_fp32(net.state_dict(), state, names=reordered)

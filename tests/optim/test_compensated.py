"""Compensated: another optimizer's rule in float32 on hi + lo."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import collage

INNER = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-3),
}


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def give_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(net, step)
        optimizer.step()


@pytest.mark.parametrize("inner", INNER)
def test_with_a_master_copy_it_equals_the_inner_optimizer_on_a_float32_model_bit_for_bit(inner: str) -> None:
    net = model()
    reference = copy.deepcopy(net).float()
    optimizer = collage.Compensated(INNER[inner](net.parameters()), param=collage.Master())
    expected = INNER[inner](reference.parameters())
    for step in range(4):
        give_gradients(net, step)
        for param, other in zip(net.parameters(), reference.parameters(), strict=True):
            assert param.grad is not None
            other.grad = param.grad.float()
        optimizer.step()
        expected.step()
    for param, other in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(optimizer.full_param(param), other.detach())
        assert torch.equal(param.detach(), other.detach().bfloat16())


def test_updates_that_bfloat16_rounds_away_are_kept() -> None:
    param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = collage.Compensated(torch.optim.SGD([param], lr=1e-6))
    for _ in range(200):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert (1 - optimizer.full_param(param)).mean().item() == pytest.approx(2e-4, rel=0.02)


@pytest.mark.parametrize("inner", INNER)
def test_a_reloaded_run_continues_bit_equal(inner: str) -> None:
    net = model()
    optimizer = collage.Compensated(INNER[inner](net.parameters()))
    train(net, optimizer, range(3))
    saved = optimizer.state_dict()
    other = copy.deepcopy(net)
    resumed = collage.Compensated(INNER[inner](other.parameters()))
    resumed.load_state_dict(saved)
    train(net, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for param, twin in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.full_param(param, torch.float64), resumed.full_param(twin, torch.float64))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_bit_equal_and_share_groups_with_their_own_inner(clone) -> None:
    net = model()
    optimizer = collage.Compensated(torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9))
    train(net, optimizer, range(2))
    other, copied = clone((net, optimizer))
    assert copied.param_groups is copied.inner.param_groups
    train(net, optimizer, range(2, 4))
    train(other, copied, range(2, 4))
    for param, twin in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.full_param(param), copied.full_param(twin))


def test_gradients_are_never_written_and_float32_parameters_step_as_the_inner_optimizer_steps_them() -> None:
    net = model()
    net[1].float()
    reference = copy.deepcopy(net[1])
    optimizer = collage.Compensated(torch.optim.AdamW(net.parameters(), lr=1e-3))
    expected = torch.optim.AdamW(reference.parameters(), lr=1e-3)
    give_gradients(net, 0)
    before = [(param.grad, param.grad.clone()) for param in net.parameters() if param.grad is not None]
    for param, other in zip(net[1].parameters(), reference.parameters(), strict=True):
        other.grad = param.grad
    optimizer.step()
    expected.step()
    for param, (same, values) in zip(net.parameters(), before, strict=True):
        assert param.grad is same
        assert torch.equal(same, values)
    for param, other in zip(net[1].parameters(), reference.parameters(), strict=True):
        assert torch.equal(param, other)


def test_an_inner_step_that_raises_leaves_parameters_and_gradients_as_they_were() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("broken")

    net = model()
    optimizer = collage.Compensated(Broken(net.parameters(), lr=1.0))
    give_gradients(net, 0)
    before = [(param.detach().clone(), param.grad) for param in net.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    for param, (values, grad) in zip(net.parameters(), before, strict=True):
        assert param.dtype == torch.bfloat16
        assert torch.equal(param.detach(), values)
        assert param.grad is grad


def test_low_parts_of_a_cast_model_are_taken() -> None:
    net = model(torch.float32)
    wanted = [param.detach().clone() for param in net.parameters()]
    collage.to_low_precision(net)
    optimizer = collage.Compensated(torch.optim.SGD(net.parameters(), lr=1e-3), param=collage.Master())
    for param, value in zip(net.parameters(), wanted, strict=True):
        assert torch.equal(optimizer.full_param(param), value)


def test_schedulers_and_new_groups_reach_the_inner_optimizer() -> None:
    net = model()
    optimizer = collage.Compensated(torch.optim.SGD(net[0].parameters(), lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 0.25})
    train(net, optimizer, range(1))
    schedule.step()
    assert [group["lr"] for group in optimizer.inner.param_groups] == [0.5, 0.125]


def test_what_cannot_be_served_is_refused_in_words() -> None:
    net = model()
    with pytest.raises(TypeError, match="LBFGS"):
        collage.Compensated(torch.optim.LBFGS(net.parameters()))
    optimizer = collage.Compensated(torch.optim.SGD(net.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="none of its groups"):
        optimizer.full_param(torch.zeros(1))
    train(net, optimizer, range(1))
    saved = optimizer.state_dict()
    del saved["state"][0]["param_lo"]
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="param_lo"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    for key, entry in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in entry.items())

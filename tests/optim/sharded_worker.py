"""One of two processes that train sharded parameters and compare with one process: run by test_sharded.py."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import collage
from comparing import bits, dtype_of, values

SHAPES = [(37, 24), (33, 24), (24,), (1, 24), (5, 3, 4), (33, 256)]


def grads(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [values(shape, 10 * step + i + 20, dtype) for i, shape in enumerate(SHAPES)]


def start(dtype: torch.dtype) -> list[torch.Tensor]:
    return [values(shape, i, dtype) for i, shape in enumerate(SHAPES)]


def optimizer(params: list[nn.Parameter], strategy: str) -> collage.AdamW:
    return collage.AdamW(params, lr=1e-3, weight_decay=0.1, strategy=strategy, seed=9)


def alone(strategy: str, steps: int) -> collage.AdamW:
    dtype = dtype_of(strategy)
    params = [nn.Parameter(value) for value in start(dtype)]
    opt = optimizer(params, strategy)
    for step in range(steps):
        for param, grad in zip(params, grads(step, dtype), strict=True):
            param.grad = grad
        opt.step()
    return opt


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    # No process group gathers int16.
    return tensor.to(torch.int32).full_tensor().short() if tensor.dtype == torch.int16 else tensor.full_tensor()


def assert_equal(opt: collage.AdamW, reference: collage.AdamW) -> None:
    for mine, theirs in zip(opt.param_groups[0]["params"], reference.param_groups[0]["params"], strict=True):
        assert torch.equal(bits(whole(mine)), bits(theirs)), "parameters differ"
        for name, wanted in reference.state[theirs].items():
            found = whole(opt.state[mine][name])
            assert found.dtype == wanted.dtype, name
            assert torch.equal(bits(found), bits(wanted)), f"{name} differs"


def placed(strategy: str, placements: list[Shard | Replicate]) -> None:
    """Parameters sharded along the given dimensions, uneven shards included, step as whole ones."""
    mesh, dtype = init_device_mesh("cpu", (2,)), dtype_of(strategy)
    where = [
        p if not isinstance(p, Shard) or p.dim < len(s) else Replicate()
        for p, s in zip(placements, SHAPES, strict=True)
    ]
    params = [nn.Parameter(distribute_tensor(value, mesh, [p])) for value, p in zip(start(dtype), where, strict=True)]
    opt = optimizer(params, strategy)
    for step in range(3):
        for param, grad, place in zip(params, grads(step, dtype), where, strict=True):
            param.grad = distribute_tensor(grad, mesh, [place])
        opt.step()
    reference = alone(strategy, 3)
    assert_equal(opt, reference)
    for mine, theirs in zip(params, reference.param_groups[0]["params"], strict=True):
        assert torch.equal(bits(whole(opt.full_param(mine))), bits(reference.full_param(theirs)))


def fsdp(strategy: str) -> None:
    """fully_shard, low parts, audits, its checkpoint's zero step, and loading on."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 37, bias=False), nn.Linear(37, 128), nn.Linear(128, 33))

    mesh, dtype = init_device_mesh("cpu", (2,)), dtype_of(strategy)
    x = values((4, 24), 3, dtype, spread=1.0)

    def train(net: nn.Module, opt: collage.AdamW, steps: int) -> None:
        for _ in range(steps):
            (net(x).float().square().mean() * 2.0**10).backward()
            opt.step()
            opt.zero_grad()

    one, sharded, loaded = model(), model(), model()
    for net in (sharded, loaded):
        fully_shard(net, mesh=mesh)
    for net in (one, sharded, loaded):
        collage.to_low_precision(net, dtype)
    opts = [optimizer(list(net.parameters()), strategy) for net in (one, sharded, loaded)]
    assert_equal(opts[1], opts[0])
    audits = [collage.audit(opt, every=1) for opt in opts[:2]]
    train(one, opts[0], 2)
    train(sharded, opts[1], 2)
    assert_equal(opts[1], opts[0])
    wanted, found = (audit.report()["total"] for audit in audits)
    assert found == pytest.approx(wanted, rel=1e-6), "audits differ"
    state = get_optimizer_state_dict(sharded, opts[1])
    for mine, theirs in zip(loaded.parameters(), sharded.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    set_optimizer_state_dict(loaded, opts[2], state)
    train(one, opts[0], 2)
    train(sharded, opts[1], 2)
    train(loaded, opts[2], 2)
    assert_equal(opts[1], opts[0])
    assert_equal(opts[2], opts[0])


class TwoHalves(nn.Module):
    """Adds up the second product as two processes with half of its inputs each do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(24, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        if isinstance(self.up.weight, DTensor):
            return self.down(hidden)
        halves = zip(hidden.chunk(2, 1), self.down.weight.chunk(2, 1), strict=True)
        first, second = (nn.functional.linear(part, weight) for part, weight in halves)
        return first + second


def tensor_parallel(strategy: str) -> None:
    """Column- and row-parallel layers."""
    mesh, dtype = init_device_mesh("cpu", (2,)), dtype_of(strategy)
    x = values((4, 24), 3, dtype, spread=1.0)
    opts = []
    for plan in ({}, {"up": ColwiseParallel(), "down": RowwiseParallel()}):
        net = collage.to_low_precision(parallelize_module(TwoHalves(), mesh, plan) if plan else TwoHalves(), dtype)
        opts.append(optimizer(list(net.parameters()), strategy))
        for _ in range(3):
            (net(x).float().square().mean() * 2.0**10).backward()
            opts[-1].step()
            opts[-1].zero_grad()
    assert_equal(opts[1], opts[0])


def cut_blocks_are_refused() -> None:
    """Before anything changes: a row of 128 is one block, of which each process would have half."""
    mesh, value = init_device_mesh("cpu", (2,)), values((64, 128), 0)
    param = nn.Parameter(distribute_tensor(value, mesh, [Shard(1)]))
    opt = optimizer([param], "compact")
    param.grad = distribute_tensor(values((64, 128), 1), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"no whole blocks of 128.*shard it along its first dimension"):
        opt.step()
    assert torch.equal(whole(param), value)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    cut_blocks_are_refused()
    for strategy in sys.argv[1:]:
        for dim in (0, 1):
            placed(strategy, [Shard(dim)] * len(SHAPES))
        placed(strategy, [Replicate()] * len(SHAPES))
        fsdp(strategy)
        tensor_parallel(strategy)
        if dist.get_rank() == 0:
            print(f"{strategy}: equal")
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()

"""One of two processes that are advised on a sharded model, and on the whole one: run by test_advise.py."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import collage
from comparing import values

# To nearest: their sums do not depend on which process draws which bits.
CANDIDATES = ["plain", "light-nearest", "plus-nearest"]


def model() -> nn.Module:
    """Rows that two processes share unequally, and a single one, of which the second process has nothing."""
    torch.manual_seed(0)
    layers = {"odd": nn.Linear(64, 65), "even": nn.Linear(65, 64, bias=False), "single": nn.Linear(64, 1, bias=False)}
    return nn.Sequential(*layers.values()).bfloat16()


def advised(net: nn.Module) -> tuple[collage.Advice, collage.Advice]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(4):
        (net(values((16, 64), step, spread=1.0)).float() ** 2).mean().backward()
        if step < 3:
            optimizer.step()
            optimizer.zero_grad()
    return collage.advise(net, optimizer, candidates=CANDIDATES), collage.advise(net, optimizer)


def figures(advice: collage.Advice) -> list[Any]:
    return [(row.module, row.elements, row.strategy, row.trials) for row in advice.rows]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    sharded, whole = model(), model()
    for layer in sharded.children():
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    found, wanted = advised(sharded), advised(whole)
    for advice in found:
        everywhere: list[Any] = [None, None]
        dist.all_gather_object(everywhere, figures(advice))
        assert everywhere[0] == everywhere[1]
    assert [row.module for row in found[0].rows] == ["0", "1", "2"]
    for mine, theirs in zip(found[0].rows, wanted[0].rows, strict=True):
        assert (mine.module, mine.elements, mine.strategy) == (theirs.module, theirs.elements, theirs.strategy)
        for name, trial in theirs.trials.items():
            for figure in ("edq_ratio", "decay_kept", "noise", "bytes_per_param"):
                assert abs(getattr(mine.trials[name], figure) - getattr(trial, figure)) < 1e-6
    assert [row.elements for row in found[1].rows] == [row.elements for row in wanted[1].rows]
    if dist.get_rank() == 0:
        print("equal")
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()

"""One of some processes that train a model in tiles with FSDP2 or DDP and compare with one process: run by
test_sharded.py."""

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
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import collage
from comparing import bits, values

# Rows that two processes share unequally, and equally in tiles of 128 and of 64.
ROWS = (129, 256, 192)


def model(strategy: str, shards: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Embedding(ROWS[0], 64), nn.Linear(64, ROWS[1]), nn.Linear(ROWS[1], ROWS[2], bias=False)]
    return collage.to_fp8_(nn.Sequential(*layers).bfloat16(), strategy, shards=shards)


def optimizer(net: nn.Module, strategy: str) -> collage.AdamW:
    return collage.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1, strategy=strategy, seed=9)


def train(net: nn.Module, opt: collage.AdamW, steps: int) -> None:
    for step in range(steps):
        batch = torch.arange(40) * (step + 3) % ROWS[0]
        (net(batch).float() * values((40, ROWS[2]), step, torch.float32, spread=1.0)).sum().backward()
        opt.step()
        opt.zero_grad()


def assert_equal(sharded: collage.AdamW, whole: collage.AdamW) -> None:
    rank = dist.get_rank()
    for mine, theirs in zip(sharded.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
        here = mine._local_tensor if isinstance(mine, DTensor) else mine
        pairs = [(mine, theirs), *((sharded.state[mine][name], t) for name, t in whole.state[theirs].items())]
        for found, wanted in pairs:
            local = found._local_tensor if isinstance(found, DTensor) else found
            parts = zip(getattr(local, "parts", [local]), getattr(wanted, "parts", [wanted]), strict=True)
            for part, full in parts:
                own = full.chunk(dist.get_world_size())[rank] if isinstance(found, DTensor) and full.dim() else full
                assert torch.equal(bits(part), bits(own))
        assert isinstance(here, collage.TiledTensor) == isinstance(theirs, collage.TiledTensor)


def fsdp(strategy: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole, sharded, loaded = (model(strategy, 2) for _ in range(3))
    for net in (sharded, loaded):
        for layer in net.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    opts = [optimizer(net, strategy) for net in (whole, sharded, loaded)]
    train(whole, opts[0], 2)
    train(sharded, opts[1], 2)
    assert_equal(opts[1], opts[0])
    state = get_optimizer_state_dict(sharded, opts[1])
    with torch.no_grad():
        for mine, theirs in zip(loaded.parameters(), sharded.parameters(), strict=True):
            mine._local_tensor.copy_(theirs._local_tensor)
    set_optimizer_state_dict(loaded, opts[2], state)
    for net, opt in zip((whole, sharded, loaded), opts, strict=True):
        train(net, opt, 2)
    assert_equal(opts[1], opts[0])
    assert_equal(opts[2], opts[0])


def gathered_bytes() -> None:
    """What goes between processes for the weights in tiles: their bytes, and no 16-bit numbers."""
    sizes: list[tuple[torch.dtype, int]] = []
    weight = model("fp8", 2)[1].weight
    inputs, _ = weight[:128].fsdp_pre_all_gather(
        init_device_mesh("cpu", (2,)), weight.shape, weight.stride(), None, None
    )
    sizes = [(each.dtype, each.numel()) for each in inputs]
    assert sizes == [(torch.uint8, 128 * 64), (torch.uint8, 128 * 64), (torch.uint8, 1)]


def cut_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"129 rows in tiles of 128 .*parts of 65 rows.*to_fp8_\(model, shards="):
        fully_shard(model("fp8", 1), mesh=init_device_mesh("cpu", (2,)))


def ddp(strategy: str) -> None:
    """Replicas of equal weights: each process has the gradient of half the batch, the mean of both is that of all."""
    whole, replica = model(strategy, 1), model(strategy, 1)
    wrapped = DistributedDataParallel(replica, init_sync=False)
    opts = [optimizer(net, strategy) for net in (whole, replica)]
    train(whole, opts[0], 2)
    train(wrapped, opts[1], 2)
    assert_equal(opts[1], opts[0])


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    several = dist.get_world_size() > 1
    if several:
        gathered_bytes()
        cut_tiles_are_refused()
    for strategy in sys.argv[1:]:
        fsdp(strategy)
        if several:
            ddp(strategy)
        if dist.get_rank() == 0:
            print(f"{strategy}: equal")
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()

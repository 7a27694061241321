"""One of several processes of a sharded run: run by test_sharded_runs.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import collage
from collage.cli import main
from collage.train import checkpoints, loop, processes, sharded, shards
from collage.train.config import TrainConfig
from collage.train.models import build_model, parameter_groups


def killed(when: str, step: int, arguments: Sequence[str]) -> None:
    """The second process dies at the beginning of a step, or in a save once its shards are written."""
    schedule, write_data = loop.learning_rate, shards._Writer.write_data

    def at_step(config: TrainConfig, number: int) -> float:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return schedule(config, number)

    def in_save(self: Any, plan: Any, planner: Any) -> Any:
        write_data(self, plan, planner).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        if when == "step":
            loop.learning_rate = at_step
        else:
            shards._Writer.write_data = in_save  # pyright: ignore[reportAttributeAccessIssue]
    main([*arguments])


def copied(sources: Sequence[Path], out: Path) -> None:
    """Load each checkpoint into a sharded model and save it again, while the tensors change."""
    config = TrainConfig.from_json(checkpoints.read_json(sources[0] / "trainer.json", "")["config"])
    accelerator = processes.start_processes(config)
    for source in sources:
        # Other weights than those in the checkpoints.
        model = build_model(config.model, vocab_size=257, seq_len=config.seq_len, seed=99, attention="eager")
        processes.shard(model, torch.device("cpu"), accelerator.num_processes, "model")
        collage.to_low_precision(model)
        groups = parameter_groups(model, config.weight_decay)
        optimizer = collage.AdamW(groups, strategy=config.strategy, seed=config.seed)
        saves = sharded.Saves(out / source.parent.parent.name, keep=1)
        saves.start(sharded.load(source, config, model, optimizer), config, model, optimizer)
        for tensor in sharded.tensors(model, optimizer).values():
            processes.local(tensor.detach()).zero_()
        saves.wait()
    whole_norm(accelerator)
    reduced(accelerator)
    replicated(accelerator)
    # Nothing of a checkpoint with other dtypes is loaded: the tensors stay at zero.
    wanted = sharded.tensors(model, optimizer)
    name = list(wanted)[-1]
    wanted[name] = wanted[name].to(torch.float64)
    with pytest.raises(shards.ShardsError, match=rf"{name} must be torch.float64 .*, got torch."):
        shards.read_into(sources[0], wanted)
    assert not any(processes.local(tensor).any() for tensor in wanted.values())
    dist.barrier()


def whole_norm(accelerator: Any) -> None:
    """The gradient's norm is that of all shards, in fp32: bfloat16 has no 257."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (accelerator.num_processes,))
    param = torch.nn.Parameter(torch.zeros(257**2, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    part = torch.nn.Parameter(dist.tensor.distribute_tensor(param.detach(), mesh, [dist.tensor.Shard(0)]))
    part.grad = dist.tensor.distribute_tensor(param.grad, mesh, [dist.tensor.Shard(0)])
    assert processes.gradient_norm([param], accelerator) == 257
    assert processes.gradient_norm([part], accelerator) == pytest.approx(257, rel=1e-6)


def reduced(accelerator: Any) -> None:
    """Of (768 + 3 + 3) / 3 bfloat16 loses the small ones if it begins with the large one, which float32 doesn't."""
    x = torch.full((1, 3), 3.0, dtype=torch.bfloat16)
    x[0, dist.get_rank()] = 768.0
    # FSDP2's sum over gloo is exact here in either dtype.
    for dtype, cut in (("model", False), ("float32", False), ("float32", True)):
        model = collage.to_low_precision(torch.nn.Linear(3, 1, bias=False))
        if cut:
            processes.shard(model, torch.device("cpu"), 3, dtype)
        # Held until after backward: gradients are added up by what wraps the model.
        net = model if cut else processes.replicate(model, accelerator, dtype)
        net(x).sum().backward()
        assert model.weight.grad is not None
        grad: Any = model.weight.grad
        mean = grad.full_tensor() if cut else grad
        assert bool((mean == 258.0).all()) == (dtype == "float32"), (dtype, cut, mean)


def replicated(accelerator: Any) -> None:
    """What tiles hold beyond bfloat16 stays when DDP takes the model."""
    torch.manual_seed(0)
    model = collage.to_fp8_(torch.nn.Linear(64, 64))
    assert isinstance(model.weight, collage.TiledTensor)
    before = model.weight.exact()
    processes.replicate(model, accelerator, "model")
    assert torch.equal(model.weight.exact(), before)


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if mode == "copied":
        copied([Path(each) for each in rest[1:]], Path(rest[0]))
    else:
        killed(mode, int(rest[0]), rest[1:])

"""Checkpoints of a sharded run: written by all its processes in the background, read by any number of them.

step-000120/shard-00001-model-00001-of-00002.safetensors   the first process's parts of the weights
step-000120/shard-00001-model-00002-of-00002.safetensors   its parts of the optimizer's state
step-000120/{config,optimizer,trainer}.json                as of any run; trainer.json lists the shards, too

The first process gives the folder its final name when all have written. `checkpoints.read` reads these as well.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

import collage
from collage.train import checkpoints, shards
from collage.train.checkpoints import CheckpointError, Progress
from collage.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Saves:
    """The saves of one run, of which one at a time is under way. All processes make and use it together.

    Args:
        folder: where the checkpoints stand; all processes must see it.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep
        # A group of its own: the training's collectives go on meanwhile.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._under_way: Future[Any] | None = None

    def start(self, progress: Progress, config: TrainConfig, model: PreTrainedModel, optimizer: Optimizer) -> None:
        """Begin to write a checkpoint; training may go on at once. Waits for the save before.

        Raises:
            OSError: the save before failed, or the folder can't be written to.
        """
        self.wait()
        first = dist.get_rank() == 0
        failed = None
        aside = self.folder / f".step-{progress.step:06d}"
        if first:
            try:
                checkpoints.make_aside(self.folder, progress.step)
            except OSError as error:
                failed = str(error)
        said = [failed]
        dist.broadcast_object_list(said, group=self._group)
        if said[0] is not None:
            raise OSError(said[0])
        trainer = checkpoints.trainer_facts(progress, config)
        # Not the optimizer's own, which would clone the whole state on the device.
        groups = Optimizer.state_dict(optimizer)["param_groups"]
        model_json = model.config.to_json_string()

        def finish() -> None:
            files = sorted(file.name for file in aside.glob("*.safetensors"))
            checkpoints.write_facts(aside, {**trainer, "shards": files}, groups, model_json)
            checkpoints.commit(aside, self._keep)

        self._under_way = shards.write(aside, tensors(model, optimizer), self._group, finish)

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            OSError: the last one failed; checkpoints before it are whole, and nothing of it is left.
        """
        future, self._under_way = self._under_way, None
        if future is None:
            return
        try:
            with shards.failing("not all processes wrote their shards"):
                future.result()
        except BaseException:
            if dist.get_rank() == 0:
                with suppress(OSError):
                    checkpoints.remove_abandoned(self.folder)
            raise


def tensors(model: torch.nn.Module, optimizer: Optimizer, *, by_index: bool = False) -> dict[str, Tensor]:
    """The very tensors that a checkpoint has, by the names it has for them.

    Args:
        model: its weights, tied ones once, those in tiles as their components.
        optimizer: on named parameters, each with its state.
        by_index: names as in checkpoints that aren't sharded, where the optimizer's are "index.state".
    """
    tied = checkpoints.tied_names(model)
    prefix = "" if by_index else shards.WEIGHTS
    weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    found = {f"{prefix}{name}": tensor for name, tensor in collage.split_tiles(weights).items()}
    pairs = [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]
    for index, (name, param) in enumerate(pairs):
        prefix = f"{index}" if by_index else f"{shards.OPTIMIZER}{name}"
        found |= {f"{prefix}.{key}": value for key, value in optimizer.state[param].items()}
    return found


def load(path: Path, config: TrainConfig, model: torch.nn.Module, optimizer: Optimizer) -> Progress:
    """Put a checkpoint, sharded or not, into a sharded model and its optimizer, bit for bit.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint belongs to other settings.
    """
    remedy = f"remove the folder {path} to go on from the checkpoint before it"
    trainer = checkpoints.read_json(path / "trainer.json", remedy)
    checkpoints.check_config(path, trainer, config)
    create_states(optimizer)
    try:
        shards.read_into(path, tensors(model, optimizer, by_index="shards" not in trainer))
    except shards.ShardsError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    return checkpoints.progress_of(trainer)


def create_states(optimizer: Optimizer) -> None:
    """Create the state of a fresh optimizer's parameters by a step that changes nothing, as FSDP and DCP do."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate

"""One model on several processes: whole in each (DDP), or sharded over them (FSDP2); and gradients of either.

Accelerate sets up the processes, under torchrun as under `accelerate launch`, but torch shards the model: accelerate
does it only together with the optimizer, on whose parameters the low parts are by then, and wraps that, which stands
between a loss scaler and float16 gradients.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from collage.storage import form_of
from collage.train.config import TrainConfig, UserError


def start_processes(config: TrainConfig) -> Accelerator:
    """Accelerate's view of the processes that this one is among.

    Raises:
        UserError: accelerate was told to shard the model itself, or doesn't see the processes.
    """
    # Without being told so it takes each of several processes on a machine without a GPU for one that is alone.
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise UserError(
            f"all {started} processes that were started must work together, got {accelerator.num_processes} that "
            f"accelerate can join on {accelerator.device.type}; start one for each device, or pass --device cpu"
        )
    own = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in own:
        raise UserError(
            f"accelerate must leave the model as it is, got its {accelerator.distributed_type.value}; launch it with "
            "--multi_gpu (or --cpu), and let collage shard: collage train --fsdp"
        )
    return accelerator


# ---- the model -------------------------------------------------------------------------------------------------


def shard(model: nn.Module, device: torch.device, processes: int, reduce_dtype: str) -> None:
    """Shard a model in place over all processes, block by block, and move it to the device.

    Args:
        model: in float32, the same in every process; sharded first and cast then, its low parts stay with it.
        device: of this process.
        processes: how many there are.
        reduce_dtype: what gradients are added up in over the processes: "model" or "float32".
    """
    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if reduce_dtype == "float32" else None)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def blocks(model: nn.Module) -> list[nn.Module]:
    """A model's transformer blocks: the members of its outermost lists of modules.

    Embeddings are none of them and stay with the root, where a tied one is a single parameter still.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for name in outermost for block in model.get_submodule(name).children()]


def replicate(model: nn.Module, accelerator: Accelerator, reduce_dtype: str) -> nn.Module:
    """The model itself on one process; on several wrapped by DDP, which adds up the gradients in `reduce_dtype`."""
    if accelerator.num_processes > 1 and any(form_of(param) for param in model.parameters()):
        # What DDP broadcasts first it writes into tiles rounded to bfloat16; and accelerate can't tell it not to.
        devices = [accelerator.device] if accelerator.device.type != "cpu" else None
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model, device_ids=devices, init_sync=False)
    else:
        wrapped = accelerator.prepare_model(model, device_placement=False)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and reduce_dtype == "float32":
        # DDP compares a hook's annotations with classes, which those of this module are not: they are text.
        wrapped.register_comm_hook(None, lambda _, bucket: _mean_in_float32(bucket))  # pyright: ignore[reportArgumentType]
    return wrapped


def _mean_in_float32(bucket: Any) -> torch.futures.Future[Tensor]:
    low = bucket.buffer()
    shares = low.to(torch.float32, copy=True).div_(dist.get_world_size())
    added = dist.all_reduce(shares, async_op=True)
    assert added is not None
    return added.get_future().then(lambda done: low.copy_(done.value()[0]))


# ---- gradients -------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process; the tensor itself unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """The norm of the whole gradient over all shards, computed in fp32: a scalar, the same in every process."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(local(grad), dtype=torch.float32) for grad in grads])
    norm = torch.linalg.vector_norm(norms)
    if not any(isinstance(grad, DTensor) for grad in grads):
        return norm
    everywhere: Any = accelerator.gather(norm.reshape(1))
    return torch.linalg.vector_norm(everywhere)


def peer_died(error: BaseException) -> bool:
    """Whether an error says that another process is gone: NCCL's and the like, or gloo's, which is of no class of its
    own."""
    return isinstance(error, dist.DistBackendError) or "by peer" in str(error)

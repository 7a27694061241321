"""Files of shards: torch's distributed checkpointing (DCP) on safetensors, without pickle.

Each process writes the parts of the tensors that it has, and reads those it needs, from whatever number of processes
they come. Tensors are saved, not gathered: neither gloo nor NCCL gathers int16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

WEIGHTS, OPTIMIZER = "model.", "optimizer."
"""What the names of tensors begin with: ``model.NAME``, ``optimizer.NAME.STATE``."""


class ShardsError(OSError):
    """Shards that couldn't be written or read, or that aren't what is wanted."""


def write(
    aside: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup, finish: Callable[[], None]
) -> Future[Any]:
    """Have all processes write their parts of `tensors` to the folder `aside`, in the background.

    The tensors may change as soon as this returns: copies are written.

    Args:
        aside: a folder that all processes see.
        tensors: the same names in every process; of what isn't sharded one process writes its own.
        group: of all processes, on the CPU, used by nobody else.
        finish: called in the first process alone, once all have written.

    Returns:
        The future of the save in this process; `failing` says how it fails.
    """
    writer = _Writer(aside, tensors, finish)
    return cast("Future[Any]", async_save(dict(tensors), storage_writer=writer, process_group=group))


class _Writer(HuggingFaceStorageWriter):
    """Weights and optimizer states in files of their own for each process."""

    def __init__(self, path: Path, names: Mapping[str, Any], finish: Callable[[], None]) -> None:
        files = {name: 1 if name.startswith(WEIGHTS) else 2 for name in names}
        super().__init__(str(path), fqn_to_index_mapping=files, save_distributed=True)
        self._finish = finish

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        self._finish()


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill this process's parts of `tensors` from the safetensors files in a folder; all processes take part.

    Raises:
        ShardsError: a file can't be read, or a tensor isn't there in the very dtype and shape; nothing is changed then.
    """
    with failing(f"{path} can't be read"):
        reader = HuggingFaceStorageReader(str(path))
        _check(reader.read_metadata().state_dict_metadata, tensors)
        load(dict(tensors), storage_reader=reader)


def read_whole(path: Path) -> dict[str, Tensor]:
    """All tensors in a folder of shards, whole and in this process's memory.

    Raises:
        ShardsError: a file can't be read.
    """
    with failing(f"{path} can't be read"):
        reader = HuggingFaceStorageReader(str(path))
        found = cast("dict[str, Any]", reader.read_metadata().state_dict_metadata)
        tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in found.items()}
        with warnings.catch_warnings():
            # That it assumes to be alone is what is meant.
            warnings.filterwarnings("ignore", message=".*single process", category=UserWarning)
            load(tensors, storage_reader=reader, no_dist=True)
        return tensors


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turns what DCP and safetensors raise into `ShardsError`."""
    try:
        yield
    except CheckpointException as error:
        # It is no Exception, and holds one for each process where it failed.
        process, (cause, _) = min(error.failures.items())
        raise ShardsError(f"{what}: {cause} (process {process})") from error
    except (OSError, SafetensorError) as error:
        raise error if isinstance(error, ShardsError) else ShardsError(f"{what}: {error}") from error


def _check(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    # DCP would cast a tensor of another dtype without a word.
    if found.keys() != wanted.keys():
        different = sorted(found.keys() ^ wanted.keys())
        raise ShardsError(f"its tensors differ from those wanted in {', '.join(different[:3])}")
    for name, tensor in wanted.items():
        have, want = (found[name].properties.dtype, tuple(found[name].size)), (tensor.dtype, tuple(tensor.shape))
        if have != want:
            raise ShardsError(f"{name} must be {want[0]} {want[1]}, got {have[0]} {have[1]}")

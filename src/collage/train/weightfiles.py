"""The weights of a checkpoint of any training, tensor by tensor: safetensors, torch files, shards, DCP, collage's own.

Torch files are read without running what a pickle may hold (``weights_only``), mapped into memory where they can be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from collage.optim.strategies import layout_of
from collage.train import checkpoints
from collage.train.config import UserError

Tensors = dict[str, Callable[[], Tensor]]

TORCH = (".pt", ".pth", ".bin", ".ckpt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors")
# Where trainers put the weights among other things.
HOLDERS = ("state_dict", "model_state_dict", "model", "module")


def open_weights(path: Path) -> Tensors:
    """Name -> what reads the tensor, for a checkpoint's file or folder.

    A run of ``collage train`` stands for its newest checkpoint. Of collage's own checkpoints the tensors are the values
    that the strategy holds (hi + lo, the master copy), not the leading components alone.

    Raises:
        UserError: nothing there that can be read.
    """
    if not path.exists():
        raise UserError(f"{path} doesn't exist; give a checkpoint's file or folder")
    try:
        found = _file(path) if path.is_file() else _folder(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} can't be read as a checkpoint: {error}") from error
    if not found:
        raise UserError(
            f"no weights in {path}; served are safetensors, {', '.join(TORCH)}, an index of shards, a folder with one "
            "of these, a torch.distributed.checkpoint folder, a run of collage train"
        )
    return found


def _folder(path: Path) -> Tensors:
    if (path / "checkpoints").is_dir():
        newest = checkpoints.latest(path / "checkpoints")
        if newest is None:
            raise UserError(f"the run {path} has no whole checkpoint")
        path = newest
    if not checkpoints.missing_files(path):
        return _own(path)
    if (path / ".metadata").is_file():
        return _distributed(path)
    for name in (*INDEXES, *WHOLE):
        if (path / name).is_file():
            return _file(path / name)
    files = sorted(each for each in path.iterdir() if each.suffix in (".safetensors", *TORCH))
    # Without a name that says so, several files may be shards; optimizers and schedulers are none.
    shards = [each for each in files if each.suffix == ".safetensors"] or files[: 1 if len(files) == 1 else 0]
    return {name: read for each in shards for name, read in _file(each).items()}


def _file(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            return {name: partial(_from_safetensors, path, name) for name in opened.keys()}  # noqa: SIM118
    if path.suffix == ".json":
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {file: _file(path.parent / file) for file in sorted(set(shards.values()))}
        return {name: files[file][name] for name, file in shards.items()}
    if path.suffix in TORCH:
        return {name: partial(_given, tensor) for name, tensor in _tensors(_load_torch(path)).items()}
    return {}


def _from_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as opened:
        return opened.get_tensor(name)


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        # Files from before the zip format cannot be mapped.
        if "mmap" not in str(error):
            raise
    except Exception as error:
        raise UserError(
            f"{path} holds more than tensors and plain types, and isn't run: {str(error).splitlines()[0]}; save the "
            "state dict alone, or as safetensors"
        ) from error
    return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Any) -> dict[str, Tensor]:
    """The state dict in a file: the content itself, or what stands under one of the usual names."""
    if not isinstance(content, Mapping):
        return {}
    for holder in HOLDERS:
        if isinstance(content.get(holder), Mapping):
            found = _tensors(content[holder])
            if found:
                return found
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _distributed(path: Path) -> Tensors:
    """A folder of torch.distributed.checkpoint: everything but the optimizer's."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    known = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name: partial(_from_distributed, path, name, each.size, each.properties.dtype)
        for name, each in known.items()
        if isinstance(each, TensorStorageMetadata) and not name.startswith(("optim", "lr_scheduler"))
    }


def _from_distributed(path: Path, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    out = {name: torch.empty(shape, dtype=dtype)}
    load(out, storage_reader=FileSystemReader(path), no_dist=True)
    return out[name]


def _own(path: Path) -> Tensors:
    """A checkpoint of collage's: each parameter as the strategy holds it."""
    weights = _file(path / "model.safetensors")
    groups = checkpoints.read_json(path / "optimizer.json", "take another checkpoint")["param_groups"]
    for group in groups:
        for index, name in zip(group["params"], group.get("param_names", ()), strict=False):
            if name in weights:
                weights[name] = partial(_held, path, weights[name], index, group["strategy"])
    return weights


def _held(path: Path, read: Callable[[], Tensor], index: int, strategy: Any) -> Tensor:
    """The value that a strategy holds for a parameter, in float64 where it is more than one component."""
    param = read()
    layout = layout_of(strategy, param)
    names = layout.param.state_names("param", param.dtype)[1:]
    if not names:
        return param
    with safe_open(path / "optimizer.safetensors", "pt") as opened:
        if f"{index}.{names[0]}" not in opened.keys():  # noqa: SIM118
            return param
        state = {name: opened.get_tensor(f"{index}.{name}") for name in names}
    return layout.param.exact(layout.parts("param", param, state)).view(param.shape)

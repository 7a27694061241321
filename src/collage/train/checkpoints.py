"""Checkpoints without pickle, written aside and renamed: a folder that bears its final name is whole.

step-000120/model.safetensors       the weights the model computes with, and config.json: transformers can load it;
                                    weights in tiles as their components (collage.split_tiles)
step-000120/optimizer.safetensors   every tensor of the optimizer's state, as "index.name"
step-000120/optimizer.json          the parameter groups
step-000120/trainer.json            step, settings, loss scale, where a streamed text was read up to

A sharded run has shard-*.safetensors in place of the first two files: see `collage.train.sharded`.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import Optimizer

import collage
from collage.train.config import TrainConfig, UserError, resumed
from collage.train.runfiles import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "trainer.json")


class CheckpointError(UserError):
    """A checkpoint that can't be read, or that belongs to another run."""


@dataclass(frozen=True)
class Saved:
    """What the files of a checkpoint hold.

    Attributes:
        trainer: step, settings, loss scale, place in a streamed text.
        weights: the model's tensors by name; of tied ones the first name alone.
        optimizer: the optimizer's ``state_dict()``.
    """

    trainer: dict[str, Any]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """How far a run has come; all that a run needs beside the model and the optimizer.

    Attributes:
        step: optimizer steps done.
        wall_time_s: seconds spent on them.
        scaler: the loss scaler's state; empty without one.
        data: where a streamed text was read up to (`stream.Stream.state`); empty for any other.
    """

    step: int
    wall_time_s: float
    scaler: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)


# ---- writing ---------------------------------------------------------------------------------------------------


def save(
    folder: Path, progress: Progress, config: TrainConfig, model: PreTrainedModel, optimizer: Optimizer, keep: int
) -> Path:
    """Write the checkpoint of `progress.step` into `folder`, then remove all but the newest `keep`.

    Until the new checkpoint is whole and on the disk, the older ones stay as they are.
    """
    aside = make_aside(folder, progress.step)
    try:
        saved = whole(progress, config, model, optimizer)
        write(aside, saved, model.config.to_json_string())
        return commit(aside, keep)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what saves that were cut off have left in a folder of checkpoints."""
    for abandoned in folder.glob(".step-*"):
        shutil.rmtree(abandoned)


def make_aside(folder: Path, step: int) -> Path:
    """An empty folder for a checkpoint in the making, the only one of its kind in `folder`."""
    remove_abandoned(folder)
    aside = folder / f".step-{step:06d}"
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, keep: int) -> Path:
    """Bring a folder of `make_aside` to the disk and give it its final name; then remove all but the newest `keep`."""
    folder, target = aside.parent, aside.with_name(aside.name.removeprefix("."))
    # Only a folder that isn't whole can stand there under another content: steps replayed have the same bits.
    if target.exists():
        shutil.rmtree(target)
    _rename(aside, target)
    for old in set(_numbered(folder)) - set(_complete(folder)[-keep:]):
        shutil.rmtree(old)
    return target


def _rename(aside: Path, target: Path) -> None:
    for path in aside.iterdir():
        _to_disk(path)
    _to_disk(aside)
    aside.rename(target)
    _to_disk(target.parent)


def merge(path: Path, out: Path) -> None:
    """Write a checkpoint, sharded or not, to the new folder `out` in the files of one that isn't sharded.

    Raises:
        UserError: `path` is no whole checkpoint, or `out` exists.
        OSError: `out` can't be written to; nothing is left of it.
    """
    missing = missing_files(path)
    if missing:
        raise UserError(f"the folder of a whole checkpoint is wanted, got {path}, which lacks {', '.join(missing[:3])}")
    if out.exists():
        raise UserError(f"the merged checkpoint's folder must be a new one, got {out}, which exists; name another")
    saved = read(path, "take another checkpoint")
    model_json = (path / "config.json").read_text(encoding="utf-8")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        trainer = {key: value for key, value in saved.trainer.items() if key != "shards"}
        write(aside, replace(saved, trainer=trainer), model_json)
        _rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def whole(progress: Progress, config: TrainConfig, model: PreTrainedModel, optimizer: Optimizer) -> Saved:
    """What a checkpoint of a model that isn't sharded holds."""
    tied = tied_names(model)
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items() if name not in tied
    }
    return Saved(trainer_facts(progress, config), weights, optimizer.state_dict())


def trainer_facts(progress: Progress, config: TrainConfig) -> dict[str, Any]:
    """The content of trainer.json."""
    return {**asdict(progress), "config": config.to_json()}


def write(folder: Path, saved: Saved, model_json: str) -> None:
    """Write the files of a checkpoint that isn't sharded; `model_json` is the configuration of its model."""
    save_file(collage.split_tiles(saved.weights), folder / "model.safetensors", metadata={"format": "pt"})
    tensors = {
        f"{index}.{name}": tensor.cpu()
        for index, entry in saved.optimizer["state"].items()
        for name, tensor in entry.items()
    }
    save_file(tensors, folder / "optimizer.safetensors")
    write_facts(folder, saved.trainer, saved.optimizer["param_groups"], model_json)


def write_facts(folder: Path, trainer: dict[str, Any], groups: list[dict[str, Any]], model_json: str) -> None:
    """Write what a checkpoint holds beside tensors."""
    (folder / "config.json").write_text(model_json, encoding="utf-8")
    write_json(folder / "optimizer.json", {"param_groups": groups})
    write_json(folder / "trainer.json", trainer)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------------


def _numbered(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def missing_files(path: Path) -> list[str]:
    """The files that a folder lacks to be a whole checkpoint."""
    return [name for name in _files(path) if not (path / name).is_file()]


def _files(path: Path) -> list[str]:
    try:
        shards = json.loads((path / "trainer.json").read_text(encoding="utf-8")).get("shards")
    except (OSError, ValueError, AttributeError):
        shards = None
    return [*FILES] if shards is None else [*shards, *FILES[2:]]


def _complete(folder: Path) -> list[Path]:
    return [path for path in _numbered(folder) if not missing_files(path)]


def latest(folder: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None."""
    found = _complete(folder)
    return found[-1] if found else None


def load(path: Path, config: TrainConfig, model: torch.nn.Module, optimizer: Optimizer) -> Progress:
    """Put a checkpoint into the model and the optimizer, bit for bit, and return how far it had come.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint belongs to other settings.
    """
    saved = read(path, f"remove the folder {path} to go on from the checkpoint before it")
    check_config(path, saved.trainer, config)
    try:
        load_weights(model, with_tied(model, saved.weights))
        optimizer.load_state_dict(saved.optimizer)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} doesn't fit this model and optimizer: {error}") from error
    return progress_of(saved.trainer)


def progress_of(trainer: dict[str, Any]) -> Progress:
    """How far a run had come, from the content of trainer.json."""
    return Progress(trainer["step"], trainer["wall_time_s"], trainer["scaler"], trainer.get("data", {}))


def read(path: Path, remedy: str) -> Saved:
    """The content of a checkpoint's files.

    Raises:
        CheckpointError: a file can't be read; the message ends with `remedy`.
    """
    trainer = read_json(path / "trainer.json", remedy)
    groups = read_json(path / "optimizer.json", remedy)["param_groups"]
    groups = [{**group, "betas": tuple(group["betas"])} for group in groups]
    read_tensors = _read_files if trainer.get("shards") is None else _read_shards
    weights, state = read_tensors(path, groups, remedy)
    return Saved(trainer, weights, {"state": state, "param_groups": groups})


_Read = tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]


def _read_files(path: Path, groups: list[dict[str, Any]], remedy: str) -> _Read:
    weights = collage.join_tiles(_read_tensors(path / "model.safetensors", remedy))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in _read_tensors(path / "optimizer.safetensors", remedy).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return weights, state


def _read_shards(path: Path, groups: list[dict[str, Any]], remedy: str) -> _Read:
    from collage.train import shards

    try:
        tensors = shards.read_whole(path)
    except shards.ShardsError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    index = {name: key for g in groups for name, key in zip(g["param_names"], g["params"], strict=True)}
    weights, state = {}, {}
    for key, tensor in tensors.items():
        if key.startswith(shards.WEIGHTS):
            weights[key.removeprefix(shards.WEIGHTS)] = tensor
        else:
            param, _, name = key.removeprefix(shards.OPTIMIZER).rpartition(".")
            state.setdefault(index[param], {})[name] = tensor
    return collage.join_tiles(weights), state


def check_config(path: Path, trainer: dict[str, Any], config: TrainConfig) -> None:
    """Raise `CheckpointError` unless a run with the settings `config` can go on with the checkpoint of trainer.json."""
    try:
        resumed(TrainConfig.from_json(trainer["config"]), config.to_json())
    except UserError as error:
        raise CheckpointError(f"{path} is a checkpoint of other settings: {error}") from error


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put `weights` into the model, bit for bit; where it is sharded each process takes its parts.

    Raises:
        ValueError: a tensor of another dtype.
        RuntimeError: other names or shapes than the model's.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name in weights and weights[name].dtype != tensor.dtype:
            raise ValueError(f"{name} must be {tensor.dtype}, got {weights[name].dtype}")
    model.load_state_dict({name: placed_like(w, own[name]) if name in own else w for name, w in weights.items()})


def placed_like(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has whole, sharded as `tensor` is; a count of one element stays whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(tensor, DTensor) or whole.ndim == 0:
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Names in the model's state under which a tensor stands again -> its first name."""
    first: dict[int, str] = {}
    names = model.state_dict(keep_vars=True)
    return {name: kept for name, tensor in names.items() if (kept := first.setdefault(id(tensor), name)) != name}


def with_tied(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` with the very tensor under each name that the model has for it."""
    tied = {name: first for name, first in tied_names(model).items() if first in weights}
    return weights | {name: weights[first] for name, first in tied.items()}


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises CheckpointError, which ends with `remedy`, if it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; {remedy}") from error


def _read_tensors(path: Path, remedy: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read: {error}; {remedy}") from error

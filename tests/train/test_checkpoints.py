from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import collage
from collage.train import checkpoints
from collage.train.checkpoints import CheckpointError, Progress
from collage.train.config import TrainConfig
from collage.train.models import build_model, parameter_groups


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def parts(config: TrainConfig, steps: int = 2, seed: int = 0) -> tuple[Any, collage.AdamW]:
    model = build_model(config.model, vocab_size=50, seq_len=8, seed=seed)
    if config.model_dtype != torch.float32:
        collage.to_low_precision(model, config.model_dtype)
    optimizer = collage.AdamW(parameter_groups(model, 0.1), strategy=config.strategy, seed=1)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return model, optimizer


def tensors(model: Any, optimizer: collage.AdamW) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    found = {f"{key}.{name}": tensor for key, entry in state.items() for name, tensor in entry.items()}
    return {**model.state_dict(), **found}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("strategy", collage.strategies())
def test_every_tensor_comes_back_bit_for_bit(tiny: TrainConfig, folder: Path, strategy: str) -> None:
    config = replace(tiny, strategy=strategy)
    model, optimizer = parts(config)
    path = checkpoints.save(folder, Progress(2, 1.5, {}), config, model, optimizer, keep=2)
    other, fresh = parts(config, steps=0, seed=5)
    assert checkpoints.load(path, config, other, fresh) == Progress(2, 1.5, {})
    before, after = tensors(model, optimizer), tensors(other, fresh)
    assert {n: (t.dtype, raw(t)) for n, t in before.items()} == {n: (t.dtype, raw(t)) for n, t in after.items()}
    assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]


def test_no_file_of_a_checkpoint_is_a_pickle(tiny: TrainConfig, folder: Path) -> None:
    path = checkpoints.save(folder, Progress(2, 1.0, {}), tiny, *parts(tiny), keep=2)
    assert path.name == "step-000002"
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept_and_the_latest_is_the_highest(tiny: TrainConfig, folder: Path) -> None:
    model, optimizer = parts(tiny)
    assert checkpoints.latest(folder) is None
    for step in (2, 999_999, 1_000_000, 10):
        checkpoints.save(folder, Progress(step, 0.0, {}), tiny, model, optimizer, keep=3)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000010", "step-1000000", "step-999999"]
    assert checkpoints.latest(folder) == folder / "step-1000000"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_save_that_fails_harms_nothing_and_leaves_no_litter(
    tiny: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    model, optimizer = parts(tiny)
    first = checkpoints.save(folder, Progress(2, 0.0, {}), tiny, model, optimizer, keep=1)
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    saved, calls = checkpoints.save_file, []

    def breaks(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == failing:
            raise OSError("no space left on device")
        saved(*arguments, **options)

    monkeypatch.setattr(checkpoints, "save_file", breaks)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(folder, Progress(3, 0.0, {}), tiny, model, optimizer, keep=1)
    assert list(folder.iterdir()) == [first]
    assert {file.name: file.read_bytes() for file in first.iterdir()} == before


def test_the_files_of_a_checkpoint_are_on_the_disk_before_it_has_its_name(
    tiny: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (folder / "step-000002").exists()))
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    path = checkpoints.save(folder, Progress(2, 0.0, {}), tiny, *parts(tiny), keep=2)
    before = {inode for inode, named in synced if not named}
    assert {file.stat().st_ino for file in [path, *path.iterdir()]} <= before
    assert (folder.stat().st_ino, True) in synced


def test_a_folder_that_is_not_whole_is_no_checkpoint_and_is_replaced(tiny: TrainConfig, folder: Path) -> None:
    model, optimizer = parts(tiny)
    checkpoints.save(folder, Progress(2, 0.0, {}), tiny, model, optimizer, keep=2)
    broken = checkpoints.save(folder, Progress(3, 0.0, {}), tiny, model, optimizer, keep=2)
    (broken / "optimizer.json").unlink()
    (folder / ".step-000004").mkdir()
    (folder / ".step-000004" / "model.safetensors").write_bytes(b"left by a run that was killed")
    assert checkpoints.latest(folder) == folder / "step-000002"
    checkpoints.save(folder, Progress(3, 0.0, {}), tiny, model, optimizer, keep=2)
    assert checkpoints.latest(folder) == broken
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("name", checkpoints.FILES)
def test_a_damaged_file_is_named_with_a_remedy(tiny: TrainConfig, folder: Path, name: str) -> None:
    model, optimizer = parts(tiny)
    path = checkpoints.save(folder, Progress(2, 0.0, {}), tiny, model, optimizer, keep=2)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} can't be read.*remove the folder .*step-000002"):
        checkpoints.load(path, tiny, model, optimizer)


def test_a_checkpoint_of_other_settings_is_refused_with_their_names(tiny: TrainConfig, folder: Path) -> None:
    path = checkpoints.save(folder, Progress(2, 0.0, {}), tiny, *parts(tiny), keep=2)
    wanted = replace(tiny, strategy="mixed", lr=0.5, log_every=7)
    with pytest.raises(CheckpointError, match=r"other settings: .*--strategy mixed \(the run has plus\); --lr 0.5"):
        checkpoints.load(path, wanted, *parts(wanted))


def test_tensors_of_another_strategy_or_model_are_refused(tiny: TrainConfig, folder: Path) -> None:
    path = checkpoints.save(folder, Progress(2, 0.0, {}), tiny, *parts(tiny), keep=2)
    with pytest.raises(CheckpointError, match="doesn't fit this model and optimizer"):
        checkpoints.load(path, tiny, *parts(replace(tiny, strategy="light")))
    with pytest.raises(CheckpointError, match=r"must be torch.float32, got torch.bfloat16"):
        checkpoints.load(path, tiny, *parts(replace(tiny, strategy="fp32")))


def test_tied_weights_are_saved_once_and_come_back_tied(tiny: TrainConfig, folder: Path) -> None:
    def tied(seed: int) -> Any:
        model = build_model(tiny.model, vocab_size=50, seq_len=8, seed=seed)
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return model

    model, other = tied(0), tied(5)
    ((second, first),) = checkpoints.tied_names(model).items()
    config = replace(tiny, strategy="fp32")
    optimizers = [collage.AdamW(parameter_groups(each, 0.1), strategy="fp32") for each in (model, other)]
    path = checkpoints.save(folder, Progress(2, 0.0, {}), config, model, optimizers[0], keep=1)
    saved = checkpoints.read(path, "").weights
    assert (first in saved, second in saved) == (True, False)
    checkpoints.load(path, config, other, optimizers[1])
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert raw(other.get_output_embeddings().weight.detach()) == raw(model.get_input_embeddings().weight.detach())
    assert checkpoints.tied_names(parts(tiny)[0]) == {}

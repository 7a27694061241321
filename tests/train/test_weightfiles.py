"""Checkpoints of any training: every kind of file gives the same tensors; what cannot be read is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import collage
from collage.cli import main
from collage.train import checkpoints
from collage.train.config import TrainConfig, UserError
from collage.train.weightfiles import open_weights
from comparing import values

WEIGHTS = {"embed.weight": values((5, 3), 0), "norm.weight": torch.ones(4, dtype=torch.bfloat16)}


def assert_read(path: Path) -> None:
    found = open_weights(path)
    assert set(found) == set(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert torch.equal(found[name](), tensor)
        assert found[name]().dtype == tensor.dtype


def test_safetensors_alone_in_a_folder_and_sharded(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert_read(tmp_path / "model.safetensors")
    assert_read(tmp_path)
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, (name, tensor) in enumerate(WEIGHTS.items(), 1):
        save_file({name: tensor}, shards / f"model-{number}-of-2.safetensors")
    assert_read(shards)
    names = {name: f"model-{number}-of-2.safetensors" for number, name in enumerate(WEIGHTS, 1)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    assert_read(shards)
    assert_read(shards / "model.safetensors.index.json")


@pytest.mark.parametrize(
    "content",
    [WEIGHTS, {"state_dict": WEIGHTS, "epoch": 3}, {"model": {"module": WEIGHTS}, "optimizer": {"state": {}}}],
    ids=["bare", "lightning", "nested"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "weights.pt")
    assert_read(tmp_path)


def test_a_sharded_torch_checkpoint(tmp_path: Path) -> None:
    for name, tensor in WEIGHTS.items():
        torch.save({name: tensor}, tmp_path / f"{name}.bin")
    names = {name: f"{name}.bin" for name in WEIGHTS}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    assert_read(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_folder_of_torchs_distributed_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({**WEIGHTS, "optim": {"exp_avg": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_read(tmp_path / "dcp")


class Runs:
    """What a pickle must not be able to do."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_what_cannot_be_read_is_an_error_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(2), "extra": Runs()}, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="holds more than tensors and plain types, and isn't run"):
        open_weights(tmp_path / "pickle.pt")
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="doesn't exist"):
        open_weights(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no weights in"):
        open_weights(tmp_path / "empty")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        open_weights(tmp_path / "broken.safetensors")


def own_checkpoints(folder: Path, strategy: str) -> tuple[Path, Path, nn.Module]:
    """Two checkpoints of ours, three small steps apart."""

    class Config:
        def to_json_string(self) -> str:
            return "{}"

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model.config = Config()  # type: ignore[assignment]
    collage.to_low_precision(model)
    optimizer = collage.AdamW(model.named_parameters(), lr=1e-5, strategy=strategy)
    paths = []
    for step in range(5):
        for place, param in enumerate(model.parameters()):
            param.grad = values(tuple(param.shape), 10 * step + place)
        optimizer.step()
        if step in (1, 4):
            progress = checkpoints.Progress(step, 0.0, {})
            saved: Any = checkpoints.save(folder / "checkpoints", progress, TrainConfig(), model, optimizer, keep=9)  # type: ignore[arg-type]
            paths.append(saved)
    return *paths, model  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("strategy", "stands"), [("plain", True), ("light", False), ("exact", False), ("mixed", False)]
)
def test_of_collages_own_checkpoints_the_whole_value_is_compared(
    tmp_path: Path, strategy: str, stands: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, model = own_checkpoints(tmp_path, strategy)
    assert set(open_weights(tmp_path)) == {name for name, _ in model.named_parameters()}
    main_quietly(["audit", str(first), str(second), "--all", "--json", str(tmp_path / "out.json")])
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    gains = figures["kinds"]["norm gains"]
    assert (gains["still"], gains["unchanged_fraction"]) == ((1, 1.0) if stands else (0, pytest.approx(0, abs=0.3)))
    assert ("exactly 1" in shown) is stands
    assert "1.weight" in shown


def main_quietly(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_the_command_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(tmp_path / "a"), str(tmp_path / "b")])
    assert ended.value.code == 2
    assert "doesn't exist; give a checkpoint's file or folder" in capsys.readouterr().err

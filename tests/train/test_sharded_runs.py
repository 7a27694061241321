"""Runs sharded over several processes, their checkpoints, and processes that die."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoModelForCausalLM

from collage import split_tiles
from collage.train import checkpoints, processes, runfiles
from collage.train.checkpoints import merge
from collage.train.config import TrainConfig, UserError
from collage.train.loop import train

WORKER = Path(__file__).with_name("sharded_run_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# Of several processes on CPUs accelerate itself starts none without MPI.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=400, env=ENVIRONMENT, cwd=cwd)


@pytest.fixture
def config(text: Path) -> TrainConfig:
    # Without clipping, whose factor follows from a norm that shards add up in another order.
    settings: dict[str, Any] = {"model": "gpt-tiny", "strategy": "exact", "steps": 6, "batch_size": 6, "seq_len": 128}
    # Seven validation windows, of which the processes get unequal shares and unequally many micro-batches.
    settings |= {"data": str(text), "eval_batches": 2, "eval_every": 3, "audit_every": 3, "checkpoint_every": 2}
    settings |= {"keep_checkpoints": 9, "clip": 0.0, "micro_batch": 3}
    return TrainConfig(**settings, schedule="constant", warmup=1, threads=1, fsdp=True)


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint with its dtype and shape, bit for bit."""
    saved = checkpoints.read(checkpoint, "")
    names = [name for group in saved.optimizer["param_groups"] for name in group["param_names"]]
    tensors = {
        f"{names[key]} {role}": t for key, entry in saved.optimizer["state"].items() for role, t in entry.items()
    }
    assert len(tensors) > len(saved.weights)
    return {
        f"{name} {t.dtype} {tuple(t.shape)}": t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in (tensors | split_tiles(saved.weights)).items()
    }


def records(out: Path, *keys: str) -> list[list[Any]]:
    return [[record.get(key) for key in keys] for record in runfiles.read_metrics(out / "metrics.jsonl")]


def test_a_sharded_run_equals_one_process_and_goes_on_with_any_number(config: TrainConfig, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config.to_json()))
    one, two, copies = (tmp_path / name for name in ("one", "two", "copies"))
    train(config, one)
    done = run(*TORCHRUN, 2, "-m", "collage", "train", "--config", settings, "--out", two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished 6 steps") == 1
    facts = runfiles.read_run(two)
    assert (facts["processes"], facts["sharded"]) == (2, True)

    # Two shares added up in any order are the same; so are all bits.
    assert records(two, "step", "loss", "lr", "lost_fraction") == records(one, "step", "loss", "lr", "lost_fraction")
    for key in ("grad_norm", "validation_loss", "edq_ratio"):
        found, expected = ([value for (value,) in records(out, key) if value is not None] for out in (two, one))
        assert found
        assert found == pytest.approx(expected, rel=1e-6), key
    last = [out / "checkpoints/step-000006" for out in (one, two)]
    assert contents(last[1]) == contents(last[0])
    assert len(list(last[1].glob("shard-*.safetensors"))) == 4

    # Saved on two or on one, loaded on three, of which some have nothing of small tensors, and saved again.
    done = run(*TORCHRUN, 3, WORKER, "copied", copies, *reversed(last))
    assert done.returncode == 0, done.stderr
    for name in ("one", "two"):
        assert contents(copies / name / "step-000006") == contents(last[0])
        assert not list((copies / name).glob(".*"))

    # One process goes on with what two have done, as with what it has done itself.
    for out in (one, two):
        train(runfiles.resume_config(out, {"steps": 8}), out, resume=True)
    assert contents(two / "checkpoints/step-000008") == contents(one / "checkpoints/step-000008")
    merge(last[1], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(last[0])
    assert not checkpoints.missing_files(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in checkpoints.read(last[0], "").weights.items())
    with pytest.raises(UserError, match=r"must be a new one, got .*merged, which exists"):
        merge(last[1], tmp_path / "merged")

    lost = sorted(last[1].glob("shard-*"))[0]
    lost.unlink()
    assert checkpoints.missing_files(last[1]) == [lost.name]
    with pytest.raises(UserError, match=rf"whole checkpoint is wanted, got .*, which lacks {lost.name}"):
        merge(last[1], tmp_path / "other")


def test_weights_in_tiles_are_sharded_and_go_on_in_one_process(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, strategy="fp8", steps=4, eval_every=0)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config.to_json()))
    one, two = tmp_path / "one", tmp_path / "two"
    train(config, one)
    done = run(*TORCHRUN, 2, "-m", "collage", "train", "--config", settings, "--out", two)
    assert done.returncode == 0, done.stderr
    bits = contents(two / "checkpoints/step-000004")
    assert bits == contents(one / "checkpoints/step-000004")
    assert sum(".hi torch.float8_e4m3fn" in name for name in bits) == 6

    for out in (one, two):
        train(runfiles.resume_config(out, {"steps": 6}), out, resume=True)
    assert contents(two / "checkpoints/step-000006") == contents(one / "checkpoints/step-000006")
    with pytest.raises(UserError, match=r"got --fsdp False \(the run has True\); allowed to change: --audit-every, "):
        runfiles.resume_config(two, {"fsdp": False})


def test_processes_that_die_cost_the_steps_since_the_last_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    config = replace(config, strategy="compact")
    settings.write_text(json.dumps(config.to_json()))
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["train", "--config", settings, "--out"]

    done = run(*TORCHRUN, 2, WORKER, "step", 4, *arguments, out)
    assert done.returncode != 0
    # The survivor says so too, unless torchrun ends it before it can.
    assert "SIGKILL" in done.stderr
    assert os.listdir(out / "checkpoints") == ["step-000002"]
    done = run(*TORCHRUN, 2, WORKER, "save", 0, *arguments, out, "--resume")
    assert done.returncode != 0
    assert [row[0] for row in records(out, "step")][:4] == [1, 2, 3, 4]
    assert not (out / "checkpoints/step-000004").exists()
    # Left by a machine that lost its power in a save.
    abandoned = out / "checkpoints/.step-000004"
    shutil.copytree(out / "checkpoints/step-000002", abandoned, dirs_exist_ok=True)

    done = run(*ACCELERATE, 2, "--module", "collage", "train", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(out / "checkpoints")) == ["step-000002", "step-000004", "step-000006"]
    train(config, whole)
    assert records(out, "step", "loss", "lost_fraction") == records(whole, "step", "loss", "lost_fraction")
    assert contents(out / "checkpoints/step-000006") == contents(whole / "checkpoints/step-000006")


def test_the_loop_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/distributed.md").read_text(encoding="utf-8")
    (tmp_path / "loop.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    done = run(*TORCHRUN, 2, "loop.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint/.metadata").is_file()


def test_the_model_is_sharded_by_its_outermost_blocks() -> None:
    inner = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))
    model = nn.ModuleDict({"embed": nn.Embedding(1, 1), "layers": nn.ModuleList([inner, nn.Linear(1, 1)])})
    assert processes.blocks(model) == list(model["layers"].children())


def test_a_model_that_accelerate_shards_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=1)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: accelerator)
    with pytest.raises(UserError, match=r"leave the model as it is, got its FSDP; .*collage train --fsdp"):
        processes.start_processes(config)


def test_processes_that_would_each_train_alone_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(processes, "Accelerator", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="all 2 processes that were started must work together, got 1"):
        processes.start_processes(config)

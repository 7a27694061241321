"""One run shared by several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from collage.train import checkpoints, processes, runfiles
from collage.train.config import TrainConfig
from collage.train.loop import train

MODULE = [sys.executable, "-W", "error", "-m"]
TORCHRUN = [*MODULE, "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture
def config(text: Path) -> TrainConfig:
    # In fp32, so that the order in which gradients are added up is all that differs.
    settings: dict[str, Any] = {"model": "gpt-tiny", "strategy": "fp32", "steps": 6, "batch_size": 4, "seq_len": 16}
    # An odd number of validation windows, of which the processes get unequal shares.
    settings |= {"data": str(text), "eval_batches": 1, "eval_every": 3, "audit_every": 3, "checkpoint_every": 3}
    return TrainConfig(**settings, schedule="constant", warmup=1, threads=1, device="cpu")


def shared(processes: int, *options: object) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, str(processes), "-m", "collage", "train", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def test_the_number_of_processes_changes_nothing_but_rounding(config: TrainConfig, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config.to_json()))
    one = train(config, tmp_path / "one")
    done = shared(2, "--config", settings, "--out", tmp_path / "two", "--json", tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished 6 steps") == 1
    two = runfiles.read_run(tmp_path / "two")
    assert two == json.loads((tmp_path / "two.json").read_text())
    for name in ("init_sha256", "batches_sha256", "corpus"):
        assert two[name] == one[name]
    records = [runfiles.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [r["step"] for r in records[1]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "tokens", "validation_loss", "update_norm"):
        expected, found = ([r[key] for r in each if key in r] for each in records)
        assert found == pytest.approx(expected, rel=1e-4), key

    # A checkpoint belongs to no number of processes: one goes on with what two have done.
    grown = runfiles.resume_config(tmp_path / "two", {"steps": 9})
    assert train(grown, tmp_path / "two", resume=True)["final"]["step"] == 9
    assert checkpoints.latest(tmp_path / "two/checkpoints") == tmp_path / "two/checkpoints/step-000009"


def test_the_errors_of_a_process_that_is_gone_are_told_from_others() -> None:
    gone = [RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:123")]
    gone += [RuntimeError("Read error [127.0.0.1]:123: Connection reset by peer"), dist.DistBackendError("NCCL")]
    assert all(map(processes.peer_died, gone))
    assert not any(map(processes.peer_died, [RuntimeError("out of memory"), OSError("no space left on device")]))

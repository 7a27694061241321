"""Sharded parameters step on their local parts and have the bits of whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from collage.optim.sharding import runs
from comparing import LOW, values

WORKER, FP8_WORKER = (Path(__file__).with_name(name) for name in ("sharded_worker.py", "sharded_fp8_worker.py"))
FP8 = ["fp8", "fp8-native", "fp8-3"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": os.pathsep.join([str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")]),
}


@pytest.mark.parametrize(
    ("worker", "strategies", "processes"),
    [(WORKER, LOW, 2), (FP8_WORKER, FP8, 2), (FP8_WORKER, FP8[:1], 1)],
    ids=["any", "tiles", "tiles in a process that is alone"],
)
def test_processes_with_sharded_parameters_have_the_bits_of_one(
    worker: Path, strategies: list[str], processes: int
) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *run, str(worker), *strategies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{name}: equal" for name in strategies]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_a_whole_parameter_is_one_run(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(values(shape, 0))
    assert runs(param) == [(0, 0, param.numel())]

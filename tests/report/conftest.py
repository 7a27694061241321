"""Run files made by hand, as `collage train` leaves them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collage.train.config import TrainConfig

BYTES = {"plain": 8.0, "light": 10.0, "plus": 12.0, "mixed": 16.0, "fp32": 16.0}
LOST = {"plain": 0.83, "light": 0.0, "plus": 0.0, "mixed": 0.0004, "fp32": 0.0}
WORSE = {"plain": 0.03, "light": 0.002, "plus": 0.001, "mixed": 0.0, "fp32": 0.0}


def loss_at(strategy: str, seed: int, step: int, steps: int) -> float:
    noise = random.Random(1000 * seed + step).gauss(0.0, 0.05)
    return 2.0 + 3.0 * math.exp(-4 * step / steps) + noise + WORSE.get(strategy, 0.0) * step / steps


def records(strategy: str, seed: int, steps: int, last: int) -> list[dict[str, Any]]:
    made = []
    for step in range(1, last + 1):
        record: dict[str, Any] = {"step": step, "tokens": 2048 * step, "loss": loss_at(strategy, seed, step, steps)}
        if step % 10 == 0:
            record["edq_ratio"] = 1.0 - LOST.get(strategy, 0.0) * step / steps
            record["lost_fraction"] = LOST.get(strategy, 0.0) * step / steps
        made.append(record)
    return made


def final(strategy: str, seed: int, steps: int) -> dict[str, Any]:
    loss = 2.1 + 0.01 * seed + WORSE.get(strategy, 0.0) * (1 + 0.1 * seed)
    lost = LOST.get(strategy, 0.0)
    return {
        "step": steps,
        "tokens": 2048 * steps,
        "train_loss": loss - 0.1,
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "edq_ratio": 1.0 - lost,
        "lost_fraction": lost,
        "lost_fraction_hi": max(lost, 0.8),
        "v_lost_fraction": 0.4 if strategy in ("plain", "light") else 0.0,
        "tokens_per_s": 5000.0 + seed,
    }


MODULES = ("model.embed", "model.layers.0.mlp.up", "model.layers.0.norm", "head")


def audits(strategy: str, steps: int, last: int) -> list[dict[str, Any]]:
    """Records of audit.jsonl in which each module loses a little more than the one before, but the last nothing."""
    made = []
    for step in range(10, last + 1, 10):
        lost = LOST.get(strategy, 0.0) * step / steps
        shares = {name: lost * (1 + index) / 4 if name != "head" else 0.0 for index, name in enumerate(MODULES)}
        modules = {
            name: {"edq_ratio": 1.0 - share, "lost_fraction": share, "lost_fraction_hi": share, "v_lost_fraction": None}
            for name, share in shares.items()
        }
        sizes = {"log2": [-3, -2, -1, 0, 1], "elements": [step, 2 * step, 40, 20, 10]}
        made.append({"step": step, "modules": modules, "update_ulps": sizes})
    return made


def write_records(path: Path, made: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in made))


def write_run(folder: Path, strategy: str, seed: int = 0, **changes: Any) -> Path:
    """Write FOLDER/STRATEGY-seedSEED; `changes` replace entries of run.json, but for `steps`, `last`, `config`,
    `start_loss`, the validation loss before the first step, and `audited`, whether there is an audit.jsonl.
    """
    start_loss, audited = changes.pop("start_loss", None), changes.pop("audited", False)
    steps, last = changes.pop("steps", 60), changes.pop("last", None)
    config = {**TrainConfig().to_json(), "strategy": strategy, "seed": seed, "steps": steps}
    name = changes.pop("directory", f"{strategy}-seed{seed}")
    run = folder / name
    run.mkdir(parents=True)
    record = {
        "format": 1,
        "name": name,
        "status": "finished",
        "strategy": strategy,
        "arithmetic": "fp32",
        "seed": seed,
        "config": {**config, **changes.pop("config", {})},
        "command": "collage compare --seeds 3",
        "model": {"name": "gpt-1m", "parameters": 857000, "dtype": "float32" if strategy == "fp32" else "bfloat16"},
        "bytes_per_param": BYTES.get(strategy, 9.5),
        "state_bytes": int(857000 * (BYTES.get(strategy, 9.5) - 4)),
        "versions": {"python": "3.11.2", "torch": "2.13.0", "collage": "0.1.0"},
        "commit": None,
        "device": "cpu: a processor",
        "threads": 1,
        "corpus": {"name": "stdlib", "sha256": "ab" * 32, "documents": 200, "train_tokens": 4500000},
        "wall_time_s": 61.0,
        "peak_memory_bytes": 500_000_000 + seed,
        "init_sha256": f"i{seed}",
        "batches_sha256": f"b{seed}",
        "final": final(strategy, seed, steps),
        **changes,
    }
    (run / "run.json").write_text(json.dumps(record))
    made = records(strategy, seed, steps, steps if last is None else last)
    if start_loss is not None:
        made.insert(0, {"step": 0, "tokens": 0, "validation_loss": start_loss})
    write_records(run / "metrics.jsonl", made)
    if audited:
        for each in made:
            each |= {"lost_fraction_hi": 0.8, "v_lost_fraction": 0.4} if "edq_ratio" in each else {}
        write_records(run / "metrics.jsonl", made)
        found = audits(strategy, steps, steps if last is None else last)
        write_records(run / "audit.jsonl", found)
    return run


@pytest.fixture(scope="session")
def run_writer() -> Callable[..., Path]:
    """`write_run`, for fixtures that outlive a test."""
    return write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(strategy, seed=0, folder=..., **changes)` writes a run and returns its directory."""

    def make(strategy: str, seed: int = 0, folder: Path = tmp_path / "runs", **changes: Any) -> Path:
        return write_run(folder, strategy, seed, **changes)

    return make


@pytest.fixture
def make_branch(make_run: Callable[..., Path]) -> Callable[..., Path]:
    """As `make_run`, a run that continues from a checkpoint; `param` is the error of its converted weights."""

    def make(strategy: str, seed: int = 0, *, param: float | None = 0.0, loss: float = 2.5, **changes: Any) -> Path:
        source: dict[str, Any] = {"checkpoint": "/runs/old/checkpoints/step-000300", "run": "fp32-seed0", "step": 300}
        source |= {"strategy": "fp32", "dtype": "float32", "seed": 0, "lr": 1e-3, "sha256": "ef" * 32}
        config = {"from_checkpoint": source["checkpoint"], "lr": 1e-4, "min_lr": 1e-5, **changes.pop("config", {})}
        conversion = {"param": param, "exp_avg": 0.0, "exp_avg_sq": 0.00123}
        own = {"source": source, "conversion": conversion, "start_loss": loss, "init_sha256": "ef" * 32}
        return make_run(strategy, seed, config=config, **{**own, **changes})

    return make

"""`collage train` as it is called."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from collage import cli
from collage.train import runfiles
from collage.train.config import TASK_SETTINGS, TrainConfig, option, setting_names

SMALL: list[object] = ["--model", "gpt-tiny", "--seq-len", 8, "--batch-size", 2, "--eval-batches", 2]
SMALL += ["--checkpoint-every", 5, "--threads", 1, "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index:02d}.txt").write_text(f"document {index} has some words\n" * 4, encoding="utf-8")
    return folder


def collage(*arguments: object) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "collage", "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not any(record["step"] >= step for record in runfiles.read_metrics(out / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_every_setting_is_an_option_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert collage("train", "--help") == 0
    shown = capsys.readouterr().out
    for name in set(setting_names()) - set(TASK_SETTINGS):
        assert re.search(rf"│ {option(name)}\s", shown), name
    assert "--task" not in shown
    assert collage("finetune", "--help") == 0
    shown_of_tasks = capsys.readouterr().out
    for name in (*TASK_SETTINGS, "data", "strategy", "lr"):
        assert re.search(rf"│ {option(name)}\s", shown_of_tasks), name
    assert "(default: 0.9 0.999)" in " ".join(shown.replace("│", " ").split())
    assert "Optimizer" in shown
    assert "--corpus " not in shown


def test_options_make_the_settings_and_the_result_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.json"
    monkeypatch.setattr("sys.argv", ["/bin/collage", "train", "--data", "a folder"])
    options = ["--strategy", "light", "--betas", 0.8, 0.99, "--steps", 4, "--data", text, "--seed", 3]
    assert collage("train", *SMALL, *options, "--out", tmp_path / "run", "--json", copy) == 0
    run = runfiles.read_run(tmp_path / "run")
    assert run == json.loads(copy.read_text())
    expected: dict[str, Any] = {"strategy": "light", "betas": (0.8, 0.99), "steps": 4, "data": str(text), "seed": 3}
    expected |= {"model": "gpt-tiny", "seq_len": 8, "batch_size": 2, "eval_batches": 2, "checkpoint_every": 5}
    assert TrainConfig.from_json(run["config"]) == TrainConfig(**expected, threads=1, device="cpu")
    assert run["command"] == "collage train --data 'a folder'"


def test_options_count_more_than_the_settings_file(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    small: dict[str, Any] = {"model": "gpt-tiny", "seq_len": 8, "batch_size": 2, "device": "cpu", "threads": 1}
    config = TrainConfig(**small, steps=9, lr=0.5, data=str(text))
    file.write_text(json.dumps(config.to_json()))
    assert collage("train", "--config", file, "--steps", 2, "--out", tmp_path / "run") == 0
    written = TrainConfig.from_json(runfiles.read_run(tmp_path / "run")["config"])
    assert (written.steps, written.lr, written.seq_len) == (2, 0.5, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "pluss"], "collage: strategy must be one of plain"),
        (["--steps", 0], "collage: steps must be >= 1, got 0"),
        (["--data", "/nowhere"], "collage: data must be a text, JSON Lines or Parquet file"),
        (["--resume"], "collage: nothing to resume"),
        (["--config", "/nowhere.json"], "collage: --config must be a readable JSON file"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collage("train", *arguments, "--out", tmp_path / "run") == 2
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert len(shown.splitlines()) == 1
    assert not (tmp_path / "run/run.json").exists()


def test_a_settings_file_with_an_unknown_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"learning_rate": 1}')
    assert collage("train", "--config", file, "--out", tmp_path / "run") == 2
    assert "unknown settings: learning_rate" in capsys.readouterr().err


def test_resuming_with_contradicting_options_is_refused_and_with_the_same_ones_goes_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *SMALL, "--steps", 3, "--data", text, "--out", tmp_path / "run"]
    assert collage(*command) == 0
    assert collage(*command) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert collage(*command, "--resume", "--lr", 0.5) == 2
    assert "--lr 0.5 (the run has 0.001)" in capsys.readouterr().err
    assert collage(*command, "--resume") == 0


def test_a_settings_file_speaks_for_its_own_settings_only_so_that_it_can_be_resumed_with(
    text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"steps": 3}')
    command = ["train", *SMALL, "--config", file, "--out", tmp_path / "run"]
    assert collage(*command, "--data", text, "--lr", 0.5) == 0
    assert collage("train", "--config", file, "--out", tmp_path / "run", "--resume") == 0


def test_out_that_is_a_file_is_wrong_use(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collage("train", *SMALL, "--data", text, "--out", text / "00.txt") == 2
    assert "--out must be a folder that can be written to" in capsys.readouterr().err


def test_a_run_that_fails_has_exit_code_1(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from collage.train.objectives import Objective

    real = Objective.losses
    monkeypatch.setattr(Objective, "losses", lambda *arguments: [loss * float("nan") for loss in real(*arguments)])
    assert collage("train", *SMALL, "--data", text, "--out", tmp_path / "run") == 1
    assert capsys.readouterr().err.startswith("collage: the loss of step 1 is nan")


def test_a_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from collage.train import extras

    monkeypatch.setitem(extras.EXTRAS, "train", ("no_such_package",))
    assert collage("train", "--out", tmp_path / "run") == 2
    assert "pip install 'torch-collage[train]'" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    heavy = ["transformers", "accelerate", "matplotlib", "tokenizers", "safetensors", "jinja2"]
    code = f"import sys, collage.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def files(out: Path) -> dict[str, bytes]:
    folder = out / "checkpoints/step-000150"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in runfiles.read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("stop", "code", "status"),
    [
        (signal.SIGKILL, -signal.SIGKILL, "running"),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 130, "interrupted"),
    ],
)
def test_a_run_stopped_at_any_moment_is_resumed_to_the_same_bytes(
    text: Path, tmp_path: Path, stop: signal.Signals, code: int, status: str, whole: Callable[[Path], Path]
) -> None:
    out = tmp_path / "stopped"
    options = [*SMALL, "--steps", 150, "--data", text]
    process = started(*options, "--out", out)
    wait_for_step(out, 7, process)
    process.send_signal(stop)
    shown = process.communicate(timeout=120)[0]
    assert process.returncode == code, shown
    assert runfiles.read_run(out)["status"] == status
    if code == 130:
        assert re.search(r"stopped after step \d+ of 150; the checkpoint is saved. Go on with: collage train", shown)

    assert collage("train", *options, "--out", out, "--resume") == 0
    expected = whole(text)
    assert files(out) == files(expected)
    assert losses(out) == losses(expected)


@pytest.fixture
def whole(tmp_path: Path) -> Callable[[Path], Path]:
    """The uninterrupted run."""

    def train(text: Path) -> Path:
        out = tmp_path / "whole"
        assert collage("train", *SMALL, "--steps", 150, "--data", text, "--out", out) == 0
        return out

    return train


# ---- continuing from another run's checkpoint ------------------------------------------------------------------


def test_a_run_continues_another_ones_checkpoint_with_its_model_and_text(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    assert collage("train", *SMALL, "--strategy", "mixed", "--steps", 5, "--data", text, "--out", source) == 0
    branch = ["train", "--from", source, "--strategy", "light", "--steps", 3, "--threads", 1, "--device", "cpu"]
    assert collage(*branch, "--out", out) == 0
    assert "continues from step 5 of mixed-seed0 (mixed)" in capsys.readouterr().out
    run = runfiles.read_run(out)
    assert (run["source"]["step"], run["config"]["data"], run["model"]["name"]) == (5, str(text), "gpt-tiny")
    assert collage(*branch, "--out", out, "--resume") == 0
    assert collage(*branch, "--model", "gpt-1m", "--out", tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert "--model gpt-1m (the checkpoint has gpt-tiny)" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "other").exists()
    assert collage("train", "--from", text, "--out", tmp_path / "other") == 2
    assert capsys.readouterr().err.startswith("collage: --from must be a folder that `collage train` wrote")


def test_the_help_says_what_the_defaults_of_a_continuation_are(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "compare"):
        assert collage(command, "--help") == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "--lr a tenth of the source run's, --min-lr a tenth of --lr" in shown


def test_the_version_is_told_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert collage("--version") == 0
    assert capsys.readouterr().out == f"torch-collage {version('torch-collage')}\n"

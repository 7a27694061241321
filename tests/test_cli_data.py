"""`collage data` as it is called, and runs on what it built."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collage import cli
from collage.train import runfiles
from collage.train.build import build
from collage.train.compare import make_plan, prepare
from collage.train.config import TrainConfig

SMALL: list[object] = ["--model", "gpt-tiny", "--seq-len", 8, "--batch-size", 4, "--eval-batches", 2]
SMALL += ["--threads", 1, "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for file in range(4):
        lines = [json.dumps({"text": f"document {file} {line} has some words\n" * 2}) + "\n" for line in range(30)]
        (folder / f"{file}.jsonl").write_text("".join(lines))
    return folder


def collage(*arguments: object) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(out: Path) -> list[tuple[int, float, float | None]]:
    records = runfiles.read_metrics(out / "metrics.jsonl")
    return [(record["step"], record["loss"], record.get("validation_loss")) for record in records]


def test_a_run_on_a_prepared_corpus_has_the_losses_of_one_on_the_text(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, data = tmp_path / "corpus", ["--tokenizer", "bpe", "--vocab-size", 280]
    assert collage("data", text, *data, "--out", corpus, "--workers", 1, "--json", tmp_path / "info.json") == 0
    assert "120 documents of text" in capsys.readouterr().out
    info = json.loads((tmp_path / "info.json").read_text())
    assert (info["documents"], info["vocab_size"], info["shards"]) == (120, 280, 1)
    assert collage("data", "--out", corpus, "--check") == 0
    assert "as it was built" in capsys.readouterr().out
    assert collage("train", *SMALL, "--steps", 4, "--data", text, *data, "--out", tmp_path / "text-run") == 0
    assert collage("train", *SMALL, "--steps", 4, "--data", corpus, "--out", tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "text-run")
    runs = [runfiles.read_run(tmp_path / name)["corpus"] for name in ("run", "text-run")]
    assert runs[0] == runs[1]
    assert collage("train", *SMALL, "--data", corpus, "--tokenizer", "bytes", "--out", tmp_path / "other") == 2
    assert "--tokenizer bytes (it has bpe)" in capsys.readouterr().err


@pytest.mark.parametrize("streamed", [False, True])
def test_the_runs_of_a_comparison_read_a_prepared_corpus_or_a_stream_by_themselves(
    text: Path, tmp_path: Path, streamed: bool
) -> None:
    build(TrainConfig(data=str(text)), tmp_path / "corpus")
    settings = {"data": str(text), "stream": True} if streamed else {"data": str(tmp_path / "corpus")}
    plan = make_plan(settings, None, None, tmp_path / "out", resume=False)
    prepare(plan, "collage compare")
    assert plan.corpus is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.json"]


def test_a_streamed_run_cut_off_after_any_checkpoint_has_the_losses_of_one_that_never_was(
    text: Path, tmp_path: Path
) -> None:
    command = ["train", *SMALL, "--steps", 9, "--data", text, "--stream", "--schedule", "constant"]
    assert collage(*command, "--out", tmp_path / "whole") == 0
    out = tmp_path / "cut"
    assert collage(*command, "--checkpoint-every", 1, "--keep-checkpoints", 9, "--out", out) == 0
    place = json.loads((out / "checkpoints/step-000004/trainer.json").read_text())["data"]
    assert (place["step"], sorted(place["lanes"])) == (4, ["0", "1", "2", "3"])
    run = runfiles.read_run(out)
    for step in (4, 7):
        for each in (out / "checkpoints").iterdir():
            if int(each.name[-6:]) > step:
                shutil.rmtree(each)
        runfiles.write_json(out / "run.json", {**run, "status": "running", "final": None})
        assert collage(*command, "--checkpoint-every", 1, "--keep-checkpoints", 9, "--out", out, "--resume") == 0
        assert losses(out) == losses(tmp_path / "whole")
    with (text / "0.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    runfiles.write_json(out / "run.json", {**run, "status": "running", "final": None})
    assert collage(*command, "--out", out, "--resume") == 2


def stopped(options: list[object], out: Path, stop: signal.Signals) -> int:
    """The exit code of a build that is sent a signal once it has a shard."""
    command = [sys.executable, "-m", "collage", "data", *map(str, options), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "shard-00000").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(stop)
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_build_stopped_at_any_moment_goes_on_to_the_same_bytes(
    tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    options = ["--corpus-bytes", 3_000_000, "--shard-bytes", 1]
    for _ in range(5):  # the last shards may be finished before the signal comes
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        if stopped(options, tmp_path / "cut", stop) == code:
            break
    else:
        pytest.fail("five builds were finished before they could be stopped")
    assert not (tmp_path / "cut/corpus.json").exists()
    assert collage("data", *options, "--out", tmp_path / "cut") == 0
    assert collage("data", *options, "--out", tmp_path / "whole") == 0
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "collage: data must be a text, JSON Lines or Parquet file"),
        (["--check"], "collage: data must be a folder that `collage data` built"),
        (["--workers", 0], "collage: workers must be >= 1, got 0"),
        (["--shard-bytes", 0], "collage: shard_bytes must be >= 1, got 0"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    arguments: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collage("data", *arguments, "--out", tmp_path / "corpus") == 2
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert len(shown.splitlines()) == 1

"""`collage compare` and `collage report` as they are called, with real runs of a tiny model."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from collage import cli
from collage.report.plots import PLOTS
from collage.train.runfiles import read_metrics

SMALL: list[object] = ["--model", "gpt-tiny", "--seq-len", 8, "--batch-size", 2, "--eval-batches", 2, "--device", "cpu"]
SMALL += ["--eval-every", 0, "--audit-every", 1, "--checkpoint-every", 5]


def write_text(folder: Path) -> Path:
    folder.mkdir()
    for index in range(20):
        (folder / f"{index:02d}.txt").write_text(f"document {index} has some words\n" * 4, encoding="utf-8")
    return folder


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "collage", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def collage(*arguments: object) -> tuple[int, str]:
    """The command in a process of its own: its exit code and what it wrote."""
    process = started(*arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def here(*arguments: object) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ---- a comparison, once for the tests that look at it ----------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a comparison of two strategies with two seeds, and what the command wrote."""
    folder = tmp_path_factory.mktemp("compared")
    text, out = write_text(folder / "text"), folder / "out"
    arguments = ["--strategies", "plain,mixed", "--seeds", 2, "--steps", 10, "--data", text, "--out", out]
    code, output = collage("compare", *SMALL, *arguments, "--json", folder / "result.json")
    assert code == 0, output
    return out, output


Compared = tuple[Path, str]


def test_each_strategy_and_seed_is_a_finished_run_of_its_own(compared: Compared) -> None:
    out, _ = compared
    for name in ("plain-seed0", "plain-seed1", "mixed-seed0", "mixed-seed1"):
        run = read(out / name / "run.json")
        assert (run["name"], run["status"], run["final"]["step"]) == (name, "finished", 10)
        assert "Traceback" not in (out / name / "output.log").read_text()


def test_runs_of_a_seed_start_alike_and_runs_of_two_seeds_do_not(compared: Compared) -> None:
    out, _ = compared
    for key in ("init_sha256", "batches_sha256"):
        hashes = {name: read(out / name / "run.json")[key] for name in ("plain-seed0", "mixed-seed0", "mixed-seed1")}
        assert hashes["plain-seed0"] == hashes["mixed-seed0"] != hashes["mixed-seed1"]
    first = [read_metrics(out / name / "metrics.jsonl")[0]["loss"] for name in ("plain-seed0", "mixed-seed0")]
    assert first[0] == first[1]


def test_compare_json_has_the_figures_of_the_run_files(compared: Compared) -> None:
    out, _ = compared
    record = read(out / "compare.json")
    assert (record["status"], record["seeds"], record["failed"]) == ("finished", [0, 1], [])
    assert [row["strategy"] for row in record["strategies"]] == ["plain", "mixed"]
    row = record["strategies"][0]
    runs = [read(out / f"plain-seed{seed}" / "run.json") for seed in (0, 1)]
    losses = [run["final"]["validation_loss"] for run in runs]
    assert row["validation_losses"] == losses
    assert row["validation_loss"] == statistics.fmean(losses)
    assert row["validation_loss_spread"] == statistics.stdev(losses)
    assert row["perplexity"] == pytest.approx(math.exp(statistics.fmean(losses)))
    for key in ("train_loss", "edq_ratio", "lost_fraction", "lost_fraction_hi", "v_lost_fraction", "tokens_per_s"):
        assert row[key] == pytest.approx(statistics.fmean(run["final"][key] for run in runs)), key
    for key in ("bytes_per_param", "state_bytes", "peak_memory_bytes"):
        assert row[key] == max(run[key] for run in runs), key
    assert record["config"]["steps"] == 10
    assert record["corpus"]["name"] == "text"
    assert record["wall_time_s"] > 0


def test_plain_loses_updates_and_mixed_does_not(compared: Compared) -> None:
    plain, mixed = read(compared[0] / "compare.json")["strategies"]
    assert plain["lost_fraction"] > 0.2 > 0.01 > mixed["lost_fraction"]
    assert plain["edq_ratio"] < 0.99 < mixed["edq_ratio"] < 1.01


def test_the_json_file_is_compare_json(compared: Compared) -> None:
    out, _ = compared
    assert read(out.parent / "result.json") == read(out / "compare.json")


def test_the_report_stands_beside_the_runs(compared: Compared) -> None:
    out, output = compared
    assert {file.name for file in (out / "plots").iterdir()} == {f"{plot.stem}.png" for plot in PLOTS}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Comparison of 2 precision strategies" in page
    assert "plain" in (out / "report.md").read_text(encoding="utf-8")
    assert f"report: {out / 'report.html'}" in output


def test_progress_table_and_sentences_are_printed(compared: Compared) -> None:
    _, output = compared
    assert "4 runs, " in output
    assert "plain-seed1: step 10/10  loss" in output
    assert "minus mixed" in output
    assert "mixed: " in output
    assert "the others are measured against it" in output


def test_a_finished_comparison_that_is_resumed_prints_its_table_and_runs_nothing(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = compared
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-seed*/*")}
    figures = read(out / "compare.json")
    assert here("compare", "--resume", "--out", out) == 0
    assert "EDQ ratio" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-seed*/*")} == before
    again = read(out / "compare.json")
    assert (again["strategies"], again["wall_time_s"]) == (figures["strategies"], figures["wall_time_s"])


def test_a_comparison_is_not_written_over(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = compared
    assert here("compare", "--out", out) == 2
    assert "pass --resume to go on with its comparison" in capsys.readouterr().err


def test_other_settings_than_the_comparisons_are_an_error(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = compared
    assert here("compare", "--resume", "--out", out, "--lr", 0.5) == 2
    assert "--lr 0.5 (the run has 0.001)" in capsys.readouterr().err


def test_a_report_of_the_comparison_can_be_made_elsewhere(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = compared
    assert here("report", out, "--out", tmp_path / "again", "--json", tmp_path / "figures.json") == 0
    assert read(tmp_path / "figures.json")["strategies"] == read(out / "compare.json")["strategies"]
    assert (tmp_path / "again" / "report.html").exists()
    assert "minus mixed" in " ".join(capsys.readouterr().out.split())


def test_a_report_of_single_runs_sets_them_beside_each_other(compared: Compared, tmp_path: Path) -> None:
    out, _ = compared
    runs = [out / "plain-seed0", out / "mixed-seed0"]
    assert here("report", *runs, "--out", tmp_path, "--json", tmp_path / "figures.json") == 0
    assert [row["runs"] for row in read(tmp_path / "figures.json")["strategies"]] == [["plain-seed0"], ["mixed-seed0"]]


def test_runs_that_did_not_start_alike_are_an_error(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain-seed0", "mixed-seed0"):
        (tmp_path / name).mkdir()
        run = read(compared[0] / name / "run.json")
        (tmp_path / name / "run.json").write_text(json.dumps({**run, "init_sha256": name}))
    assert here("report", tmp_path) == 1
    said = capsys.readouterr()
    assert "different initial weights" in " ".join(said.out.split())
    assert "did not start alike" in said.err


# ---- branches of one checkpoint --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a comparison of two strategies that continue a float32 run, and what the command wrote."""
    folder = tmp_path_factory.mktemp("branched")
    text, source, out = write_text(folder / "text"), folder / "source", folder / "out"
    arguments = ["--strategy", "fp32", "--steps", 10, "--threads", 1, "--data", text, "--out", source]
    assert here("train", *SMALL, *arguments) == 0
    arguments = ["--strategies", "plain,mixed", "--seeds", 1, "--steps", 6, "--eval-every", 0, "--device", "cpu"]
    code, output = collage("compare", "--from", source, *arguments, "--out", out)
    assert code == 0, output
    return out, output


def test_strategies_branch_from_one_checkpoint_on_the_same_batches(branched: Compared) -> None:
    out, output = branched
    runs = {name: read(out / f"{name}-seed0" / "run.json") for name in ("plain", "mixed")}
    checkpoint = str((out.parent / "source/checkpoints/step-000010").resolve())
    for run in runs.values():
        assert run["source"]["checkpoint"] == run["config"]["from_checkpoint"] == checkpoint
        assert (run["source"]["step"], run["source"]["strategy"], run["status"]) == (10, "fp32", "finished")
        assert (run["config"]["lr"], run["config"]["min_lr"]) == (pytest.approx(1e-4), pytest.approx(1e-5))
        assert (run["config"]["model"], run["config"]["seq_len"]) == ("gpt-tiny", 8)
    for key in ("init_sha256", "batches_sha256"):
        assert runs["plain"][key] == runs["mixed"][key]
    assert runs["mixed"]["conversion"] == {"param": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    assert 1e-4 < runs["plain"]["conversion"]["param"] < 2**-8
    assert f"all continue from {checkpoint}, learning rate from 0.0001 down to 1e-05, cosine" in output
    rows = {row["strategy"]: row for row in read(out / "compare.json")["strategies"]}
    for name, row in rows.items():
        assert row["conversion"] == runs[name]["conversion"]
        first = read_metrics(out / f"{name}-seed0" / "metrics.jsonl")[0]
        assert first == {"step": 0, "tokens": 0, "validation_loss": row["start_validation_loss"]}
    assert rows["plain"]["lost_fraction"] > 0.5 > 0.01 > rows["mixed"]["lost_fraction"]
    for page in (output, (out / "report.md").read_text(), (out / "report.html").read_text()):
        assert "All runs continue from step 10 of fp32-seed0 (strategy fp32, float32 weights" in page
    assert "| mixed | exact | exact | exact |" in (out / "report.md").read_text()


def test_a_comparison_from_a_checkpoint_is_resumed_with_another_strategy_and_refuses_another_checkpoint(
    branched: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = branched
    assert here("compare", "--resume", "--out", out, "--from", out) == 2
    assert f"--from {out} (the run has" in capsys.readouterr().err
    assert here("compare", "--resume", "--out", out, "--strategies", "plus") == 0
    record = read(out / "compare.json")
    assert [row["strategy"] for row in record["strategies"]] == ["plain", "plus", "mixed"]
    assert record["source"]["step"] == 10
    assert record["warnings"] == []


# ---- comparisons that don't go well ----------------------------------------------------------------------------


def test_an_unknown_strategy_is_an_error_that_lists_the_names_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("compare", "--strategies", "plus,nonsense", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "got 'nonsense'" in error
    assert "stochastic" in error
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_there_is_an_error_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("compare", "--data", tmp_path / "nothing", "--out", tmp_path / "out") == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_on_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("report", tmp_path) == 2
    assert "no run files" in capsys.readouterr().err


def test_a_failing_run_is_shown_named_and_made_good_by_resuming(tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text"), tmp_path / "out"
    obstacle = out / "plain-seed0" / "checkpoints"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the folder of checkpoints goes")
    arguments = ["--strategies", "plain,mixed", "--seeds", 1, "--steps", 5, "--data", text, "--out", out]
    code, output = collage("compare", *SMALL, *arguments, "--json", tmp_path / "result.json")
    assert code == 1, output
    assert "plain-seed0 failed; the last lines of" in output
    assert str(obstacle) in output
    assert "1 of 2 runs failed: plain-seed0" in output
    record = read(out / "compare.json")
    assert record["status"] == "incomplete"
    assert [(each["name"], each["status"]) for each in record["failed"]] == [("plain-seed0", "failed")]
    assert [row["strategy"] for row in record["strategies"]] == ["mixed"]
    assert read(tmp_path / "result.json") == record

    obstacle.unlink()
    code, output = collage("compare", "--resume", "--out", out)
    assert code == 0, output
    record = read(out / "compare.json")
    assert (record["status"], record["failed"]) == ("finished", [])
    assert [row["strategy"] for row in record["strategies"]] == ["plain", "mixed"]


def test_when_all_runs_fail_there_is_no_report_and_no_row(tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "text"), tmp_path / "out"
    arguments = ["--strategies", "plain", "--seeds", 1, "--steps", 5, "--lr", 1e30, "--data", text, "--out", out]
    code, output = collage("compare", *SMALL, *arguments)
    assert code == 1, output
    assert "Remedy: a lower --lr" in output
    assert "1 of 1 runs failed: plain-seed0" in output
    record = read(out / "compare.json")
    assert (record["status"], record["strategies"]) == ("incomplete", [])
    assert not (out / "report.html").exists()


def test_ctrl_c_lets_the_runs_save_and_resuming_finishes_them(
    tmp_path: Path,
) -> None:
    text, out = write_text(tmp_path / "text"), tmp_path / "out"
    arguments = ["--strategies", "plus", "--seeds", 2, "--steps", 120, "--data", text, "--jobs", 1, "--threads", 1]
    process = started("compare", *SMALL, *arguments, "--out", out)
    while not read_metrics(out / "plus-seed0" / "metrics.jsonl"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"0 of 2 runs have finished; go on with: collage compare --out {out} --resume" in output
    assert read(out / "plus-seed0" / "run.json")["status"] == "interrupted"
    assert list((out / "plus-seed0" / "checkpoints").iterdir())
    assert not (out / "plus-seed1" / "run.json").exists()
    record = read(out / "compare.json")
    assert (record["status"], record["strategies"]) == ("interrupted", [])

    code, output = collage("compare", "--resume", "--out", out)
    assert code == 0, output
    assert "plus-seed0: going on" in output
    (row,) = read(out / "compare.json")["strategies"]
    assert row["runs"] == ["plus-seed0", "plus-seed1"]
    records = read_metrics(out / "plus-seed0" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 121))

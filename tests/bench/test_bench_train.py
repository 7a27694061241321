"""`collage bench train` and `collage bench memory` on a model that takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_small import Bench

from collage import cli
from collage.bench import train
from collage.bench.contenders import MasterAdamW
from collage.bench.page import write_page
from collage.bench.train import AUTOCAST, BASELINES, MASTER, UNFUSED
from collage.train.runfiles import write_json

TINY: list[object] = ["--models", "gpt-tiny", "--seq", 8, "--micro-batch", 2, "--rounds", 1, "--threads", 1]
SHAPE: list[object] = ["--hidden", 64, "--layers", 2, "--heads", 4, "--vocab", 4096, "--seq", 32, "--micro-batch", 4]


@pytest.fixture
def without_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each arm takes seconds."""
    monkeypatch.setattr(train, "_peak", lambda plan, timed: None)


def test_every_arm_has_a_row_and_its_ratios_are_to_the_best_baseline(run_bench: Bench) -> None:
    result = run_bench("train", *TINY, "--strategies", "plus")
    rows = {row["contender"]: row for row in result["rows"]}
    assert list(rows) == [MASTER, AUTOCAST, UNFUSED, "collage plus"]
    assert all(row["status"] == "timed" and row["rounds"] == 1 for row in rows.values())
    best = min(BASELINES, key=lambda name: rows[name]["ms_p50"])
    for row in rows.values():
        assert row["best"] == best
        assert row["ratio"] == pytest.approx(row["ms_p50"] / rows[best]["ms_p50"])
        assert row["ratio_to_unfused"] == pytest.approx(row["ms_p50"] / rows[UNFUSED]["ms_p50"])
        assert row["tokens_per_s"] == pytest.approx(16e3 / row["ms_p50"])
        # Beside the plan stand buffers that the library keeps, of up to 10 times 512 KB. Autocast is planned as
        # float32, and keeps some of its activations in 16 bits.
        beside = row["peak_bytes"] - row["planned_peak_bytes"]
        assert (beside < 0) if row["contender"] == AUTOCAST else (0 <= beside < 8e6)
    assert {"device", "commit", "command", "torch"} <= set(rows["collage plus"])
    assert f"best mixed-precision baseline: {best}" in result["printed"]


@pytest.mark.usefixtures("without_peaks")
def test_what_does_not_fit_is_skipped_with_the_plans_bytes(run_bench: Bench) -> None:
    whole = run_bench("train", *TINY, "--strategies", "plain")
    planned = {row["contender"]: row["planned_peak_bytes"] for row in whole["rows"]}
    between = (planned["collage plain"] + planned[MASTER]) // 2
    rows = {
        row["contender"]: row
        for row in run_bench(*("train", *TINY), "--strategies", "plain", "--memory", between)["rows"]
    }
    assert rows["collage plain"]["status"] == "timed"
    assert rows[MASTER]["status"] == "skipped"
    assert rows[MASTER]["reason"].startswith(f"the plan says {planned[MASTER] / 1e9:.1f} GB")
    assert rows[MASTER]["max_micro_batch"] < rows["collage plain"]["max_micro_batch"]


@pytest.mark.usefixtures("without_peaks")
def test_arms_that_do_not_fit_together_are_timed_apart(run_bench: Bench) -> None:
    most = max(row["planned_peak_bytes"] for row in run_bench("train", *TINY, "--strategies", "plain")["rows"])
    rows = run_bench("train", *TINY, "--strategies", "plain", "--memory", most)["rows"]
    assert all(row["status"] == "timed" and row["ratio"] > 0 for row in rows)
    assert {row["same_rounds"] for row in rows} == {True, False}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", 0], "--rounds must be >= 1"),
        (["--models", "gpt-9"], "--model must be one of"),
        (["--strategies", "pluss"], "--strategies must be names of"),
        (["--memory", "1kB"], "nothing was timed"),
        (["--budget", 0], "--budget must be > 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    arguments: list[object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "train", *map(str, [*TINY, *arguments])])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_unfused_baseline_steps_as_the_fused_one() -> None:
    params = [[torch.nn.Parameter(torch.linspace(-1, 1, 12).to(torch.bfloat16))] for _ in range(2)]
    for each, fused in zip(params, (True, False), strict=True):
        stepper = MasterAdamW(each, fused=fused)
        for _ in range(3):
            each[0].grad = torch.linspace(1, 2, 12).to(torch.bfloat16)
            stepper.step()
    assert torch.allclose(params[0][0], params[1][0], rtol=2**-8)
    assert not torch.equal(params[0][0], torch.linspace(-1, 1, 12).to(torch.bfloat16))


def test_planned_peaks_are_those_of_real_steps(run_bench: Bench) -> None:
    result = run_bench("memory", *SHAPE, "--strategies", "mixed,fp32", "--threads", 1)
    assert [(row["strategy"], row["checkpointing"]) for row in result["rows"]] == [
        ("mixed", False), ("mixed", True), ("fp32", False), ("fp32", True)
    ]  # fmt: skip
    for row in result["rows"]:
        # Small tensors that the trace doesn't make, such as seeds and states of random generators.
        assert row["computing"]["planned_bytes"] == pytest.approx(row["computing"]["measured_bytes"], rel=0.02, abs=6e6)
        assert row["measured_bytes"] == max(row[part]["measured_bytes"] for part in ("computing", "stepping"))
    # The first one pays for buffers that the process keeps.
    assert abs(result["rows"][-1]["error"]) < 0.01
    assert "largest error" in result["printed"]


@pytest.mark.usefixtures("without_peaks")
def test_the_pages_show_both(run_bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    for kind, arguments in (("train", [*TINY, "--strategies", "plain"]), ("memory", [*SHAPE, "--strategies", "plain"])):
        result: dict[str, Any] = run_bench(kind, *arguments)
        write_json(folder / f"{kind}.json", {key: value for key, value in result.items() if key != "printed"})
    page = write_page(folder).read_text(encoding="utf-8")
    assert "[train.md](train.md)" in page
    assert "[memory.md](memory.md)" in page
    trained = (folder / "train.md").read_text(encoding="utf-8")
    assert "| **collage plain** |" in trained
    assert (folder / "plots" / "train-gpt-tiny.png").stat().st_size > 1000
    assert "| plain | sdpa | yes |" in (folder / "memory.md").read_text(encoding="utf-8")

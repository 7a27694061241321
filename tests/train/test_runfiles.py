from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import collage
from collage.train import runfiles
from collage.train.config import TrainConfig, UserError


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    runfiles.write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5], "c": (-math.inf, "nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5], "c": [None, "nan"]}


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    runfiles.write_json(path, {"old": True})

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        runfiles.write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_records_are_there_at_once_and_later_ones_go_on_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = runfiles.Metrics(path)
    for step in range(1, 6):
        metrics.append({"step": step, "loss": math.nan if step == 2 else 1.0})
    assert [r["step"] for r in runfiles.read_metrics(path)] == [1, 2, 3, 4, 5]
    resumed = runfiles.Metrics(path, step=3)
    assert (
        resumed.records
        == runfiles.read_metrics(path)
        == [
            {"step": 1, "loss": 1.0},
            {"step": 2, "loss": None},
            {"step": 3, "loss": 1.0},
        ]
    )
    assert runfiles.Metrics(path).records == runfiles.read_metrics(path) == []


def test_records_that_nobody_reads_again_stay_in_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / runfiles.AUDIT_FILE
    audits = runfiles.Metrics(path, keep=False)
    for step in range(1, 6):
        audits.append({"step": step})
    resumed = runfiles.Metrics(path, step=3, keep=False)
    assert audits.records == resumed.records == []
    assert [r["step"] for r in runfiles.read_metrics(path)] == [1, 2, 3]


def test_an_audit_is_recorded_by_module_to_six_digits() -> None:
    figures = {"edq_ratio": 1 / 3, "lost_fraction": None, "lost_fraction_hi": 0.0, "v_lost_fraction": 1.0, "edq": 7.0}
    sizes = {"log2": [-1, 0], "elements": [3.0, 1e6 / 3], "energy": [0.5, 0.5]}
    kept = {"edq_ratio": 0.333333, "lost_fraction": None, "lost_fraction_hi": 0.0, "v_lost_fraction": 1.0}
    report: dict[str, Any] = {"total": {}, "groups": [], "modules": {"mlp.up": figures}}
    assert runfiles.audit_record(5, report) == {"step": 5, "modules": {"mlp.up": kept}}
    made = runfiles.audit_record(5, report, sizes)
    assert made[runfiles.HISTOGRAM] == {"log2": [-1, 0], "elements": [3.0, 333333.0]}


def test_an_unfinished_last_line_is_no_record_and_a_broken_one_before_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert runfiles.read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="a JSON record per line"):
        runfiles.read_metrics(path)


def test_final_figures_are_means_over_the_last_tenth() -> None:
    records = [{"step": s, "tokens": 10 * s, "loss": float(s), "tokens_per_s": float(s)} for s in range(1, 41)]
    audited = {"lost_fraction": 0.5, "lost_fraction_hi": 0.75, "v_lost_fraction": None}
    records[35] |= {"edq_ratio": 0.0, **audited}
    records[37] |= {"edq_ratio": 0.25, **audited}
    records[39] |= {"edq_ratio": 0.75, **audited, "validation_loss": 2.0}
    assert runfiles.final_figures(records, 40) == {
        "step": 40,
        "tokens": 400,
        "train_loss": 38.5,
        "validation_loss": 2.0,
        "perplexity": pytest.approx(math.exp(2.0)),
        "edq_ratio": 0.5,
        "lost_fraction": 0.5,
        "lost_fraction_hi": 0.75,
        "v_lost_fraction": None,
        "tokens_per_s": 20.5,
    }


def test_a_record_from_before_the_first_step_counts_in_no_final_figure() -> None:
    before = {"step": 0, "tokens": 0, "validation_loss": 5.0}
    first = {"step": 1, "tokens": 10, "loss": 1.5, "tokens_per_s": 3.0, "validation_loss": 2.0}
    assert runfiles.final_figures([before, first], 1) == runfiles.final_figures([first], 1)


def test_state_bytes_counts_the_real_tensors() -> None:
    p = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = collage.AdamW([p], strategy="mixed")
    p.grad = torch.ones_like(p)
    optimizer.step()
    counters = sum(4 for name in optimizer.state[p] if name == "step")
    assert runfiles.state_bytes(optimizer) == 100 * 12 + counters


def test_a_copy_in_somebody_elses_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "collage").mkdir()
    monkeypatch.setattr(collage, "__file__", str(tmp_path / "collage" / "__init__.py"))
    assert runfiles.commit() is None


def test_a_folder_with_a_run_is_refused_and_one_without_cannot_be_resumed(tmp_path: Path) -> None:
    runfiles.check_unused(tmp_path)
    with pytest.raises(UserError, match="nothing to resume"):
        runfiles.resume_config(tmp_path, {})
    run = {"format": 1, "name": "plus-seed0", "status": "interrupted", "config": TrainConfig(seed=4).to_json()}
    runfiles.write_json(tmp_path / "run.json", run)
    with pytest.raises(UserError, match=r"holds plus-seed0 \(interrupted\); pass --resume"):
        runfiles.check_unused(tmp_path)
    assert runfiles.resume_config(tmp_path, {"seed": 4}) == TrainConfig(seed=4)
    runfiles.write_json(tmp_path / "run.json", {**run, "format": 9})
    with pytest.raises(UserError, match="of format 1, got 9"):
        runfiles.read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        runfiles.read_run(tmp_path)


def test_device_and_memory_have_plausible_figures() -> None:
    assert runfiles.device_name(torch.device("cpu")).startswith("cpu: ")
    assert runfiles.peak_memory(torch.device("cpu")) > 50 * 2**20


def test_the_hash_of_the_weights_follows_every_bit_name_and_dtype() -> None:
    def model() -> torch.nn.Linear:
        layer = torch.nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(6.0).reshape(2, 3))
            layer.bias.zero_()
        return layer

    base, negative = model(), model()
    with torch.no_grad():
        negative.bias[1] = -0.0
    assert runfiles.weights_sha256(base) == runfiles.weights_sha256(model())
    others = [negative, model().double(), torch.nn.Sequential(model())]
    assert len({runfiles.weights_sha256(each) for each in [base, *others]}) == 4


def test_out_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"--out must be a folder that can be written to, got .*/file"):
            runfiles.check_unused(path)

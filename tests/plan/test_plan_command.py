"""`collage plan` as it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import collage
from collage import cli
from collage.plan.models import Shape, from_shape
from collage.plan.options import parse_memory, subject
from collage.train.models import MODELS, build_model

SHAPE: list[object] = ["--hidden", 64, "--layers", 2, "--heads", 4, "--vocab", 96, "--seq", 32]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *map(str, arguments)])
    return int(stopped.value.code or 0)


def planned(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    file = tmp_path / "plan.json"
    assert run(*arguments, "--json", file) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_row_for_every_strategy_with_its_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = planned(tmp_path, *SHAPE, "--strategy", "light", "--shards", 2, "--micro-batch", 3, "--memory", "2MB")
    rows = {row["strategy"]: row for row in result["strategies"]}
    assert list(rows) == list(collage.strategies())
    row = rows["light"]
    names = ("params", "gradients", "states", "activations", "peak")
    assert all(isinstance(row[f"{name}_bytes"], int) and row[f"{name}_bytes"] > 0 for name in names)
    assert row["bytes_per_param"] == 10
    assert row["peak_bytes"] == max(row["phases_bytes"].values()) == row["without_checkpointing"]["peak_bytes"]
    assert row["with_checkpointing"]["activations_bytes"] < row["activations_bytes"]
    assert row["with_checkpointing"]["max_micro_batch"] >= row["max_micro_batch"] >= 1
    shown = capsys.readouterr().out
    assert "> light" in shown
    assert "each of 2 devices" in shown
    assert f"micro-batches up to {row['max_micro_batch']} fit" in shown


def test_with_checkpointing_the_rows_own_figures_are_those(tmp_path: Path) -> None:
    result = planned(tmp_path, *SHAPE, "--checkpointing", "--micro-batch", 8)
    row = result["strategies"][0]
    assert row["peak_bytes"] == row["with_checkpointing"]["peak_bytes"] != row["without_checkpointing"]["peak_bytes"]


def test_a_configuration_file_a_folder_and_a_shape_are_the_same_model(tmp_path: Path) -> None:
    by_shape = from_shape(Shape(64, 2, 4, 96), 32)
    by_shape.config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        found = subject(str(path), {}, None)
        assert (found.shapes, found.seq_len, found.layers) == (by_shape.shapes, 32, 2)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_train_can_be_planned_by_name(name: str) -> None:
    model = subject(name, {"vocab": 1000}, None)
    trained = build_model(name, vocab_size=1000, seq_len=model.seq_len, seed=0, device="meta")
    assert model.count == sum(param.numel() for param in trained.parameters())
    assert model.uniform


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "missing: --hidden, --layers, --heads, --vocab"),
        (["--model", "gpt-9"], "--model must be one of gpt-tiny"),
        (["--model", "gpt-tiny", "--hidden", 8], "has a shape already, got --hidden"),
        (["--model", "none/config.json"], "must be a readable config.json"),
        ([*SHAPE, "--heads", 5], "--heads must divide --hidden"),
        ([*SHAPE, "--kv-heads", 2], "--kv-heads must divide --heads, with --family llama"),
        ([*SHAPE, "--family", "rnn"], "--family must be one of gpt, llama, bert"),
        ([*SHAPE, "--layers", 0], "--layers must be >= 1"),
        ([*SHAPE, "--memory", "80 apples"], "--memory must be a number > 0 with a unit of B, kB"),
        ([*SHAPE, "--memory", "0GB"], "--memory must be a number > 0"),
        ([*SHAPE, "--shards", 0], "--shards must be >= 1"),
        ([*SHAPE, "--micro-batch", 0], "--micro-batch must be >= 1"),
        ([*SHAPE, "--seq", 0], "--seq must be >= 1"),
        ([*SHAPE, "--strategy", "pluss"], "--strategy must be one of plain"),
        ([*SHAPE, "--dtype", "int8"], "--dtype must be one of bfloat16, float16"),
        ([*SHAPE, "--attention", "flash"], "--attention must be one of sdpa, eager"),
        ([*SHAPE, "--reduce-dtype", "int8"], "--reduce-dtype must be one of bfloat16"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("[]", "must name a model_type"),
        ('{"model_type": "no-such"}', "must name a model_type"),
        ('{"model_type": "vit"}', "predict no tokens"),
        ('{"model_type": "bert", "max_position_embeddings": 8}', "--seq must be at most the 8 positions"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    settings: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(settings, encoding="utf-8")
    assert run("--model", file, "--seq", 16) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"), [("80GB", 80 * 10**9), ("80 GiB", 80 * 2**30), (".5TB", 5 * 10**11), ("1024", 1024)]
)
def test_units_of_memory(text: str, count: int) -> None:
    assert parse_memory(text) == count

"""A model small enough to train in a test, and text made here."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from collage.train.config import TrainConfig
from collage.train.models import MODELS, ModelSpec


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["float", "round", "carry", "ulp", "sum", "split"]) for _ in range(count))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of 30 documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index:02d}.txt").write_text(words(index, 60), encoding="utf-8")
    return folder


@pytest.fixture
def tiny(text: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Settings of a run that takes a fraction of a second, with a model made for tests."""
    monkeypatch.setitem(MODELS, "tiny", ModelSpec(hidden=16, layers=1, heads=2))
    return TrainConfig(
        model="tiny",
        data=str(text),
        steps=8,
        warmup=2,
        batch_size=4,
        seq_len=16,
        eval_every=4,
        eval_batches=2,
        audit_every=3,
        checkpoint_every=3,
        device="cpu",
        threads=1,
    )

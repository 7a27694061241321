"""What a run cannot be set up with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from collage.train.config import TrainConfig, UserError
from collage.train.loop import train
from collage.train.runsetup import _keep_gradients_in_float32, _micro_batch


def test_an_unusable_device_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device must be one that torch can use here, got 'abacus'"):
        train(replace(tiny, device="abacus"), tmp_path / "run")
    assert not (tmp_path / "run/run.json").exists()


def test_a_model_too_small_for_tiles_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one that strategy fp8 can keep, got tiny: .* too small"):
        train(replace(tiny, strategy="fp8"), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"batch_size": 6}, 4, r"a multiple of the number of processes \(4\), got 6"),
        ({"batch_size": 6, "micro_batch": 2}, 2, "micro_batch must divide each process's 3 of 6 sequences, got 2"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(settings: dict[str, int], processes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _micro_batch(TrainConfig(**settings), processes)  # pyright: ignore[reportArgumentType]


def test_gradients_of_several_processes_are_not_kept_in_float32() -> None:
    with pytest.raises(UserError, match=r"grad_dtype float32 needs a single process, .* got 2; use reduce_dtype"):
        _keep_gradients_in_float32(TrainConfig(), [], 2)

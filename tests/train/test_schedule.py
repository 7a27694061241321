from __future__ import annotations

import pytest

from collage.train.config import TrainConfig
from collage.train.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_linearly_to_lr(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, steps=100, warmup=10, lr=1e-3)
    assert [learning_rate(config, step) for step in range(1, 11)] == pytest.approx([i * 1e-4 for i in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_last_step_has_min_lr_and_the_path_only_falls(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, steps=100, warmup=10, lr=1e-3, min_lr=1e-5)
    path = [learning_rate(config, step) for step in range(10, 101)]
    assert path == sorted(path, reverse=True)
    assert path[-1] == pytest.approx(1e-5, rel=1e-12)


def test_cosine_and_linear_are_half_way_in_the_middle() -> None:
    for schedule in ("cosine", "linear"):
        config = TrainConfig(schedule=schedule, steps=100, warmup=0, lr=1.0, min_lr=0.0)
        assert learning_rate(config, 50) == pytest.approx(0.5)
    assert learning_rate(TrainConfig(schedule="cosine", steps=100, warmup=0, lr=1.0, min_lr=0.0), 25) > 0.8


def test_constant_stays_at_lr() -> None:
    config = TrainConfig(schedule="constant", steps=100, warmup=10)
    assert {learning_rate(config, step) for step in range(10, 101)} == {config.lr}

"""Bytes per parameter by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from collage.optim.strategies import strategies
from collage.report.groups import group_runs
from collage.report.memory import PARTS, UNSPLIT, group_split, split
from collage.report.runs import read_run

MakeRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("plain", (2, 2, 2, 2, 0)),
        ("kahan", (2, 2, 2, 2, 2)),
        ("light", (2, 2, 2, 2, 2)),
        ("plus", (2, 2, 2, 2, 4)),
        ("fp32-states", (2, 2, 4, 4, 0)),
        ("mixed", (2, 2, 4, 4, 4)),
        ("fp32", (4, 4, 4, 4, 0)),
    ],
)
def test_the_parts_of_a_strategy_are_those_of_the_paper(name: str, parts: tuple[int, ...]) -> None:
    assert split(strategies()[name], torch.bfloat16) == dict(zip(PARTS, parts, strict=True))


@pytest.mark.parametrize("name", sorted(strategies()))
def test_the_parts_add_up_to_the_strategy_table(name: str) -> None:
    strategy = strategies()[name]
    assert sum(split(strategy, torch.bfloat16).values()) == strategy.bytes_per_param(torch.bfloat16)


def test_a_run_with_wide_gradients_has_them_in_its_parts(make_run: MakeRun) -> None:
    (group,) = group_runs([read_run(make_run("plus", config={"grad_dtype": "float32"}, bytes_per_param=14.0))])
    assert group_split(group)["gradient"] == 4.0


@pytest.mark.parametrize(("strategy", "total"), [("unheard-of", 9.5), ("plus", 11.0)])
def test_a_total_that_is_not_of_this_versions_table_is_left_whole(
    make_run: MakeRun, strategy: str, total: float
) -> None:
    (group,) = group_runs([read_run(make_run(strategy, bytes_per_param=total))])
    assert group_split(group) == {UNSPLIT: total}


def test_files_without_a_total_have_no_parts(make_run: MakeRun) -> None:
    (group,) = group_runs([read_run(make_run("plus", bytes_per_param=None))])
    assert group_split(group) == {}

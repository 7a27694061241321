"""Which runs belong together and which may be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from collage.report.groups import baseline_of, differing, group_runs, start_mismatches
from collage.report.runs import Run, read_run
from collage.train.config import UserError


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Callable[..., Run]:
    return lambda *arguments, **changes: read_run(make_run(*arguments, **changes))


MakeRun = Callable[..., Run]


def test_runs_of_a_strategy_are_one_group_in_the_order_of_seeds_and_groups_are_in_the_order_of_bytes(
    run: MakeRun,
) -> None:
    groups = group_runs([run("mixed"), run("plus", 1), run("plain"), run("plus", 0)])
    assert [group.label for group in groups] == ["plain", "plus", "mixed"]
    assert [each.seed for each in groups[1].runs] == [0, 1]


@pytest.mark.parametrize("setting", ["threads", "log_every", "checkpoint_every", "device", "audit_every"])
def test_settings_that_change_nothing_in_training_separate_no_groups(run: MakeRun, setting: str) -> None:
    assert len(group_runs([run("plus", 0), run("plus", 1, config={setting: 7})])) == 1


def test_a_setting_that_changes_training_makes_groups_named_by_it(run: MakeRun) -> None:
    runs = [run("plus", 0), run("plus", 0, directory="other", config={"lr": 0.1})]
    assert [group.label for group in group_runs(runs)] == ["plus (lr 0.001)", "plus (lr 0.1)"]
    assert differing(runs) == ["lr"]


def test_the_text_counts_as_a_setting(run: MakeRun) -> None:
    runs = [run("plus", 0), run("plus", 1, corpus={"sha256": "cd" * 32})]
    assert [group.label for group in group_runs(runs)] == ["plus (corpus abababab)", "plus (corpus cdcdcdcd)"]


def test_a_seed_repeated_in_another_folder_makes_a_group_named_by_the_folder(run: MakeRun, tmp_path: Path) -> None:
    runs = [run("plus"), run("plus", folder=tmp_path / "again")]
    labels = [group.label for group in group_runs(runs)]
    assert len(labels) == 2
    assert all("folder" in label for label in labels)


def test_a_seed_repeated_in_one_folder_is_an_error_that_names_both(run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"plus-seed0 and .*copy are both plus with seed 0"):
        group_runs([run("plus"), run("plus", directory="copy")])


def test_only_finished_runs_count_and_the_others_are_drawn_while_there_is_none(run: MakeRun) -> None:
    (group,) = group_runs([run("plus", 0, status="interrupted", final=None), run("plus", 1)])
    assert [each.seed for each in group.finished] == [each.seed for each in group.shown] == [1]
    (group,) = group_runs([run("light", 0, status="failed", final=None)])
    assert group.finished == ()
    assert len(group.shown) == 1


def test_a_baseline_was_trained_under_the_same_conditions(run: MakeRun) -> None:
    groups = group_runs([run("plus"), run("mixed"), run("light", config={"lr": 0.1})])
    by_strategy = {group.strategy: group for group in groups}
    assert baseline_of(by_strategy["plus"], groups) is by_strategy["mixed"]
    assert baseline_of(by_strategy["light"], groups) is None
    assert baseline_of(by_strategy["mixed"], groups) is None


@pytest.mark.parametrize("setting", ["arithmetic", "dtype"])
def test_what_says_how_the_state_is_stored_may_differ_from_the_baseline(run: MakeRun, setting: str) -> None:
    groups = group_runs([run("plus", config={setting: "float16"}), run("mixed")])
    assert baseline_of(groups[0], groups) is groups[1]


@pytest.mark.parametrize(("key", "said"), [("init_sha256", "initial weights"), ("batches_sha256", "batches")])
def test_another_start_at_the_same_seed_is_told(run: MakeRun, key: str, said: str) -> None:
    (problem,) = start_mismatches([run("plain"), run("plus", **{key: "other"}), run("plus", 1)])
    assert problem == f"plain-seed0 and plus-seed0 have the same seed but different {said} ({key})"


def test_equal_starts_and_files_from_before_the_hashes_are_fine(run: MakeRun) -> None:
    assert start_mismatches([run("plain"), run("plus"), run("plus", 1, init_sha256=None, batches_sha256=None)]) == []


def test_runs_under_other_conditions_need_no_equal_start(run: MakeRun) -> None:
    assert start_mismatches([run("plain"), run("plus", config={"batch_size": 4}, batches_sha256="other")]) == []


# ---- runs that continue from a checkpoint ----------------------------------------------------------------------


def test_runs_from_different_checkpoints_are_groups_named_by_them(
    make_branch: Callable[..., Path], run: MakeRun
) -> None:
    other = {"from_checkpoint": "/elsewhere/other/checkpoints/step-000900"}
    made = [read_run(make_branch("plus")), read_run(make_branch("plus", directory="b", config=other))]
    assert [group.label for group in group_runs(made)] == [
        "plus (from_checkpoint old/checkpoints/step-000300)",
        "plus (from_checkpoint other/checkpoints/step-000900)",
    ]
    mixed = read_run(make_branch("mixed"))
    groups = group_runs([*made, mixed])
    assert [baseline_of(group, groups) for group in groups] == [groups[2], None, None]


def test_a_continued_run_is_no_comparison_for_one_with_fresh_weights(
    make_branch: Callable[..., Path], run: MakeRun
) -> None:
    config = {"lr": 1e-4, "min_lr": 1e-5}
    groups = group_runs([read_run(make_branch("plus")), run("mixed", config=config)])
    assert [group.label for group in groups] == [
        "plus (from_checkpoint old/checkpoints/step-000300)",
        "mixed (from_checkpoint none)",
    ]
    assert baseline_of(groups[0], groups) is None


def test_files_from_before_there_were_continued_runs_are_of_one_group_with_later_ones(run: MakeRun) -> None:
    new, old = run("plus", 0), run("plus", 1)
    assert new.config["from_checkpoint"] is None
    config = {key: value for key, value in old.config.items() if key != "from_checkpoint"}
    assert len(group_runs([new, Run(old.path, {**old.record, "config": config})])) == 1


def test_runs_from_one_checkpoint_whose_values_differ_are_told(make_branch: Callable[..., Path]) -> None:
    made = [read_run(make_branch("plus")), read_run(make_branch("mixed", init_sha256="other"))]
    (problem,) = start_mismatches(made)
    assert problem == "plus-seed0 and mixed-seed0 have the same seed but different initial weights (init_sha256)"

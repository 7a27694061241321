from __future__ import annotations

import gc
import time
from collections import Counter

import pytest
import torch

from collage.bench.timing import MIN_ROUNDS, Lane, error_text, order, run_ahead, run_rounds, warm_up


class Silent:
    """A watcher that notes what it is told."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.turns: list[str] = []

    def warming(self, name: str) -> None:
        """Nothing."""

    def planned(self, seconds: float) -> None:
        """Notes it."""
        self.seconds.append(seconds)

    def took_turn(self, name: str, seconds: float) -> None:
        """Notes it."""
        self.turns.append(name)


def clock(run: object) -> float:
    """Every turn takes a second."""
    run()  # type: ignore[operator]
    return 1.0


@pytest.mark.parametrize(("budget", "rounds"), [(100.0, 40), (20.0, 20), (1.0, MIN_ROUNDS)])
def test_a_slow_contender_takes_part_in_the_rounds_that_its_budget_pays(budget: float, rounds: int) -> None:
    lane = Lane("slow", lambda: None)
    warm_up(lane, clock, 40, budget)
    assert (lane.rounds, lane.estimate) == (rounds, 1.0)
    assert sum(lane.takes_part(index, 40) for index in range(40)) == rounds


def test_few_rounds_are_spread_over_all() -> None:
    lane = Lane("slow", lambda: None, rounds=4)
    assert [index for index in range(20) if lane.takes_part(index, 20)] == [4, 9, 14, 19]


def test_every_lane_takes_every_place_and_has_different_predecessors() -> None:
    lanes = [Lane(name, lambda: None) for name in "abcd"]
    rounds = ["".join(lane.name for lane in order(lanes, index)) for index in range(8)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert {each[0] for each in rounds} == set("abcd")
    before_b = Counter(each[each.index("b") - 1] for each in rounds if each.index("b"))
    assert set(before_b) == {"a", "c"}


def test_rounds_are_interleaved_untimed_work_comes_first_and_no_garbage_is_collected() -> None:
    seen: list[str] = []
    collecting: list[bool] = []

    def lane(name: str) -> Lane:
        def run() -> None:
            seen.append(name)
            collecting.append(gc.isenabled())

        return Lane(name, run, lambda: seen.append(f"before {name}"), estimate=2.0, rounds=2)

    watcher = Silent()
    run_rounds([lane("a"), lane("b")], clock, 2, watcher)
    assert seen == ["before a", "a", "before b", "b", "before b", "b", "before a", "a"]
    assert not any(collecting)
    assert gc.isenabled()
    assert watcher.seconds == [8.0]
    assert len(watcher.turns) == 4


def test_a_lane_that_fails_in_a_round_falls_out_and_the_others_go_on() -> None:
    turns: list[int] = []

    def fail() -> None:
        turns.append(1)
        if len(turns) == 2:
            raise ValueError("too much\nsecond line")

    bad, good = Lane("bad", fail, rounds=4), Lane("good", lambda: None, rounds=4)
    run_rounds([bad, good], clock, 4, Silent())
    assert (bad.error, len(bad.seconds), len(turns)) == ("ValueError: too much", 1, 2)
    assert (good.error, len(good.seconds)) == ("", 4)


def test_the_time_of_a_part_of_the_work_is_scaled() -> None:
    lane = Lane("part", lambda: None, rounds=1, scale=4.0)
    run_rounds([lane], clock, 1, Silent())
    assert lane.seconds == {0: 4.0}


def test_a_gpu_is_kept_busy_for_longer_than_the_host_takes_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    cycles: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda count: (seen.append("busy"), cycles.append(count)))

    def run() -> None:
        seen.append("run")
        time.sleep(0.01)

    lane = Lane("gpu", run, lambda: seen.append("before"), rounds=1)
    run_ahead(lane)
    assert seen == ["before", "idle", "run"] * 3
    assert lane.host is not None
    assert lane.host >= 0.01
    seen.clear()
    run_rounds([lane], clock, 1, Silent())
    assert seen == ["before", "busy", "run"]
    # At 2 GHz, which no GPU's clock is much above.
    assert cycles[0] / 2e9 > 2 * lane.host


def test_a_lane_that_fails_when_the_host_is_timed_has_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    lane = Lane("bad", lambda: [][0], rounds=1)
    run_ahead(lane)
    run_rounds([lane], clock, 1, Silent())
    assert (lane.error, lane.seconds) == ("IndexError: list index out of range", {})


def test_a_lane_that_fails_in_the_warm_up_has_no_turn() -> None:
    lane = Lane("bad", lambda: [][0])
    warm_up(lane, clock, 4, 1.0)
    run_rounds([lane], clock, 4, Silent())
    assert lane.error == "IndexError: list index out of range"
    assert not lane.seconds


def test_an_error_without_words_still_has_its_name() -> None:
    assert error_text(KeyboardInterrupt("")) == "KeyboardInterrupt"  # type: ignore[arg-type]

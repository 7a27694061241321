"""Interleaved rounds: every lane takes its turn in a round, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

MIN_ROUNDS = 5
"""Rounds of a contender however slow it is, unless fewer were asked for."""

Run = Callable[[], object]
Clock = Callable[[Run], float]


def cpu_clock(run: Run) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e9


def cuda_clock(run: Run) -> float:
    """Seconds from the first to the last of what a call does on the GPU, and of what the GPU waits for within it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """How time is taken on a device."""
    return cuda_clock if device.type == "cuda" else cpu_clock


@dataclass
class Lane:
    """What takes a turn in the rounds.

    Attributes:
        name: for people who watch.
        run: what is timed.
        before: what must be done before it, untimed.
        scale: what its time is multiplied with, where `run` is a part of the work.
        estimate: seconds of a turn, from the warm-up.
        host: seconds that the call takes on the host, where work on a GPU goes on beside it; see `run_ahead`.
        rounds: how many rounds it takes part in.
        seconds: what its turns took, by round.
        error: why it has fallen out; empty while it has not.
    """

    name: str
    run: Run
    before: Run = lambda: None
    scale: float = 1.0
    estimate: float = 0.0
    host: float | None = None
    rounds: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    error: str = ""

    def takes_part(self, index: int, rounds: int) -> bool:
        """Whether it has a turn in round `index` of `rounds`: its own are spread evenly."""
        return (index + 1) * self.rounds // rounds > index * self.rounds // rounds

    def turn(self, clock: Clock) -> float:
        """One turn; its seconds."""
        self.before()
        return self.scale * clock(self.run)


class Watcher(Protocol):
    """Who is told how a benchmark goes."""

    def warming(self, name: str) -> None:
        """A contender is built and makes its first steps."""
        ...

    def planned(self, seconds: float) -> None:
        """The rounds that come next take about so long."""
        ...

    def took_turn(self, name: str, seconds: float) -> None:
        """A turn is over that was planned to take so long."""
        ...


def error_text(error: Exception) -> str:
    """An error in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def warm_up(lane: Lane, clock: Clock, rounds: int, budget: float) -> None:
    """Three turns that do not count: the first makes states and compiles, the others say how many rounds there is time
    for, at most `rounds`, within `budget` seconds but at least `MIN_ROUNDS`."""
    try:
        lane.turn(clock)
        lane.estimate = min(lane.turn(clock), lane.turn(clock))
    except Exception as error:
        lane.error = error_text(error)
    else:
        lane.rounds = min(rounds, max(MIN_ROUNDS, int(budget / max(lane.estimate, 1e-9))))


# More than any GPU's clock has in a second.
CYCLES = 2.5e9


def run_ahead(lane: Lane) -> None:
    """Lets the host be ahead of the GPU in the turns of a lane that was warmed up, as it is in training, where the GPU
    still has the backward to do when the optimizer is called: the GPU is kept busy while the host calls."""
    if lane.error:
        return

    def seconds() -> float:
        lane.before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        lane.run()
        return time.perf_counter() - start

    try:
        found = [seconds() for _ in range(3)]
    except Exception as error:
        lane.error = error_text(error)
        return
    lane.host = min(found)
    # What disturbs the host for longer than this shows in the tenth and ninetieth percentiles.
    cycles, before = int(CYCLES * (1e-3 + 2 * max(found))), lane.before

    def then_wait() -> None:
        before()
        torch.cuda._sleep(cycles)

    lane.before = then_wait


def order(lanes: Sequence[Lane], index: int) -> list[Lane]:
    """Who takes turns in round `index`, in which order: rotated by one from pair to pair of rounds, and backwards in
    the second of a pair, so that no lane always comes after the same other."""
    start = index // 2 % len(lanes)
    rotated = [*lanes[start:], *lanes[:start]]
    return rotated[::-1] if index % 2 else rotated


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collects garbage once, then not before the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_rounds(lanes: Sequence[Lane], clock: Clock, rounds: int, watcher: Watcher) -> None:
    """Times lanes that were warmed up; one that fails falls out with its error, the others go on."""
    lanes = [lane for lane in lanes if not lane.error]
    watcher.planned(sum(lane.rounds * lane.estimate for lane in lanes))
    with without_garbage_collection():
        for index in range(rounds if lanes else 0):
            for lane in order(lanes, index):
                if lane.error or not lane.takes_part(index, rounds):
                    continue
                try:
                    lane.seconds[index] = lane.turn(clock)
                except Exception as error:
                    lane.error = error_text(error)
                watcher.took_turn(lane.name, lane.estimate)

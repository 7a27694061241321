"""One model trained with several strategies: a child process for each strategy and seed.

Every run is a process of its own, so that its peak memory is its own and a run that fails takes no other along. All
runs of a seed start from the same weights and see the same batches, because both follow from the seed alone, or from
the seed and the one checkpoint that all of them continue from.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import torch

from collage.train.config import TrainConfig, UserError, resumed
from collage.train.corpusfiles import is_corpus
from collage.train.data import Corpus, prepare_corpus, with_data
from collage.train.runfiles import FORMAT, write_json
from collage.train.signals import StopSignals

STRATEGIES, SEEDS = ("plain", "light", "plus", "mixed"), 3
"""What is compared unless said otherwise."""

COMPARE_FILE, RUN_FILE, METRICS_FILE, OUTPUT_FILE = "compare.json", "run.json", "metrics.jsonl", "output.log"
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 20.0
TAIL_BYTES, TAIL_LINES = 16384, 15


# ---- what is to be run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One run: its settings and its folder."""

    config: TrainConfig
    folder: Path

    @property
    def name(self) -> str:
        """Strategy and seed."""
        return f"{self.config.strategy}-seed{self.config.seed}"

    @property
    def started(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.folder / RUN_FILE).exists()

    @property
    def finished(self) -> bool:
        """Whether the folder holds this run, trained for as many steps as are wanted."""
        run = self._read()
        return run.get("status") == "finished" and run["final"]["step"] >= self.config.steps

    @property
    def failed(self) -> bool:
        """Whether the folder holds this run and it could not go on."""
        return self._read().get("status") == "failed"

    def _read(self) -> dict[str, Any]:
        return read_json(self.folder / RUN_FILE) if self.started else {}


@dataclass(frozen=True)
class Plan:
    """A comparison: every strategy with every seed, all other settings shared.

    Raises:
        UserError: a strategy is unknown or can't be trained with the settings, or the numbers make no comparison.
    """

    strategies: tuple[str, ...]
    seeds: int
    config: TrainConfig
    out: Path

    def __post_init__(self) -> None:
        if not self.strategies:
            raise UserError("strategies must name at least one strategy, got none")
        if self.seeds < 1:
            raise UserError(f"seeds must be >= 1, got {self.seeds}")
        self.runs()

    def runs(self) -> list[Planned]:
        """The runs, seed by seed, so that a stopped comparison has whole rounds."""
        pairs = [(strategy, seed) for seed in range(self.seeds) for strategy in self.strategies]
        configs = [replace(self.config, strategy=strategy, seed=seed) for strategy, seed in pairs]
        return [Planned(config, self.out / f"{config.strategy}-seed{config.seed}") for config in configs]

    @property
    def corpus(self) -> Path | None:
        """The folder of the text that all runs share; None where each reads what `data` names by itself.

        That is a prepared corpus, which all map from the same files, a stream, or the examples of a task.
        """
        if self.config.task is not None:
            return None
        return None if self.config.stream or is_corpus(self.config.data) else self.out / "corpus"

    def left(self) -> list[Planned]:
        """The runs that have not finished yet."""
        return [each for each in self.runs() if not each.finished]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {"strategies": list(self.strategies), "seeds": self.seeds, "config": self.config.to_json()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def strategy_names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def make_plan(settings: dict[str, Any], strategies: str | None, seeds: int | None, out: Path, *, resume: bool) -> Plan:
    """The plan for the given options; when resuming, the stored plan with more strategies or seeds if these are given.

    Raises:
        UserError: `out` holds a comparison already, or the options contradict the stored plan.
    """
    names = None if strategies is None else strategy_names(strategies)
    stored = read_json(out / COMPARE_FILE) if (out / COMPARE_FILE).exists() else None
    if stored is None or not resume:
        if stored is not None or any(out.glob(f"*/{RUN_FILE}")):
            raise UserError(
                f"--out must be a folder without runs, got {out}, which holds some; pass --resume to go on with "
                "its comparison, or choose another folder"
            )
        # Settings may suit these strategies, and not the one that a run has unless told otherwise.
        first = {"strategy": names[0]} if names else {}
        config = TrainConfig.from_json({**_with_defaults(settings), **first})
        return Plan(STRATEGIES if names is None else names, SEEDS if seeds is None else seeds, config, out)
    earlier = stored.get("plan")
    if not isinstance(earlier, dict):
        raise UserError(f"{out / COMPARE_FILE} holds no plan to go on with; start another comparison in another --out")
    config = resumed(TrainConfig.from_json(earlier["config"]), settings)
    together = tuple(dict.fromkeys((*earlier["strategies"], *(names or ()))))
    return Plan(together, earlier["seeds"] if seeds is None else max(earlier["seeds"], seeds), config, out)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    settings = with_data(settings)
    if settings.get("from_checkpoint") is None and settings.get("recipe") is None:
        return settings
    from collage.train.continuation import continued  # needs what reports, which read this module, do without

    return continued(settings)


def _text(config: TrainConfig) -> Corpus:
    if config.from_checkpoint is None:
        return prepare_corpus(config)
    from collage.train.continuation import continued_text

    return continued_text(config)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_accelerator(device: str | None) -> bool:
    """Whether a run with this `device` setting computes on an accelerator."""
    return torch.accelerator.is_available() if device is None else not device.startswith("cpu")


def share_machine(plan: Plan, jobs: int | None) -> tuple[Plan, int]:
    """The plan with its number of threads, and how many runs are made at the same time.

    One run at a time on an accelerator. On a CPU a run has one thread, so that its figures don't depend on the number
    of cores, and there is a run for each core; `jobs` shares the cores out equally instead.

    Raises:
        UserError: `jobs` is not positive.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs must be >= 1, got {jobs}")
    count = len(plan.runs())
    if on_accelerator(plan.config.device):
        return plan, min(jobs or 1, count)
    threads = plan.config.threads or (1 if jobs is None else max(1, cores() // jobs))
    return replace(plan, config=replace(plan.config, threads=threads)), min(jobs or max(1, cores() // threads), count)


def prepare(plan: Plan, command: str) -> dict[str, Any]:
    """Write the corpus that all runs share, then compare.json with the plan.

    Returns:
        What only the comparison knows: its plan, the commands that made it, and the seconds spent on it before.
    """
    file = plan.out / COMPARE_FILE
    earlier = read_json(file) if file.exists() else {}
    # Without a plan beside it, a corpus comes from an attempt that may have had other settings.
    if plan.left() and plan.corpus and not (earlier and (plan.corpus / "corpus.json").exists()):
        _text(plan.config).save(plan.corpus)
    commands = dict.fromkeys([*(earlier.get("command") or "").splitlines(), command])
    known = {
        "command": "\n".join(commands),
        "plan": plan.to_json(),
        "wall_time_s": earlier.get("wall_time_s") or 0.0,
    }
    note_end(plan, "running", known)
    return known


# ---- one child -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, interrupted, failed or not started; of a failed one, the last lines it wrote."""

    planned: Planned
    status: str
    output: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain JSON types."""
        return {"name": self.planned.name, "status": self.status, "output": list(self.output)}


def _tail(path: Path) -> list[str]:
    """The last lines of a text file, the first of them perhaps cut."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def latest_figures(path: Path) -> dict[str, Any]:
    """The last value of each figure in the last records of a metrics.jsonl; empty before the first record."""
    figures: dict[str, Any] = {}
    for line in _tail(path):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by the tail, or not yet written to its end
        if isinstance(record, dict):
            figures |= record
    return figures


class Child:
    """One running `collage train`."""

    def __init__(self, planned: Planned, corpus: Path | None) -> None:
        self.planned = planned
        self._asked_to_stop = False
        write_json(planned.folder / "config.json", planned.config.to_json())
        self._log: IO[bytes] = (planned.folder / OUTPUT_FILE).open("ab")
        # A session of its own: Ctrl-C on the terminal reaches the parent alone, and a child gets it once, from there.
        self._process = subprocess.Popen(
            self._command(corpus),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            start_new_session=True,
        )

    def _command(self, corpus: Path | None) -> list[str]:
        folder = self.planned.folder
        command = [sys.executable, "-m", "collage", "train", "--config", str(folder / "config.json")]
        command += [*(["--corpus", str(corpus)] if corpus else []), "--out", str(folder)]
        return [*command, "--resume"] if self.planned.started else command

    def _environment(self) -> dict[str, str]:
        threads = self.planned.config.threads
        # Idle OpenMP threads that spin would take the cores from the runs beside this one.
        own = {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **own} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})

    def outcome(self) -> Outcome | None:
        """How the run ended, or None while it goes on."""
        code = self._process.poll()
        if code is None:
            return None
        self._log.close()
        if code == 0 and self.planned.finished:
            return Outcome(self.planned, "finished")
        # Asked early, while it still imports, it leaves without a checkpoint, with any code.
        if self._asked_to_stop and not self.planned.failed:
            return Outcome(self.planned, "interrupted")
        lines = [line for line in _tail(self.planned.folder / OUTPUT_FILE) if line.strip()]
        return Outcome(self.planned, "failed", tuple([*lines[-TAIL_LINES:], f"exit code {code}"]))

    def ask_to_stop(self) -> None:
        """Let the run save a checkpoint and leave."""
        self._asked_to_stop = True
        self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


# ---- all of them -----------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """What is told how the runs go."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...

    def started(self, planned: Planned) -> None:
        """A run begins."""

    def progressed(self, planned: Planned, figures: dict[str, Any]) -> None:
        """A run has these latest figures."""

    def ended(self, outcome: Outcome) -> None:
        """A run is over."""

    def stopping(self) -> None:
        """The runs were asked to save and leave."""


def run_all(planned: Sequence[Planned], corpus: Path | None, jobs: int, watcher: Watcher) -> list[Outcome]:
    """Make the runs, `jobs` at the same time; the outcomes are in the order of `planned`.

    Ctrl-C or SIGTERM is passed on to the running children, which save a checkpoint and leave; the runs not begun are
    "not started". A second Ctrl-C ends the children at once. A run that fails leaves the others alone.
    """
    outcomes: dict[Path, Outcome] = {}
    waiting, children = deque(planned), list[Child]()
    stopped = False

    def settle(outcome: Outcome) -> None:
        outcomes[outcome.planned.folder] = outcome
        watcher.ended(outcome)

    try:
        with watcher, StopSignals() as signals:
            while waiting or children:
                if signals.requested and not stopped:
                    stopped = True
                    watcher.stopping()
                    for child in children:
                        child.ask_to_stop()
                while waiting and len(children) < jobs:
                    each = waiting.popleft()
                    if stopped:
                        settle(Outcome(each, "not started"))
                    else:
                        watcher.started(each)
                        children.append(Child(each, corpus))
                time.sleep(POLL_SECONDS if children else 0)
                for child in list(children):
                    watcher.progressed(child.planned, latest_figures(child.planned.folder / METRICS_FILE))
                    if ended := child.outcome():
                        children.remove(child)
                        settle(ended)
    finally:
        for child in children:
            child.end()
    return [outcomes[each.folder] for each in planned]


def note_end(plan: Plan, status: str, known: dict[str, Any]) -> None:
    """Write compare.json for a comparison without figures."""
    write_json(plan.out / COMPARE_FILE, {"format": FORMAT, "status": status, **known, "strategies": []})

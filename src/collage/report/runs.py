"""Reading what runs left behind: `run.json`, `metrics.jsonl`, `audit.jsonl` and `compare.json`.

Files of any age are read: a field that a file does not have is None, and nothing here insists on more than a
`run.json` that is a JSON object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collage.train.compare import COMPARE_FILE, METRICS_FILE, RUN_FILE, read_json
from collage.train.config import UserError
from collage.train.runfiles import AUDIT_FILE, read_metrics


def number(value: object) -> float | None:
    """`value` as a finite float, or None where it is absent, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def section(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object at `key`, empty where the file has none."""
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Run:
    """One run directory: the record of `run.json`, and those of `metrics.jsonl` and `audit.jsonl` in step order.

    Runs from before there was an `audit.jsonl` have no audits.
    """

    path: Path
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    audits: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """The run's own name, or its directory's."""
        return str(self.record.get("name") or self.path.name)

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return str(self.record.get("strategy") or self.config.get("strategy") or "unknown")

    @property
    def seed(self) -> int:
        """The seed, 0 where the file names none."""
        return int(number(self.record.get("seed", self.config.get("seed"))) or 0)

    @property
    def status(self) -> str:
        """`running`, `finished`, `interrupted`, `failed`, or `unknown`."""
        return str(self.record.get("status") or "unknown")

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, so that its final figures may be compared."""
        return self.status == "finished"

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        return section(self.record, "config")

    def final(self, key: str) -> float | None:
        """A final figure."""
        return number(section(self.record, "final").get(key))

    def figure(self, key: str) -> float | None:
        """A figure of `run.json` itself, such as `peak_memory_bytes`."""
        return number(self.record.get(key))

    @property
    def last_step(self) -> int:
        """The last step that left a record, 0 if none did."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def series(self, key: str) -> dict[int, float]:
        """Step -> value over the records that bear `key`; a null there is nan."""
        values = ((int(record["step"]), number(record[key])) for record in self.metrics if key in record)
        return {step: math.nan if value is None else value for step, value in values}


def add_in_step_order(kept: list[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]) -> None:
    """Add `records` to `kept` so that steps rise: a resumed run writes some again, and the later record counts.

    Raises:
        UserError: a record has no step.
    """
    for record in records:
        if not isinstance(record, Mapping) or number(record.get("step")) is None:
            raise UserError(f"a record of {METRICS_FILE} or {AUDIT_FILE} must be an object with a step, got {record!r}")
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)


def _read_records(file: Path) -> list[Mapping[str, Any]]:
    kept: list[Mapping[str, Any]] = []
    add_in_step_order(kept, read_metrics(file))
    return kept


def read_run(directory: Path) -> Run:
    """The run in `directory`. Raises UserError if its `run.json` cannot be read."""
    record = read_json(directory / RUN_FILE)
    return Run(directory, record, *(_read_records(directory / name) for name in (METRICS_FILE, AUDIT_FILE)))


def read_compare(directory: Path) -> dict[str, Any] | None:
    """The `compare.json` of `directory`, or None if there is none."""
    file = directory / COMPARE_FILE
    return read_json(file) if file.is_file() else None


def found_runs(directory: Path) -> list[Path]:
    """`directory` itself if it is a run's, else the run directories right below it, sorted by name; maybe none."""
    if (directory / RUN_FILE).is_file():
        return [directory]
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give run or compare directories")
    return sorted(file.parent for file in directory.glob(f"*/{RUN_FILE}"))


def run_directories(directory: Path) -> list[Path]:
    """As `found_runs`; a directory without runs is an error."""
    found = found_runs(directory)
    if not found:
        raise UserError(
            f"no run files in {directory}: looked for {RUN_FILE} there and one folder below; "
            "give a directory that `collage train` or `collage compare` wrote"
        )
    return found


def read_runs(directories: Iterable[Path]) -> list[Run]:
    """Every run in the given run and compare directories, each once.

    Raises:
        UserError: a directory holds no run, or a file in it cannot be read.
    """
    unique = {path.resolve(): path for directory in directories for path in run_directories(directory)}
    return [read_run(path) for path in unique.values()]

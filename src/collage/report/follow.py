"""Following runs while they are made: only what was added to a file since the last look is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collage.report.runs import Run, add_in_step_order, found_runs
from collage.train.compare import METRICS_FILE, RUN_FILE, read_json
from collage.train.config import UserError
from collage.train.runfiles import AUDIT_FILE


class Tail:
    """The records of a JSON-lines file that grows; `records` holds them in step order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Mapping[str, Any]] = []
        self._inode: int | None = None
        self._offset = 0

    def read(self) -> bool:
        """Take in the whole lines that were added; whether there was anything new.

        A file that was replaced or cut, as a run that is resumed does, is read from its start.

        Raises:
            UserError: a line is no record.
        """
        try:
            with self.path.open("rb") as file:
                again = self._start_over(os.fstat(file.fileno()))
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return False
        lines = added[: added.rfind(b"\n") + 1]
        add_in_step_order(self.records, self._parsed(lines))
        self._offset += len(lines)
        return again or bool(lines)

    def _start_over(self, file: os.stat_result) -> bool:
        if file.st_ino == self._inode and file.st_size >= self._offset:
            return False
        known, self._inode, self._offset = bool(self.records), file.st_ino, 0
        self.records.clear()
        return known

    def _parsed(self, lines: bytes) -> list[Mapping[str, Any]]:
        try:
            return [json.loads(line) for line in lines.splitlines()]
        except ValueError as error:
            raise UserError(f"{self.path} must hold a JSON record per line: {error}") from error


class Followed:
    """A run's directory, read again where its files changed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tails = (Tail(directory / METRICS_FILE), Tail(directory / AUDIT_FILE))
        self._stamp: tuple[int, int] | None = None
        self._record: dict[str, Any] = {}
        self.run = Run(directory, {})

    def read(self) -> bool:
        """Bring `run` up to date; whether it changed."""
        stat = (self._directory / RUN_FILE).stat()
        stamp = (stat.st_ino, stat.st_mtime_ns)
        changed = [stamp != self._stamp, *(tail.read() for tail in self._tails)]
        if changed[0]:
            self._record, self._stamp = read_json(self._directory / RUN_FILE), stamp
        if any(changed):
            self.run = Run(self._directory, self._record, *(list(tail.records) for tail in self._tails))
        return any(changed)


class Follower:
    """All runs in some directories, those that appear later too."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = list(directories)
        self._followed: dict[Path, Followed] = {}

    @property
    def runs(self) -> list[Run]:
        """The runs as they were at the last look."""
        return [each.run for each in self._followed.values()]

    def read(self) -> bool:
        """Look at every file; whether anything changed.

        Raises:
            UserError: a directory is none, or a file can't be read.
        """
        found = {path.resolve(): path for directory in self.directories for path in found_runs(directory)}
        changed = set(found) != set(self._followed)
        self._followed = {path: self._followed.get(path) or Followed(found[path]) for path in found}
        # Every run is read, whether or not the one before has changed.
        return any([each.read() for each in self._followed.values()]) or changed

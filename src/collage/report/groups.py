"""Which runs belong together: one group per strategy and settings, its runs differing in the seed alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from collage.report.runs import Run, section
from collage.train.config import EXECUTING, OBSERVING, UserError

BASELINE = "mixed"
"""The strategy that every other is measured against."""

METHOD = ("arithmetic", "dtype")
"""Settings that, with the strategy, say how the state is stored: part of a group, free to differ in a comparison."""

IGNORED = ("seed", "strategy", *OBSERVING, *EXECUTING)
"""Settings that separate no groups: the seed is what a group varies, the others don't change what is trained."""

FOLDER, SOURCE = "folder", "from_checkpoint"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in the order of their seeds."""

    label: str
    strategy: str
    conditions: Mapping[str, str]
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs whose final figures count."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def shown(self) -> tuple[Run, ...]:
        """The runs whose curves are drawn: the finished ones, or all while none has finished."""
        return self.finished or self.runs


def _settings(run: Run, folders: bool) -> dict[str, str]:
    config = {key: value for key, value in run.config.items() if key not in IGNORED}
    if config.get(SOURCE) is None:
        config.pop(SOURCE, None)  # files from before there was this setting don't have it
    config["corpus"] = section(run.record, "corpus").get("sha256", "")
    if folders:
        config[FOLDER] = str(run.path.parent)
    return {key: json.dumps(value, sort_keys=True) for key, value in config.items()}


def differing(runs: Sequence[Run], *, folders: bool = False) -> list[str]:
    """The settings (neither seed nor strategy) in which `runs` do not all agree."""
    settings = [_settings(run, folders) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({each.get(key, "") for each in settings}) > 1]


def _label(strategy: str, settings: Mapping[str, str]) -> str:
    named = ", ".join(f"{key} {_short(key, value)}" for key, value in settings.items())
    return f"{strategy} ({named})" if named else strategy


def _short(key: str, value: str) -> str:
    text = value.strip('"')
    if key == SOURCE:
        return "/".join(text.split("/")[-3:]) or "none"
    return text[: 8 if key == "corpus" else 60] or "?"


def _bytes_order(group: Group) -> tuple[float, str, str]:
    return (group.runs[0].figure("bytes_per_param") or 0.0, group.strategy, group.label)


def _grouped(runs: Sequence[Run], folders: bool) -> list[Group]:
    keys = differing(runs, folders=folders)
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        settings = _settings(run, folders)
        members.setdefault((run.strategy, *(settings.get(key, "") for key in keys)), []).append(run)
    groups = []
    for (strategy, *values), own in members.items():
        settings = dict(zip(keys, values, strict=True))
        conditions = {key: value for key, value in settings.items() if key not in METHOD}
        ordered = tuple(sorted(own, key=lambda run: run.seed))
        groups.append(Group(_label(strategy, settings), strategy, conditions, ordered))
    return sorted(groups, key=_bytes_order)


def _repeated_seed(groups: Iterable[Group]) -> tuple[Run, Run] | None:
    for group in groups:
        for first, second in zip(group.runs, group.runs[1:], strict=False):
            if first.seed == second.seed:
                return first, second
    return None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The groups of `runs`, by bytes per parameter and then by name.

    Runs of one strategy that differ in a setting stand in groups of their own, named by what differs; so do
    runs that repeat a seed in different folders.

    Raises:
        UserError: two runs of one folder have the same strategy, settings and seed.
    """
    groups = _grouped(runs, folders=False)
    if _repeated_seed(groups):
        groups = _grouped(runs, folders=True)
    if repeated := _repeated_seed(groups):
        first, second = repeated
        raise UserError(
            f"{first.path} and {second.path} are both {first.strategy} with seed {first.seed} and the same "
            "settings; give only one of them"
        )
    return groups


def baseline_of(group: Group, groups: Iterable[Group]) -> Group | None:
    """The group of `BASELINE` trained under the conditions of `group`, or None; a baseline has none itself."""
    if group.strategy == BASELINE:
        return None
    matching = [each for each in groups if each.strategy == BASELINE and each.conditions == group.conditions]
    return matching[0] if matching else None


def start_mismatches(runs: Iterable[Run]) -> list[str]:
    """Sentences on runs of one seed whose initial weights or batches differ, so that they can't be compared.

    Runs are only held against others of the same seed and settings, by the hashes in their `run.json`.
    """
    problems = []
    for key, what in (("init_sha256", "initial weights"), ("batches_sha256", "batches")):
        seen: dict[tuple[object, ...], Run] = {}
        for run in runs:
            settings = {k: v for k, v in _settings(run, folders=False).items() if k not in METHOD}
            if not run.record.get(key):
                continue
            first = seen.setdefault((run.seed, *sorted(settings.items())), run)
            if first.record[key] != run.record[key]:
                problems.append(f"{first.name} and {run.name} have the same seed but different {what} ({key})")
    return problems

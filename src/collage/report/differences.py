"""What differs between the runs of a report, beside their seeds: settings, storages, versions, machines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collage.report.groups import Group
from collage.report.runs import Run, section
from collage.report.wording import MISSING

SECTIONS = ("model", "corpus", "storage", "source", "versions")
"""Objects in run.json whose entries are compared one by one; the settings are compared too."""

ENTRIES = ("arithmetic", "products", "products_in_float8", "device", "threads", "commit")
"""Other entries of run.json that are compared."""

LEFT_OUT = ("seed", "strategy")
"""What a report always varies."""

_HASH = re.compile(r"\b[0-9a-f]{40,64}\b")
_FORMAT = re.compile(r"\w*Format\(name='(\w+)'[^()]*\)")


@dataclass(frozen=True)
class Difference:
    """One thing in which the runs don't agree, and its value in each group, in their order."""

    name: str
    cells: tuple[str, ...]


def _facts(run: Run) -> dict[str, str]:
    facts: dict[str, Any] = {key: value for key, value in run.config.items() if key not in LEFT_OUT}
    facts |= {key: run.record[key] for key in ENTRIES if key in run.record}
    for name in SECTIONS:
        facts |= {f"{name} {key}": value for key, value in section(run.record, name).items()}
    return {key: _text(value) for key, value in facts.items()}


def _text(value: object) -> str:
    """A value in few words: hashes by their first digits, formats by their names, paths by their ends."""
    if value is None:
        return "unset"
    text = value if isinstance(value, str) else json.dumps(value)
    text = _HASH.sub(lambda match: match[0][:12], _FORMAT.sub(r"\1", text))
    text = text.replace("format=None, ", "").replace("format=None", "")
    return text if len(text) <= 120 else f"…{text[-119:]}"


def _cell(facts: Sequence[Mapping[str, str]], key: str) -> str:
    return ", ".join(dict.fromkeys(each.get(key, MISSING) for each in facts))


def differences(groups: Sequence[Group]) -> list[Difference]:
    """Every setting, storage, version or machine that is not the same in all runs of `groups`."""
    facts = [[_facts(run) for run in group.runs] for group in groups]
    every = [each for own in facts for each in own]
    keys = dict.fromkeys(key for each in every for key in each)
    differing = [key for key in keys if len({each.get(key) for each in every}) > 1]
    return [Difference(key, tuple(_cell(own, key) for own in facts)) for key in differing]

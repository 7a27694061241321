"""An audited step as one flat dictionary of numbers, as loggers take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collage.metrics import Report


def figures(report: Report, *, modules: bool = False, prefix: str = "") -> dict[str, float]:
    """Name -> number, without what is None or no number.

    Args:
        report: of :meth:`collage.Audit.report`.
        modules: whether to add those of each module, as ``MODULE/edq_ratio``.
        prefix: put before every name.
    """
    found = _numbers(report["total"])
    if modules:
        for module, record in report["modules"].items():
            found |= {f"{module}/{name}": value for name, value in _numbers(record).items()}
    return {prefix + name: value for name, value in found.items()}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "elements")
    }

"""An audit that a trainer's callback follows: each audited step is handed on once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from collage.integrations.loggers import Logger, logger
from collage.metrics import Audit, Report, audit


class Following:
    """What callbacks of different trainers share.

    Args:
        every: steps between audited ones.
        loggers: what :func:`collage.integrations.loggers.logger` takes or gives; each receives every report.
        options: of :func:`collage.audit`.
    """

    def __init__(self, every: int, loggers: Sequence[Any], options: dict[str, Any]) -> None:
        self.every, self.options = every, options
        self.loggers: list[Logger] = [each if _is_logger(each) else logger(each) for each in loggers]
        self.audit: Audit | None = None
        self._seen = 0

    def start(self, optimizers: Any, model: nn.Module | None) -> None:
        """Begins to watch."""
        self.stop()
        self.audit = audit(optimizers, every=self.every, model=model, **self.options)
        self._seen = 0

    def news(self) -> Report | None:
        """The report of a step that was audited since the last call, handed to the loggers; None without one."""
        if self.audit is None or len(self.audit.steps) == self._seen:
            return None
        self._seen = len(self.audit.steps)
        report = self.audit.report()
        for write in self.loggers:
            write(report)
        return report

    def stop(self) -> None:
        """Stops watching; the last report stays in ``audit``."""
        if self.audit is not None:
            self.audit.detach()


def _is_logger(target: Any) -> bool:
    return callable(target) and not any(hasattr(target, name) for name in ("add_scalar", "log_metrics", "log"))

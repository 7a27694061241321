"""The learning rates that a schedule has in store, without a step of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Schedule = Callable[[int], float] | LRScheduler


def learning_rates(schedule: Any, first: int, last: int) -> list[float]:
    """The learning rates of the steps ``first`` to ``last`` (both counted), of the first parameter group.

    Args:
        schedule: step (from 1) -> learning rate; or one of torch's schedulers, or a wrapper that holds one as
            ``.scheduler``, which stands where step ``first`` is next. It is not moved: a copy is, on copies of the
            groups' options.
        first: the next step.
        last: the run's last step.

    Raises:
        TypeError: it is neither, or follows a metric that is not known in advance.
    """
    while not callable(schedule) and not isinstance(schedule, LRScheduler) and hasattr(schedule, "scheduler"):
        schedule = schedule.scheduler
    if isinstance(schedule, ReduceLROnPlateau):
        raise TypeError("ReduceLROnPlateau follows a metric that is not known in advance; give a function of the step")
    if isinstance(schedule, LRScheduler):
        return _played(schedule, last - first + 1)
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a function of the step or a torch LRScheduler, got {type(schedule).__name__}"
        )
    rate: Callable[[int], Any] = schedule
    return [float(rate(step)) for step in range(first, last + 1)]


def _played(scheduler: LRScheduler, steps: int) -> list[float]:
    options = [
        {key: copy.copy(value) for key, value in group.items() if key != "params"} for group in _groups(scheduler)
    ]
    # What a scheduler asks an optimizer for; a copy of the optimizer would copy the model.
    groups = SimpleNamespace(param_groups=options, step=lambda: None)
    twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): groups})
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            found.append(_number(options[0]))
            twin.step()
    return found


def _number(group: dict[str, Any]) -> float:
    return float(group["lr"])


def _groups(scheduler: LRScheduler) -> list[dict[str, Any]]:
    return scheduler.optimizer.param_groups

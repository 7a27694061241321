"""torchtitan: collage's AdamW in its optimizer containers, of the older and the newer kind, without importing it.

Older containers take ``optimizer_cls``: give them :func:`adamw`. Newer ones look a name up with
``_resolve_optimizer_factory``: subclass with :func:`with_collage`. ``collage.audit(container)`` audits all of its
members as one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from collage.optim import AdamW, Strategy

ContainerT = TypeVar("ContainerT", bound=type)


def adamw(strategy: str | Strategy = "plus", **options: Any) -> Callable[..., AdamW]:
    """What makes :class:`collage.AdamW` from parameters or groups and a container's own keyword arguments.

    ``fused``, ``foreach`` and what else a group may carry are accepted; ``options`` count less than the container's.
    """
    return partial(AdamW, strategy=strategy, **options)


def with_collage(
    container: ContainerT, strategy: str | Strategy = "plus", name: str = "AdamW", **options: Any
) -> ContainerT:
    """A subclass of an ``OptimizersContainer`` whose optimizer of this name is collage's.

    Args:
        container: the class.
        strategy: a name or a record.
        name: of the optimizer in the configuration; others are resolved as before.
        options: of :class:`collage.AdamW`.

    Raises:
        TypeError: the container has no ``_resolve_optimizer_factory``; older ones take ``optimizer_cls=adamw(...)``.
    """
    if not hasattr(container, "_resolve_optimizer_factory"):
        raise TypeError(
            f"{container.__name__} has no _resolve_optimizer_factory; give it optimizer_cls=adamw({strategy!r}) instead"
        )
    made = adamw(strategy, **options)
    by_static = isinstance(inspect.getattr_static(container, "_resolve_optimizer_factory"), staticmethod)

    def resolve(*args: Any, **kwargs: Any) -> Any:
        # The name is the last: before it stands the container, where the method has one.
        if args[-1] == name:
            return made
        inherited: Any = container
        return inherited._resolve_optimizer_factory(*args, **kwargs)

    body: dict[str, Any] = {"_resolve_optimizer_factory": staticmethod(resolve) if by_static else resolve}
    config = getattr(container, "Config", None)
    if config is not None:
        # A configuration of its own: torchtitan builds the class that a configuration is nested in.
        body["Config"] = dataclass(kw_only=True, slots=True)(type("Config", (config,), {}))
    return type(f"Collage{container.__name__}", (container,), body)  # type: ignore[return-value]

"""The optimizer's state as dicts that know when they were changed.

A step must notice that a state tensor was replaced, and looking at every tensor of a model of thousands of small ones
costs more than stepping them. So the dicts count their changes, and a step compares one number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

_CHANGING = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")


class Changes:
    """How often any dict of one optimizer has changed."""

    def __init__(self) -> None:
        self.count = 0


def _counting(name: str) -> Callable[..., Any]:
    inherited = getattr(dict, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.changes.count += 1
        return inherited(self, *args, **kwargs)

    method.__name__ = name
    return method


class Entry(dict[str, Any]):
    """The state of one parameter."""

    def __init__(self, *values: Any, changes: Changes | None = None, **named: Any) -> None:
        super().__init__(*values, **named)
        # Made by others, from an entry's type: nobody's state until it is put into one.
        self.changes = changes or Changes()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain dicts; an optimizer that gets one counts its changes again."""
        return dict, (dict(self),)


class States(defaultdict[Any, Any]):
    """``optimizer.state``: parameter -> :class:`Entry`."""

    def __init__(self, values: dict[Any, dict[str, Any]] | None = None) -> None:
        self.changes = Changes()
        super().__init__(dict)
        for param, entry in (values or {}).items():
            self[param] = entry

    def __setitem__(self, param: Any, entry: dict[str, Any]) -> None:
        self.changes.count += 1
        super().__setitem__(param, Entry(entry, changes=self.changes))

    def __missing__(self, param: Any) -> Any:
        self[param] = {}
        return self[param]

    def update(self, *values: Any, **named: Any) -> None:
        """As of a dict; each entry counts its changes."""
        for param, entry in dict(*values, **named).items():
            self[param] = entry

    def __ior__(self, other: Any) -> States:
        """As of a dict."""
        self.update(other)
        return self

    def setdefault(self, param: Any, default: Any = None) -> Any:
        """As of a dict."""
        if param not in self:
            self[param] = default or {}
        return self[param]

    def copy(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """A plain ``defaultdict`` of the same entries."""
        return defaultdict(dict, self)

    def __copy__(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """As a plain ``defaultdict``."""
        return defaultdict, (dict,), None, None, iter(self.items())


for _name in _CHANGING:
    setattr(Entry, _name, _counting(_name))
for _name in ("__delitem__", "clear", "pop", "popitem"):
    setattr(States, _name, _counting(_name))

"""Command-line options made from `TrainConfig`: one place for a setting's name, text and panel."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer

from collage.train.config import TrainConfig, option, setting_names
from collage.train.recipes import RECIPES


def config_options(
    *, without: Collection[str] = (), only: Collection[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every setting that isn't in `without`, or for those in `only`.

    The decorated function has a parameter `settings`: it gets the dict of those settings that were given, and
    keeps its own options. An option left out is left out of the dict, so that a file or a run's own settings count.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        wanted = set(setting_names() if only is None else only) - set(without)
        extra = {f.name: _parameter(f) for f in fields(TrainConfig) if f.name in wanted}

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            settings = {name: values.pop(name) for name in extra}
            command(settings={k: v for k, v in settings.items() if v is not None}, **values)

        kept = [p.replace(kind=p.KEYWORD_ONLY) for p in own.values() if p.name != "settings"]
        signature = inspect.Signature([*kept, *extra.values()])
        wrapper.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        wrapper.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return wrapper

    return decorate


def _parameter(setting: Field[Any]) -> inspect.Parameter:
    declared = get_type_hints(TrainConfig)[setting.name]
    flag = isinstance(setting.default, bool)
    shown = "" if setting.default is None or flag else f" (default: {_text(setting.default)})"
    names = f" One of {', '.join(RECIPES)}." if setting.name == "recipe" else ""
    name = option(setting.name)
    info = typer.Option(
        f"{name}/--no-{setting.name}" if flag else name,
        help=setting.metadata["help"] + names + shown,
        rich_help_panel=setting.metadata["panel"],
        show_default=False,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(setting.name, kind, default=None, annotation=Annotated[declared | None, info])


def _text(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)

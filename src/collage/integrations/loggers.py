"""Where an audit's figures go: TensorBoard, Weights & Biases, Trackio, or anything with a ``log``; JSON lines always.

Each through its own client, which is imported when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from collage.integrations.figures import figures
from collage.metrics import Report

Logger = Callable[[Report], None]
CLIENTS = ("tensorboard", "wandb", "trackio")


def logger(target: Any, *, modules: bool = True, prefix: str = "collage/", **options: Any) -> Logger:
    """What takes a report and logs it at its step.

    Args:
        target: "tensorboard", "wandb" or "trackio", to open that client with ``options`` (``SummaryWriter(**options)``,
            ``wandb.init(**options)``, ``trackio.init(**options)``); a path ending in .jsonl, to which whole reports
            are appended, one a line; or a client: a SummaryWriter, a run of wandb or trackio, an Accelerator, a
            Lightning logger.
        modules: whether to log those of each module beside the total; JSON lines hold everything.
        prefix: put before every name.

    Raises:
        ImportError: the client's package is not installed.
        ValueError, TypeError: another name or object.
    """
    if isinstance(target, Path) or (isinstance(target, str) and target.endswith(".jsonl")):
        return _json_lines(Path(target))
    client = _open(target, options) if isinstance(target, str) else target
    write = _writer(client)
    return lambda report: write(figures(report, modules=modules, prefix=prefix), report["total"]["step"])


def _open(name: str, options: dict[str, Any]) -> Any:
    if name not in CLIENTS:
        raise ValueError(f"logger takes one of {', '.join(CLIENTS)}, a path ending in .jsonl or a client, got {name!r}")
    try:
        if name == "tensorboard":
            return import_module("torch.utils.tensorboard").SummaryWriter(**options)
        return import_module(name).init(**options)
    except ModuleNotFoundError as error:
        raise ImportError(f"logging to {name} needs the package {name}; remedy: pip install {name}") from error


def _writer(client: Any) -> Callable[[dict[str, float], int], Any]:
    """How a client takes numbers of a step."""
    if hasattr(client, "add_scalar"):

        def scalars(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                client.add_scalar(name, value, step)
            client.flush()

        return scalars
    if hasattr(client, "log_metrics"):
        return lambda numbers, step: client.log_metrics(numbers, step=step)
    if hasattr(client, "log"):
        return lambda numbers, step: client.log(numbers, step=step)
    raise TypeError(f"a client has add_scalar, log_metrics or log; got {type(client).__name__}")


def _json_lines(path: Path) -> Logger:
    def write(report: Report) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": report["total"]["step"], **report}) + "\n")

    return write

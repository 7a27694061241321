"""Command-line options that every benchmark has, and its end: rows in a file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

HOW, FILES = "How", "Files"

Device = Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=HOW)]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Unset: torch's own number.", rich_help_panel=HOW)]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the rows, machine, versions and command to this file.", rich_help_panel=FILES),
]


def given_command() -> str:
    """The command as it was given."""
    return shlex.join(["collage", *sys.argv[1:]])


def write_rows(result: dict[str, Any], path: Path | None, console: Console) -> None:
    """Writes a result where a file is wanted, and says where."""
    from collage.train.runfiles import write_json

    if path is not None:
        write_json(path, result)
        console.print(f"rows: {path}", markup=False, highlight=False, soft_wrap=True)

"""The command `collage report`, and how a command that ends in a report shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collage.train.config import RunFailed, UserError
from collage.train.extras import need

if TYPE_CHECKING:
    from collage.report.write import Report


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that `collage train` or `collage compare` wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, report.md and plots/. Unset: the first DIR.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--watch", help="Serve the page to this machine, following runs as they go, until Ctrl-C; writes no file."
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port for --watch; 0: any. Unset: 8420, or the next one that is free."),
    ] = None,
) -> None:
    """Make report.html, report.md and plots from the files of runs and comparisons, of any age."""
    need("report")
    if follow:
        from collage.report.watch import watch

        if out is not None or json_file is not None:
            raise UserError("--watch writes no file, so it takes neither --out nor --json; leave them out")
        return watch(directories, port, typer.echo)
    if port is not None:
        raise UserError(f"--port is for --watch, got {port} without it; add --watch or leave --port out")
    from collage.report.write import report_on

    show_report(report_on(directories, out), json_file)


def show_report(report: Report, json_file: Path | None) -> None:
    """Print the figures and where the page is; write them to a file as well.

    Raises:
        RunFailed: the runs are no comparison.
    """
    from rich.console import Console

    from collage.report.page import show
    from collage.report.summary import data
    from collage.train.runfiles import write_json

    console = Console()
    show(report.summary, console)
    console.print(f"report: {report.html}", markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, data(report.summary))
    if report.summary["warnings"]:
        raise RunFailed("runs of one seed did not start alike, so the figures are no comparison")

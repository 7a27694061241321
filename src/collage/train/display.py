"""What a run shows: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINES = 20


def conversion_text(error: float | None) -> str:
    """The largest error of a converted tensor, as a share of its largest magnitude."""
    return "–" if error is None else "exact" if error == 0.0 else f"{error:.1e}"


def run_title(run: dict[str, Any]) -> str:
    """What a run trains, from its run.json."""
    model = run["model"]
    return (
        f"{run['name']}: {model['name']}, {model['parameters']:,} parameters in {model['dtype']}, "
        f"{run['bytes_per_param']:g} bytes each"
    )


def start_text(run: dict[str, Any]) -> str:
    """From where a run continues another, from its run.json."""
    source, errors = run["source"], run["conversion"]
    converted = ", ".join(f"{role} {conversion_text(error)}" for role, error in errors.items())
    return (
        f"continues from step {source['step']} of {source['run'] or 'a run'} ({source['strategy']}), "
        f"{source['checkpoint']}; converted to {run['strategy']}: {converted}"
    )


class Display:
    """Shows a run's records as they come; entered for the time of the loop."""

    def __init__(self, name: str, steps: int, start: int, *, enabled: bool) -> None:
        self.console = Console(quiet=not enabled)
        self._steps = steps
        self._edq_ratio: float | None = None
        self._bar = Progress(
            TextColumn(f"[bold]{name}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._bar.add_task(name, total=steps, completed=start, figures="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line that must not be missed."""
        self.console.print(f"WARNING: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True)

    def say_validation(self, step: int, loss: float) -> None:
        """Print a validation loss."""
        self.say(f"step {step}/{self._steps}  validation loss {loss:.4f}")

    def show(self, record: dict[str, Any]) -> None:
        """Show a step's record."""
        self._edq_ratio = record.get("edq_ratio", self._edq_ratio)
        figures = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s"
        if self._edq_ratio is not None:
            figures += f"  EDQ ratio {self._edq_ratio:.3f}"
        step, validation = record["step"], record.get("validation_loss")
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, figures=figures)
        elif step == self._steps or step % max(1, self._steps // PLAIN_LINES) == 0:
            self.say(f"step {step}/{self._steps}  {figures}")
        if validation is not None:
            self.say_validation(step, validation)
        if "metrics" in record:
            self.say("  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items()))

"""The files of a run: run.json (what it was and how it ended), metrics.jsonl and audit.jsonl (records of its steps)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import collage
from collage.train.config import TrainConfig, UserError, resumed

FORMAT = 1
AUDITED = ("edq_ratio", "lost_fraction", "lost_fraction_hi", "v_lost_fraction")
AUDIT_FILE = "audit.jsonl"
"""A record per audited step, by module: apart from metrics.jsonl, which it would make ten times as long."""
HISTOGRAM = "update_ulps"
"""How many elements have an update of so many ulps: `elements` by `log2`, the floor of the ratio's logarithm."""


# ---- JSON ------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` with every number that isn't finite replaced by None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: aside, to the disk, then renamed over the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; numbers that aren't finite become null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


# ---- run.json --------------------------------------------------------------------------------------------------


def read_run(out: Path) -> dict[str, Any]:
    """The run.json in `out`.

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = out / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["format"] != FORMAT:
            raise UserError(f"{path} must be of format {FORMAT}, got {run['format']!r}; use a matching torch-collage")
        return run
    except FileNotFoundError as error:
        raise UserError(f"nothing to resume: {out} holds no run.json; leave --resume out to start a run") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path} can't be read: {error!r}") from error


def check_unused(out: Path) -> None:
    """Make the folder `out`; raise `UserError` if it can't be made or already holds a run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written to, got {out}: {error.strerror}") from error
    if (out / "run.json").exists():
        run = read_run(out)
        remedy = "" if run["status"] == "finished" else "pass --resume to go on with it, or "
        raise UserError(
            f"--out must be a folder without a run, got {out}, which holds {run['name']} ({run['status']}); "
            f"{remedy}choose another folder"
        )


def resume_config(out: Path, given: dict[str, Any]) -> TrainConfig:
    """The settings with which the run in `out` goes on; see `collage.train.config.resumed`.

    Raises:
        UserError: no run is there, or `given` contradicts its settings.
    """
    return resumed(TrainConfig.from_json(read_run(out)["config"]), given)


def describe(
    config: TrainConfig, model: torch.nn.Module, device: torch.device, facts: dict[str, Any]
) -> dict[str, Any]:
    """What run.json says about a run from its start on; `facts` are the command, the corpus and the hashes."""
    strategy = collage.strategies()[config.strategy]
    return {
        "format": FORMAT,
        "name": f"{config.strategy}-seed{config.seed}",
        "status": "running",
        "strategy": config.strategy,
        "arithmetic": config.arithmetic,
        "seed": config.seed,
        "config": config.to_json(),
        **facts,
        "model": {
            "name": config.model,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(config.model_dtype).removeprefix("torch."),
        },
        "storage": {role: repr(getattr(strategy, role)) for role in ("param", "exp_avg", "exp_avg_sq")},
        "bytes_per_param": strategy.bytes_per_param(config.model_dtype),
        "state_bytes": None,
        "versions": versions(),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "wall_time_s": None,
        "peak_memory_bytes": None,
        "final": None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the figures."""
    packages = {name: version(name) for name in ("transformers", "accelerate")}
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "collage": collage.__version__,
    } | packages


def commit() -> str | None:
    """The git commit of this project's sources (with -dirty where they were changed); None outside its repository."""
    package = Path(collage.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may stand inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() / "src" / "collage" != package:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """The device with its model, such as "cpu: AMD EPYC"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{device.type}: {names[0] if names else platform.processor() or platform.machine()}"


def peak_memory(device: torch.device) -> int:
    """Bytes: the largest resident size of this process, or on CUDA the most that was allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def weights_sha256(model: torch.nn.Module) -> str:
    """A hash of a model's parameters, their names and dtypes, bit for bit."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------


class Metrics:
    """The records of a run, in its metrics.jsonl and in memory.

    Args:
        path: the file (None: memory only); records up to `step` are kept, later ones dropped,
            since a resumed run writes them again.
        step: the step that the run goes on from; 0 for a new run.
        keep: whether `records` holds the records; False where only the file is wanted.
    """

    def __init__(self, path: Path | None, step: int = 0, *, keep: bool = True) -> None:
        self._path, self._keep = path, keep
        earlier = [r for r in read_metrics(path) if r["step"] <= step] if path and step else []
        if path:
            write_text(path, "".join(map(_line, earlier)))
        self.records = earlier if keep else []

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; a reader sees it at once."""
        record = plain(record)
        if self._keep:
            self.records.append(record)
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(record))

    def sync(self) -> None:
        """Bring all records to the disk, before a checkpoint that relies on them."""
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())


def audit_record(step: int, report: Mapping[str, Any], sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of audit.jsonl: what the report page shows of an audit's report, to six digits.

    Args:
        step: the run's step.
        report: of the audit.
        sizes: the histogram of the updates' sizes, where one was taken.
    """
    modules = {
        name: {key: _six_digits(figures[key]) for key in AUDITED if key in figures}
        for name, figures in report["modules"].items()
    }
    return {"step": step, "modules": modules} | ({} if sizes is None else {HISTOGRAM: _counted(sizes)})


def _counted(sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {"log2": sizes["log2"], "elements": [_six_digits(each) for each in sizes["elements"]]}


def _six_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a killed run left unfinished is left out.

    Raises:
        UserError: another line is no JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} must hold a JSON record per line: {error}; restore it or start another run") from error


def final_figures(records: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The figures of a finished run, all from its records.

    Loss and audited figures are means over the records of the last tenth of the steps, tokens_per_s is the median
    over all.
    """
    last = records[-1]
    tail = [record for record in records if record["step"] > steps - max(1, steps // 10)]
    validation = last["validation_loss"]
    return {
        "step": last["step"],
        "tokens": last["tokens"],
        "train_loss": _mean(record["loss"] for record in tail),
        "validation_loss": validation,
        "perplexity": None if validation is None else _exp(validation),
        **{key: _mean(record[key] for record in tail if key in record) for key in AUDITED},
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in records if "tokens_per_s" in r),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _exp(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None

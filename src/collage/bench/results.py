"""A benchmark as data: rows that explain themselves, with the machine, the versions and the command beside them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import collage
from collage.bench import precision
from collage.bench.contenders import Contender
from collage.bench.plan import Plan
from collage.bench.step import Measured
from collage.train.config import UserError
from collage.train.runfiles import commit, device_name

STEP, PRECISION, MEMORY, TRAIN = "bench step", "bench precision", "bench memory", "bench train"
KINDS = (STEP, PRECISION, MEMORY, TRAIN)
VARIABLES = (
    "ATEN_",
    "COLLAGE_",
    "CUDA_",
    "GOMP_",
    "KMP_",
    "LD_PRELOAD",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "PYTORCH_",
    "TRITON_",
)
"""Beginnings of the names of environment variables that change timings."""


def quantile(values: Sequence[float], q: float) -> float | None:
    """The q-th quantile by linear interpolation; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def environment() -> dict[str, Any]:
    """What of the machine and its settings changes timings, the device apart."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        "cores": usable,
        "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def package_version(distribution: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _versions(distributions: Iterable[str]) -> dict[str, str]:
    known = {"python": platform.python_version(), "torch": str(torch.__version__), "collage": collage.__version__}
    names = [*sorted({*distributions} - {"torch", "torch-collage"}), "triton"]
    return known | {name: found for name in names if (found := package_version(name))}


def facts(kind: str, distributions: Iterable[str], device: torch.device, command: str) -> dict[str, Any]:
    """What a file says of a run of any kind as a whole, taken before it begins.

    Args:
        kind: one of `KINDS`.
        distributions: the packages that take part, beside torch and this one.
        device: where.
        command: how it was started.
    """
    return {
        "kind": kind,
        "device": device_name(device),
        "versions": _versions(distributions),
        "commit": commit(),
        "command": command,
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def distributions(contenders: Iterable[Contender]) -> set[str]:
    """The packages that optimizers are from."""
    return {each.distribution for each in contenders}


def step_facts(plan: Plan, command: str) -> dict[str, Any]:
    """What the file of `collage bench step` says of its run."""
    own = {"rounds": plan.rounds, "budget_s": plan.budget, "reference": plan.reference.name}
    return {**facts(STEP, distributions(plan.contenders), plan.device, command), **own}


def of_run(run: dict[str, Any]) -> dict[str, Any]:
    """What every row repeats of its run."""
    return {
        **{key: run[key] for key in ("device", "threads", "commit", "command", "created")},
        "torch": run["versions"]["torch"],
    }


def row(measured: Measured, run: dict[str, Any]) -> dict[str, Any]:
    """One row; times are of single steps, in milliseconds."""
    contender, parameters = measured.contender, measured.shapes.parameters
    milliseconds = [1e3 * seconds for seconds in measured.seconds]
    middle = quantile(milliseconds, 0.5)
    moved = _moved(measured)
    state = measured.state_bytes
    return {
        "contender": measured.name,
        "kind": contender.kind if contender else "null",
        "status": measured.status,
        "reason": measured.reason or None,
        "strategy": contender.strategy if contender else None,
        "backend": contender.backend if contender else None,
        "peer": contender.peer if contender else None,
        "version": package_version(contender.distribution if contender else "torch-collage"),
        "note": (contender.note if contender else "") or None,
        "shapes": measured.shapes.name,
        "tensors": len(measured.shapes.shapes),
        "parameters": parameters,
        "dtype": str(contender.dtype).removeprefix("torch.") if contender else None,
        "rounds": len(milliseconds),
        "ms_p10": quantile(milliseconds, 0.1),
        "ms_p50": middle,
        "ms_p90": quantile(milliseconds, 0.9),
        "host_ms": None if measured.host is None else 1e3 * measured.host,
        "ratio": _median(measured.ratios),
        "ratio_to_joined": _median(measured.joined),
        "bytes_moved_per_param": moved,
        "gb_per_s": None if moved is None or not middle else moved * parameters / middle / 1e6,
        "null_share": _median(measured.shares),
        "null_reason": measured.null_reason or None,
        "state_bytes_per_param": None if state is None else state / parameters,
        **of_run(run),
    }


def _moved(measured: Measured) -> float | None:
    if measured.widths:
        return float(2 * sum(measured.widths[0]) + sum(measured.widths[1]))
    streams = measured.contender.streams if measured.contender else None
    return None if streams is None else streams.bytes_moved


def record(found: Sequence[Measured], run: dict[str, Any]) -> dict[str, Any]:
    """The whole result."""
    return {**run, "rows": [row(measured, run) for measured in found]}


def precision_record(
    found: Sequence[precision.Found], equality: precision.Equality, plan: precision.PrecisionPlan, run: dict[str, Any]
) -> dict[str, Any]:
    """The whole result, as a file keeps it; `run` is what `results.facts` says."""
    settings = {
        "elements": plan.elements,
        "shape": [plan.elements // precision.ROW, precision.ROW],
        "steps": plan.steps,
        "gradient_mean": precision.MEAN,
        "gradient_noise": precision.NOISE,
        "decay": {"lr": precision.DECAY_RATE, "weight_decay": precision.DECAY},
        "spread_of_log_v": precision.SPREAD,
    }
    same = {"strategies": list(precision.EQUAL), "runs": equality.runs, "different": equality.different}
    return {
        **run,
        **settings,
        "equal": same if equality.runs else None,
        "rows": [_precision_row(each, run) for each in found],
    }


def _precision_row(found: precision.Found, run: dict[str, Any]) -> dict[str, Any]:
    """One row: everything about one contender."""
    contender = found.contender
    status = "skipped" if contender.unavailable else "failed" if found.error else "measured"
    return {
        "contender": contender.name,
        "kind": contender.kind,
        "status": status,
        "reason": contender.unavailable or found.error or None,
        "strategy": contender.strategy,
        "backend": found.backend,
        "peer": contender.peer,
        "version": package_version(contender.distribution),
        "note": contender.note or None,
        "dtype": str(contender.dtype).removeprefix("torch."),
        "displacement": found.displacement,
        "decay": found.decay,
        "second_moment": found.second_moment,
        "second_moment_reason": found.unread or None,
        **of_run(run),
    }


def read(path: Path) -> dict[str, Any]:
    """A result from its file.

    Raises:
        UserError: it is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["kind"] not in KINDS or not isinstance(result["rows"], list):
            kinds = " or ".join(f'"{kind}"' for kind in KINDS)
            raise UserError(f"{path} must be a result of kind {kinds}, got {result['kind']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} must be a file that one of {', '.join(f'`collage {kind}`' for kind in KINDS)} wrote with --json: "
            f"{error!r}"
        ) from error
    return result

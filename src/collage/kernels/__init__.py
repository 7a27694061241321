"""The backends of the step, and which of them serves a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from collage.kernels import eager
from collage.kernels.contract import DRAWS, ROLES, SUMS, Batch, Hyper, Layout, Scalars

__all__ = [
    "DRAWS",
    "ROLES",
    "SUMS",
    "Backend",
    "Batch",
    "Hyper",
    "Layout",
    "Scalars",
    "backends",
    "check_backend",
    "step",
]


@dataclass(frozen=True)
class Backend:
    """One way to run the step.

    Attributes:
        name: what ``backend=`` takes.
        available: whether it can run here.
        reason: why it cannot, in plain words; empty where it can.
        devices: the device types it serves; empty means all.
    """

    name: str
    available: bool
    reason: str = ""
    devices: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.available


def backends() -> dict[str, Backend]:
    """What can run here, and why the others cannot."""
    missing = f"torch-collage has no {{}} kernel in this version; the eager step serves {torch.__name__} on any device"
    return {
        "eager": Backend("eager", True),
        "native": Backend("native", False, missing.format("native CPU"), ("cpu",)),
        "triton": Backend("triton", False, missing.format("Triton"), ("cuda",)),
    }


def check_backend(name: str | None) -> None:
    """Raises ValueError unless ``name`` is None (chosen by device) or a backend that can run here."""
    if name is None:
        return
    known = backends()
    if name not in known:
        raise ValueError(f"backend must be None or one of {', '.join(known)}, got {name!r}")
    if not known[name].available:
        usable = ", ".join(each.name for each in known.values() if each.available)
        raise ValueError(f"backend {name!r} cannot run here: {known[name].reason}. Usable: {usable}, or None")


_STEPS: dict[str, Callable[[Batch], Tensor | None]] = {"eager": eager.step}


def step(batch: Batch, backend: str | None = None) -> Tensor | None:
    """One step over a batch by the named backend, or the best one for its device.

    Returns:
        The sums of an audited batch: float64 [number of parameters, len(SUMS)], else None.
    """
    return _STEPS[backend or "eager"](batch)

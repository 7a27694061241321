"""The backends of the step, and which of them serves a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collage.kernels import eager, firstuse, fused, native
from collage.kernels.contract import DRAWS, MOMENTS, ROLES, SUMS, Batch, Hyper, Inputs, Layout, Scalars, total
from collage.kernels.looking import PLAIN, Looks, look, records

__all__ = [
    "DRAWS",
    "MOMENTS",
    "PLAIN",
    "ROLES",
    "SUMS",
    "Backend",
    "Batch",
    "Hyper",
    "Inputs",
    "Layout",
    "Looks",
    "Scalars",
    "backends",
    "check_backend",
    "check_first_use",
    "choose",
    "look",
    "null_step",
    "records",
    "step",
    "total",
]


@dataclass(frozen=True)
class Backend:
    """One way to run the step.

    Attributes:
        name: what ``backend=`` takes.
        available: whether it can run here.
        reason: why it cannot, in plain words; empty where it can.
        devices: the device types it serves; empty means all.
        detail: what it runs on here, such as the processor's instruction sets it has kernels for, best first.
    """

    name: str
    available: bool
    reason: str = ""
    devices: tuple[str, ...] = ()
    detail: str = ""

    def __bool__(self) -> bool:
        return self.available


def backends() -> dict[str, Backend]:
    """What can run here, and why the others cannot."""
    return {name: _backend(name) for name in _STEPS}


def _backend(name: str) -> Backend:
    if name == "eager":
        return Backend(name, True)
    module = _MODULES[name]
    reason = module.unavailable()
    detail = ", ".join(native.instruction_sets()) if name == "native" else ""
    return Backend(name, not reason, reason, module.devices(), detail)


def check_backend(name: str | None) -> None:
    """Raises ValueError unless ``name`` is None (chosen by device) or a backend that can run here."""
    if name is None:
        return
    if name not in _STEPS:
        raise ValueError(f"backend must be None or one of {', '.join(_STEPS)}, got {name!r}")
    wanted = _backend(name)
    if not wanted:
        usable = ", ".join(each.name for each in backends().values() if each)
        raise ValueError(f"backend {name!r} cannot run here: {wanted.reason}. Usable: {usable}, or None")


_STEPS: dict[str, Callable[[Batch, Inputs], Tensor | None]] = {
    "eager": eager.step,
    "native": native.step,
    "triton": fused.step,
}
_MODULES = {"native": native, "triton": fused}


def choose(layout: Layout, arithmetic: str, dtype: torch.dtype, device: torch.device, wanted: str | None) -> str:
    """The backend that steps such parameters: the wanted one, or with None the fastest that serves them.

    Raises:
        ValueError: the wanted one does not serve them.
    """
    if wanted == "eager" or arithmetic == "working":
        return "eager"
    for name, module in _MODULES.items():
        if wanted not in (None, name) or device.type not in module.devices() or module.unavailable():
            continue
        if module.serves(layout, dtype):
            return name
    if wanted is None:
        return "eager"
    raise ValueError(
        f"backend {wanted!r} has no kernel for {layout} with parameters of {dtype} on {device.type}; it serves "
        f"collage.strategies() on {' and '.join(_MODULES[wanted].devices())}. Use backend=None or 'eager'"
    )


def step(batch: Batch, inputs: Inputs, backend: str) -> Tensor | None:
    """One step over a batch by the named backend.

    Returns:
        The sums where ``inputs.audit``: float64 [number of parameters, len(SUMS)], else None.
    """
    if (backend != "eager" or batch.layout.param.borne) and not torch.is_inference_mode_enabled():
        # Torch's own operations tell autograd of a change; a kernel that is handed addresses must say so itself, and so
        # must what changes the components of a parameter that bears them. Before the step the parameters' own records
        # are still in the cache.
        torch.autograd.graph.increment_version(batch.params)
    return _STEPS[backend](batch, inputs)


def check_first_use(batch: Batch, grad_dtype: torch.dtype, backend: str) -> None:
    """Looks at what a backend does the first time that it is to step such a layout (:mod:`collage.kernels.firstuse`).

    Raises:
        RuntimeError: it does not step as defined.
    """
    if batch.arithmetic != "fp32" or not batch.params:
        return
    dtype, device = batch.params[0].dtype, batch.params[0].device
    case = (backend, batch.layout, dtype, grad_dtype, device)
    if case not in _checked and not _capturing(device):
        firstuse.check(backend, _STEPS[backend], batch, grad_dtype)
        _checked.add(case)


_checked: set[tuple[object, ...]] = set()


def _capturing(device: torch.device) -> bool:
    """Whether work on the device is being recorded for a graph, in which nothing can be looked at."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def null_step(read_write: Sequence[Tensor], read_only: Sequence[Tensor], backend: str) -> None:
    """One in-place pass that reads all these tensors, equally long, and writes those of ``read_write`` back unchanged,
    in the way in which a backend ("native" or "triton") steps. It is the floor of a step's time in benchmarks."""
    _MODULES[backend].null_step(read_write, read_only)

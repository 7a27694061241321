"""The step as Triton kernels: NVIDIA GPUs from Ampere on, AMD GPUs, and on the CPU Triton's interpreter.

All tensors of a batch are stepped in one launch, which reads and writes each component once; a small launch before it
counts the steps and computes what is one number per tensor. Nothing of a step is read or computed on the host: nothing
waits for the device, and a step can be captured into a CUDA graph once one with the same kinds of inputs has run
outside of it.

Importing this needs no triton.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from collage.kernels.contract import Batch, Inputs, Layout
from collage.kernels.fused.forms import all_stored, read_stored
from collage.storage import Tiled, TiledTensor
from collage.storage.matmul import ROUNDERS
from collage.storage.tensor import READERS

__all__ = ["devices", "null_step", "read", "round_rows", "serves", "step", "unavailable"]

# The first compute capability with conversions and arithmetic as the kernels need them: Ampere.
CAPABILITY = (8, 0)


def unavailable() -> str:
    """Why the kernels cannot run here, with the remedy, in plain words; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`, which torch's CUDA and ROCm builds bring along"
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return (
            "torch finds no GPU here; install a CUDA or ROCm build of torch on a machine that has one, or set "
            "TRITON_INTERPRET=1 to run the kernels slowly on the CPU"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability() < CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        return f"{name} has compute capability {major}.{minor}; the kernels need 8.0 or later (Ampere)"
    return ""


def devices() -> tuple[str, ...]:
    """The device types that the kernels serve: GPUs, and CPUs where Triton interprets."""
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def serves(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether the kernels cover these storages with parameters of ``dtype``."""
    return all_stored(layout, dtype) is not None


def step(batch: Batch, inputs: Inputs) -> Tensor | None:
    """One AdamW step over all tensors of a batch, in place, bit-equal to :func:`collage.kernels.eager.step`.

    ``inputs.lr``, ``inputs.grad_scale`` and ``inputs.found_inf`` are read on the device. A skipped step is not counted,
    and its sums are zeros.

    Returns:
        None, or where ``inputs.audit`` a float64 tensor [number of parameters, len(SUMS)] on the batch's device. The
        counts in it equal the eager step's; other sums are added in an order of their own.

    Raises:
        ValueError: a layout that :func:`serves` denies.
        RuntimeError: the first step of a batch within the capture of a CUDA graph.
    """
    from collage.kernels.fused import launching

    return launching.step(batch, inputs)


def read(tensor: TiledTensor) -> Tensor | None:
    """What a model reads of a parameter in tiles, as its components stand: bfloat16; None where no kernel serves it.
    One pass over its bytes, bit-equal to :func:`collage.storage.tensor.read`."""
    stored = read_stored(tensor.form, tensor.forward)
    if stored is None or not _can_run() or not all(part.is_contiguous() for part in tensor.parts):
        return None
    from collage.kernels.fused import launching

    return launching.read(tensor, stored)


READERS["cuda"] = read


def round_rows(x: Tensor, form: Tiled) -> list[Tensor] | None:
    """Activations [rows, width] in bfloat16 rounded to nearest into the components of tiles of one row, which ``form``
    describes; None where no kernel serves it. One pass over them, bit-equal to ``form.store``."""
    described = read_stored(form, "value")
    if described is None or not _can_run() or x.dtype != torch.bfloat16:
        return None
    from collage.kernels.fused import launching

    return launching.round_rows(x.contiguous(), form, described)


ROUNDERS["cuda"] = round_rows


@cache
def _can_run() -> bool:
    return not unavailable()


def null_step(read_write: Sequence[Tensor], read_only: Sequence[Tensor]) -> None:
    """Reads all tensors and writes those of ``read_write`` back as they were, in one launch: the time that a step with
    the same tensors cannot fall below.

    Args:
        read_write: contiguous tensors on one device, at least one.
        read_only: contiguous tensors on the same device.
    """
    from collage.kernels.fused import launching

    launching.null_step(read_write, read_only)


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

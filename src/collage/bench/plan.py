"""What a benchmark times, and in which groups, so that everything fits into memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from collage.bench.contenders import Contender, Widths
from collage.bench.shapes import ShapeSet
from collage.train.config import UserError

UNKNOWN, TEMPORARIES = 24.0, 8.0
"""Bytes per parameter set aside for a contender whose formats are not known, and for what the one that is stepping
allocates for the time of its step."""

NULL_ELEMENTS = 2**28
"""Null kernels of more elements run over so many, and their time is scaled: far beyond every cache the speed is the
same, and their tensors would crowd out contenders."""


@dataclass(frozen=True)
class Plan:
    """A benchmark of the optimizer step.

    Attributes:
        reference: what ratios are taken to; it takes part in every group.
        contenders: the others, in the order of their rows.
        shapes: the sets of shapes, timed one after the other.
        device: where.
        dtype: the low-precision dtype.
        rounds: how many rounds; slow contenders take part in fewer.
        budget: seconds for the rounds of one contender.
        memory: bytes that may be used at the same time.
    """

    reference: Contender
    contenders: tuple[Contender, ...]
    shapes: tuple[ShapeSet, ...]
    device: torch.device
    dtype: torch.dtype
    rounds: int
    budget: float
    memory: float


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; infinity where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return float(found[0]) * 1024 if found else float("inf")


def groups(plan: Plan, shapes: ShapeSet) -> tuple[list[list[Contender]], dict[str, str]]:
    """The contenders in groups that fit into memory beside the reference, and why others are in none, by name.

    Raises:
        UserError: the reference does not fit.
    """
    elements = shapes.parameters * (2 if shapes.joined else 1)
    base = elements * (2 * plan.dtype.itemsize + TEMPORARIES) + _bytes(plan.reference, elements, set())
    if base > plan.memory:
        raise UserError(
            f"--shapes {shapes.name} needs about {base / 1e9:.1f} GB for the reference alone, and "
            f"{plan.memory / 1e9:.1f} GB may be used; choose smaller shapes, or raise --memory where there is more"
        )
    found: list[list[Contender]] = [[]]
    left_out: dict[str, str] = {}
    used, nulls = base, set[Widths]()
    for contender in plan.contenders:
        if contender.unavailable:
            continue
        if contender.most_tensors is not None and len(shapes.shapes) > contender.most_tensors:
            count = len(shapes.shapes)
            left_out[contender.name] = f"compiles all tensors into one graph, which takes hours for {count:,} of them"
            continue
        alone = base + _bytes(contender, elements, set())
        if alone > plan.memory:
            left_out[contender.name] = f"needs about {alone / 1e9:.1f} GB, {plan.memory / 1e9:.1f} GB may be used"
            continue
        if used + _bytes(contender, elements, set(nulls)) > plan.memory:
            found.append([])
            used, nulls = base, set()
        used += _bytes(contender, elements, nulls)
        found[-1].append(contender)
    return found, left_out


def _bytes(contender: Contender, elements: int, nulls: set[Widths]) -> float:
    """Bytes of a contender's tensors and of its null kernel's, unless that one is in `nulls`, where it is added."""
    if contender.streams is None:
        return elements * UNKNOWN
    own = elements * contender.streams.bytes_kept * 1.1
    widths = contender.streams.null()
    shared = 0 if widths in nulls else min(elements, NULL_ELEMENTS) * sum(map(sum, widths))
    nulls.add(widths)
    return own + shared

"""Bytes per parameter, split into what they are for."""

from __future__ import annotations

import torch

from collage.optim.strategies import Strategy, strategies
from collage.report.groups import Group
from collage.report.runs import section

PARTS = ("weight", "gradient", "m", "v", "low parts, master copy")
UNSPLIT = "all together"
FILLS: dict[str, str] = dict(zip((*PARTS, UNSPLIT), ("blue", "orange", "green", "sky", "purple", "gray"), strict=True))
"""The colour of each part, by its name in the palette."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def split(strategy: Strategy, dtype: torch.dtype, gradient: float | None = None) -> dict[str, float]:
    """Bytes per parameter by part; the first component of a storage is the part itself, the others are extras.

    Args:
        strategy: the strategy's record.
        dtype: of the model's parameters.
        gradient: bytes of one gradient element; None: as of the parameter's dtype.
    """
    roles = [storage.components(dtype) for storage in (strategy.param, strategy.exp_avg, strategy.exp_avg_sq)]
    weight, m, v = (components[0].bytes_per_element for components in roles)
    extras = sum(each.bytes_per_element for components in roles for each in components[1:])
    own = strategy.param.param_dtype(dtype).itemsize if gradient is None else gradient
    return dict(zip(PARTS, (weight, own, m, v, extras), strict=True))


def group_split(group: Group) -> dict[str, float]:
    """The split of a group's bytes; one undivided part where the files' total isn't the strategy table's.

    That is so for strategies that this version doesn't know. Empty where the files have no total.
    """
    run = group.runs[0]
    total = run.figure("bytes_per_param")
    if total is None:
        return {}
    strategy = strategies().get(group.strategy)
    dtype = _DTYPES.get(str(section(run.record, "model").get("dtype", "bfloat16")).removeprefix("torch."))
    if strategy is None or dtype is None:
        return {UNSPLIT: total}
    wide = run.config.get("grad_dtype") == "float32"
    for gradient in (None, 4.0 if wide else None):
        parts = split(strategy, dtype, gradient)
        if sum(parts.values()) == total:
            return parts
    return {UNSPLIT: total}

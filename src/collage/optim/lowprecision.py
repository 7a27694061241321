"""Casting a model without losing what the cast rounds away.

:func:`to_low_precision` rounds float32 parameters and keeps their full values aside until an optimizer takes them into
its own storage. They wait in a registry keyed by the parameter object; an optimizer that takes the parameter checks
that it still holds the rounding of that value.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from collage.numerics import format_of, round_nearest
from collage.optim.sharding import is_sharded, local, placed_as

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass
class _Waiting:
    """A full value that no optimizer has taken yet, and where its parameter stood."""

    param: weakref.ref[Tensor]
    module: weakref.ref[nn.Module]
    name: str
    value: Tensor


_waiting: dict[int, _Waiting] = {}


def to_low_precision(model: ModuleT, dtype: torch.dtype = torch.bfloat16) -> ModuleT:
    """Rounds a model's float32 parameters to ``dtype`` in place, to nearest, and keeps what the rounding dropped.

    The full float32 values travel with the parameters until a collage optimizer is constructed on them; a strategy that
    can hold more than ``dtype`` (light, plus, mixed, ...) then starts from them. Until then they take 4 bytes per
    parameter. Parameters of another dtype, and buffers, stay as they are. Sharded parameters are rounded part by part:
    first ``fully_shard`` or ``parallelize_module``, then this, then the optimizer.

    Args:
        model: any module, changed in place.
        dtype: torch.bfloat16 or torch.float16.

    Returns:
        The model.

    Raises:
        ValueError: ``dtype`` is not one of the two.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
    _forget_dead()
    fmt = format_of(dtype)
    seen: set[int] = set()
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if param.dtype != torch.float32 or id(param) in seen:
                continue
            seen.add(id(param))
            value = param.detach()
            # A gradient of the old dtype cannot belong to the new parameter.
            param.grad = None
            _replace_value(param, placed_as(round_nearest(local(value), fmt), param))
            _waiting[id(param)] = _Waiting(weakref.ref(param), weakref.ref(module), name, value)
    return model


def _replace_value(param: nn.Parameter, value: Tensor) -> None:
    if is_sharded(param):
        # Exchanged as ``module.to(dtype)`` does it: ``data`` of a DTensor doesn't reach its local part.
        torch.utils.swap_tensors(param, nn.Parameter(value, requires_grad=param.requires_grad))
    else:
        param.data = value


def take_full_value(param: Tensor) -> Tensor | None:
    """The float32 value that :func:`to_low_precision` kept for ``param``, removed from the registry; None if it kept
    none, or (with a warning) if the parameter no longer holds that value's rounding."""
    entry = _waiting.get(id(param))
    if entry is None or entry.param() is not param:
        return None
    del _waiting[id(param)]
    value = entry.value.to(param.device)
    if not _is_rounding_of(value, param):
        warnings.warn(
            f"parameter {entry.name!r} was changed after collage.to_low_precision: the low part kept for it is "
            "dropped. Load weights before the cast to keep them.",
            stacklevel=2,
        )
        return None
    return value


def _is_rounding_of(value: Tensor, param: Tensor) -> bool:
    """Of a sharded parameter the part that is here."""
    if value.shape != param.shape or is_sharded(value) != is_sharded(param):
        return False
    full, held = local(value), local(param.detach())
    return full.shape == held.shape and torch.equal(round_nearest(full, format_of(param)), held)


def warn_of_replaced() -> None:
    """Warns of parameters that were replaced by other objects while their low parts waited, and drops those."""
    replaced = []
    for key, entry in list(_waiting.items()):
        module = entry.module()
        if module is not None and module._parameters.get(entry.name) is not entry.param():
            replaced.append(entry.name)
            del _waiting[key]
    _forget_dead()
    if replaced:
        warnings.warn(
            f"{len(replaced)} parameters (the first: {replaced[0]!r}) were replaced after collage.to_low_precision and "
            "before an optimizer took them: their low parts are lost. Construct the optimizer first, or cast after the "
            "parameters have been replaced.",
            stacklevel=2,
        )


def _forget_dead() -> None:
    for key, entry in list(_waiting.items()):
        if entry.param() is None and entry.module() is None:
            del _waiting[key]

"""Sharded parameters (DTensors), whose steps are made on their local parts.

A local part is one run of the whole parameter's elements where it is sharded along its first dimension, and several
otherwise. Random bits follow from an element's place in the whole parameter, so they don't depend on the sharding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from collage.kernels import Layout
from collage.storage import Component


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Whoever has one has loaded the module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part of a tensor that is here; the tensor itself unless it is sharded. Not a copy outside gradient mode."""
    if not is_sharded(tensor):
        return tensor
    part = tensor.to_local()
    # What a collective still computes has no memory yet.
    return part.wait() if hasattr(part, "wait") else part


def local_parts(layout: Layout, param: Tensor, state: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """The local components of each role."""
    here = local(param.detach())
    return {role: list(map(local, layout.parts(role, here, state))) for role, _ in layout.roles}


def new_component(param: Any, component: Component) -> Tensor:
    """A state tensor of zeros, sharded as the parameter is."""
    if component.elements == 1:
        return torch.zeros_like(param, dtype=component.dtype, memory_format=torch.contiguous_format)
    shape = component.shape(param.shape)
    if not is_sharded(param):
        return torch.zeros(shape, dtype=component.dtype, device=param.device)
    from torch.distributed.tensor import zeros

    return zeros(*shape, dtype=component.dtype, device_mesh=param.device_mesh, placements=param.placements)


def placed_as(value: Tensor, param: Any, shape: Sequence[int] | None = None) -> Tensor:
    """The local part of a tensor as that tensor, sharded as the parameter is; of its shape unless another is said."""
    if not is_sharded(param):
        return value
    size = param.shape if shape is None else torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return type(param.data).from_local(
        value, param.device_mesh, param.placements, shape=size, stride=stride, run_check=False
    )


def placed_like(grad: Any, param: Any) -> Tensor:
    """The local part of a gradient, sharded as its parameter is."""
    if is_sharded(grad) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def runs(param: Any) -> list[tuple[int, int, int]]:
    """A parameter's local elements as (index of the first within the whole parameter, start, end) of each run."""
    if not is_sharded(param):
        return [(0, 0, param.numel())]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if prod(shape) == 0:
        return [(0, 0, 0)]
    # Trailing dimensions that are whole are part of one run.
    split = max((dim for dim in range(len(shape)) if shape[dim] != param.shape[dim]), default=0)
    strides = [prod(param.shape[dim + 1 :]) for dim in range(len(shape))]
    length = prod(shape[split:])
    outer = [range(begin, begin + size) for begin, size in zip(offset[:split], shape[:split], strict=True)]
    base = offset[split] * strides[split] if shape else 0
    firsts = [base]
    for indices, stride in zip(outer, strides, strict=False):
        firsts = [first + index * stride for first in firsts for index in indices]
    # Row-major order of the outer dimensions is the order of the local part.
    return [(first, i * length, (i + 1) * length) for i, first in enumerate(firsts)]


def any_on_all_processes(found: bool, params: Sequence[Any]) -> bool:
    """Whether any process that shares one of these parameters found something: all of them must go the same way."""
    # In the order of the parameters, which is that of every process: a set's order need not be.
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_sharded(param)):
        flag = torch.tensor(float(found), device=mesh.device_type)
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        found = bool(flag.item())
    return found


def whole_sums(rows: Tensor, params: Sequence[Any]) -> Tensor:
    """A row per parameter of sums over its local elements -> over all of them, the same on every process."""
    shared: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        if is_sharded(param):
            cut = tuple(dim for dim, where in enumerate(param.placements) if not where.is_replicate())
            shared.setdefault((param.device_mesh, cut), []).append(index)
    # In the order of the parameters, which is that of every process.
    for (mesh, cut), indices in shared.items():
        part = rows[indices]
        for dim in cut:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        rows[indices] = part
    return rows

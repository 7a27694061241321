"""Models whose large weights are kept in 8-bit components and nothing else: conversion, files, gradient release."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from collage.optim.adamw import AdamW
from collage.optim.lowprecision import take_full_value, to_low_precision
from collage.optim.sharding import is_sharded, local, placed_as
from collage.optim.strategies import Strategy, from_plain, plain, resolve
from collage.storage import Tiled, TiledTensor, form_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def to_fp8_(
    model: ModuleT,
    strategy: str | Strategy = "fp8",
    *,
    forward: str = "value",
    tile: int | tuple[int, int] = 128,
    shards: int = 1,
    cast: bool = True,
) -> ModuleT:
    """Swaps the weights of Linear and Embedding layers for parameters that are kept in float8 components alone.

    Each is a :class:`collage.TiledTensor`: nothing of it is in 16 bits at rest, and bfloat16 values are made where an
    operation reads them. Take the same ``strategy`` in :class:`collage.AdamW` afterwards. Weights come from their full
    values, to nearest; the model's other float32 parameters are cast by :func:`collage.to_low_precision`. Weights that
    the strategy cannot keep (fewer than 4,096 elements, or rows that no even number of 32 to 128 divides) stay as they
    are. A weight that several modules share stays one.

    Args:
        model: a model in float32 or bfloat16, changed in place; not yet sharded.
        strategy: one that keeps parameters in tiles: fp8, fp8-native, fp8-3, naive-fp8.
        forward: what the model reads: "value" (hi + lo), or "hi"; with "fp8" hi too, and the layers multiply it with
            activations that are rounded to float8 (:mod:`collage.storage.matmul`).
        tile: rows and columns that share a scale, or one number for both: powers of two, columns at least 32. Tiles of
            one row, (1, 128), can be shared by any number of processes, and cost 1/128 byte per parameter more.
        shards: over how many processes FSDP2 will shard the rows. The height of the tiles then becomes the largest
            power of two that divides each process's rows.
        cast: whether to cast the other parameters. False where the model is sharded next: a cast after that, by
            :func:`collage.to_low_precision`, keeps their full values for the optimizer.

    Returns:
        The model.

    Raises:
        ValueError: a strategy without tiles, options out of range, a sharded or float16 weight, or no weight to keep.
    """
    record = resolve(strategy)
    if not isinstance(record.param, Tiled):
        raise ValueError(f"strategy {record.name!r} keeps no parameters in tiles; allowed: fp8, fp8-native, fp8-3")
    rows, columns = tile if isinstance(tile, tuple) else (tile, tile)
    if min(rows, columns // 32, shards) < 1 or rows & (rows - 1) or columns & (columns - 1):
        raise ValueError(
            f"tile must be a power of two >= 32, or a pair of which the first may be less, and shards >= 1, got {tile} "
            f"and {shards}"
        )
    swapped: dict[int, nn.Parameter] = {}
    for name, weight in _weights(model):
        form = _form(record, weight, (rows, columns), shards)
        if form is not None and id(weight) not in swapped:
            _check(name, weight)
            full = take_full_value(weight)
            value = TiledTensor.of(weight if full is None else full, form, forward)
            swapped[id(weight)] = nn.Parameter(value, requires_grad=weight.requires_grad)
    if not swapped and not any(form_of(weight) for _, weight in _weights(model)):
        raise ValueError("the model has no Linear or Embedding weight that could be kept in tiles: all are too small")
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and id(param) in swapped:
                module._parameters[name] = swapped[id(param)]
    return to_low_precision(model, torch.bfloat16) if cast else model


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            yield f"{name}.weight", module.weight


def _form(strategy: Strategy, weight: Tensor, tile: tuple[int, int], shards: int) -> Tiled | None:
    """How the strategy keeps a weight; None if it cannot, or if that is done already."""
    assert isinstance(strategy.param, Tiled)
    if form_of(weight) is not None or weight.dim() != 2:
        return None
    rows, columns = tile
    if shards > 1:
        each = gcd(-(-weight.shape[0] // shards), weight.shape[0])
        rows = min(rows, each & -each)
    storage = Tiled(strategy.param.of, rows, columns)
    moments = (strategy.exp_avg.fitted(weight.shape), strategy.exp_avg_sq.fitted(weight.shape))
    return None if None in moments else storage.fitted(weight.shape)


def _check(name: str, weight: Tensor) -> None:
    if is_sharded(weight):
        raise ValueError(f"{name} is sharded already; call collage.to_fp8_(model, shards=...) before fully_shard")
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name} is {weight.dtype}; allowed: a model in torch.float32 or torch.bfloat16")


# ---- files -----------------------------------------------------------------------------------------------------------


def split_tiles(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state as ordinary tensors, for safetensors and other files.

    A parameter ``w`` in tiles becomes ``w.hi``, ``w.lo`` (``w.lo2``), ``w.scale`` and ``w.form``: the components, and
    the storage's record as JSON in UTF-8. Of parameters that share components the first is written, and ``w.form`` of
    the others names it. Components of a sharded parameter are sharded as it is.
    """
    found: dict[str, Tensor] = {}
    first: dict[int | str, str] = {}
    for name, tensor in state.items():
        here = local(tensor.detach())
        if not isinstance(here, TiledTensor):
            found[name] = tensor
            continue
        # A process's share may be empty, and then has no address.
        owner = first.setdefault(here.hi.data_ptr() or name, name)
        record = {"same_as": owner} if owner != name else {**plain(here.form), "forward": here.forward}
        found[f"{name}.form"] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
        if owner == name:
            components = here.form.components(torch.bfloat16)
            for part, value, component in zip(here.part_names, here.parts, components, strict=True):
                found[f"{name}.{part}"] = placed_as(value.detach(), tensor, component.shape(tensor.shape))
    return found


def join_tiles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`split_tiles`, bit for bit. ``load_state_dict`` takes it into a model in tiles of the same
    kind as it is, and into an ordinary bfloat16 model as hi + lo rounded to bfloat16.

    Raises:
        ValueError: a component is missing.
    """
    found: dict[str, Tensor] = {}
    forms = {name.removesuffix(".form"): value for name, value in tensors.items() if name.endswith(".form")}
    taken = {f"{name}.{part}" for name in forms for part in ("form", "hi", "lo", "lo2", "scale")}
    same: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = name.removesuffix(".form")
        if owner in forms and name.endswith(".form"):
            record = json.loads(bytes(tensor.tolist()))
            if "same_as" in record:
                same[owner] = record["same_as"]
            else:
                found[owner] = _joined(owner, record, tensors)
        elif name not in taken:
            found[name] = tensor
    return found | {name: found[owner] for name, owner in same.items()}


def _joined(name: str, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> TiledTensor:
    forward = record.pop("forward")
    form = from_plain(record)
    if not isinstance(form, Tiled):
        raise ValueError(f"{name}.form names {type(form).__name__}; allowed: Tiled")
    names = TiledTensor.names_of(form)
    missing = [part for part in names if f"{name}.{part}" not in tensors]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; its form says {form}")
    return TiledTensor([tensors[f"{name}.{part}"] for part in names], form, forward)


# ---- gradient release ------------------------------------------------------------------------------------------------


class GradientRelease:
    """Steps each parameter of an optimizer during the backward pass, as soon as its gradient is complete, and frees the
    gradient: no two gradients stand in memory at once. Undone by :meth:`remove`.

    It excludes what needs all gradients at once: clipping by their norm, accumulation over several backward passes, a
    loss scaler. ``optimizer.step()`` has nothing left to do; learning rates are read at each parameter's step.

    Args:
        optimizer: its parameters that require gradients are stepped so.
    """

    def __init__(self, optimizer: AdamW) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]

        def step(param: Tensor) -> None:
            assert param.grad is not None
            optimizer.advance({id(param): param.grad})
            param.grad = None

        self._hooks = [param.register_post_accumulate_grad_hook(step) for param in params]

    def remove(self) -> None:
        """Leaves the gradients to ``optimizer.step()`` again."""
        for hook in self._hooks:
            hook.remove()

"""The step as one opaque operator, which is all that a compiler sees of it.

A compiler that looks inside a step may keep 16-bit intermediates in float32, which turns every low part into zero
(TorchInductor does by default). ``torch.ops.collage.step_`` tells it that parameters change and gradients are read, and
nothing of how. The state stays with the optimizer, which the operator finds by a number, and hyper-parameters are read
when it runs: the first change of the learning rate compiles once more, later ones do not.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from collage.optim.sharding import local

_library = torch.library.Library("collage", "FRAGMENT")
_library.define("step_(Tensor(a!)[] params, Tensor[] grads, int[] ordinals, int optimizer) -> ()")

_registered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class Steppable(Protocol):
    """An optimizer with a number from :func:`register`."""

    param_groups: list[dict[str, Any]]
    number: int

    def advance(self, given: dict[int, Tensor] | None = None) -> None:
        """One step, on these gradients by ``id`` of their parameter in place of the parameters' own."""
        ...


def register(optimizer: Steppable) -> None:
    """Gives an optimizer the number by which the operator finds it, as long as it lives."""
    optimizer.number = next(_numbers)
    _registered[optimizer.number] = optimizer


def traced_step(optimizer: Steppable) -> None:
    """What a compiler traces: one call over the local tensors of all parameters that have a gradient."""
    params, grads, ordinals, ordinal = [], [], [], 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                params.append(param.to_local() if hasattr(param, "to_local") else param)
                grads.append(_local_gradient(param))
                ordinals.append(ordinal)
            ordinal += 1
    torch.ops.collage.step_(params, grads, ordinals, optimizer.number)


def _local_gradient(param: Any) -> Tensor:
    grad = param.grad
    if not hasattr(grad, "to_local"):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def _step(params: list[Tensor], grads: list[Tensor], ordinals: list[int], number: int) -> None:
    optimizer: Steppable = _registered[number]
    own = [param for group in optimizer.param_groups for param in group["params"]]
    stepped = [own[ordinal] for ordinal in ordinals]
    given = {id(param): grad for param, grad in zip(stepped, grads, strict=True)}
    with _standing_on(stepped, params):
        optimizer.advance(given)


@contextmanager
def _standing_on(own: list[Tensor], tensors: list[Tensor]) -> Iterator[None]:
    """Within it the optimizer's parameters have the memory of these tensors. Nearly always they have it anyway; a graph
    that still needs the old values hands over copies, and puts them in place itself."""
    pairs = [(local(param), tensor) for param, tensor in zip(own, tensors, strict=True)]
    moved = [(mine, mine.data, tensor) for mine, tensor in pairs if mine.data_ptr() != tensor.data_ptr()]
    try:
        for mine, _, tensor in moved:
            mine.data = tensor
        yield
    finally:
        for mine, data, _ in moved:
            mine.data = data


_library.impl("step_", _step, "CompositeExplicitAutograd")
torch.library.register_fake("collage::step_", lambda params, grads, ordinals, optimizer: None, lib=_library)

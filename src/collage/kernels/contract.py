"""What the optimizers hand to a backend, what they get back, and the scalars that every backend must use.

The contract that makes backends bit-equal:

- The rule is done in float32 on loaded values with separately rounded +, -, *, / and a correctly rounded square root,
  in the order that :mod:`collage.kernels.eager` writes down. No fused multiply-add, no reciprocal for a division.
- Every scalar is computed in float64 and rounded once to float32 (:class:`Scalars`).
- Random bits come from :mod:`collage.numerics.counter`, keyed by the batch's seed, each parameter's ordinal and step,
  and the element's index; the draw's number says which tensor it rounds (:data:`DRAWS`).
- Bit-equal means: all bits equal, every nan taken as one nan.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from collage.storage import Component, Storage

MOMENTS = ("exp_avg", "exp_avg_sq")
ROLES = ("param", *MOMENTS)
# Which 16-bit draw of an element rounds which tensor; param and exp_avg_sq share one 32-bit word.
DRAWS = {"param": 0, "exp_avg_sq": 1, "exp_avg": 2}

# Columns of the record of sums that an audited step returns: float64, one row per parameter.
SUMS = (
    "moved_dot_update",  # sum of e * u over elements, e = what the stored value moved, u = the intended update
    "moved_hi_dot_update",  # the same with e = what the parameter that the model reads moved
    "update_dot_update",  # sum of u * u
    "updates",  # elements with u != 0
    "lost",  # of these, the stored value did not change
    "lost_hi",  # of these, the parameter that the model reads did not change
    "decays",  # elements with v > 0 and |b2 v + (1 - b2) g^2 - v| > 0
    "lost_decays",  # of these, the stored v did not change
)


@dataclass(frozen=True)
class Layout:
    """The storages of one parameter and its moments."""

    param: Storage
    exp_avg: Storage
    exp_avg_sq: Storage

    @cached_property
    def roles(self) -> tuple[tuple[str, Storage], ...]:
        """(role, storage), in the order in which a step stores them."""
        return tuple((role, getattr(self, role)) for role in ROLES)

    @property
    def stochastic(self) -> bool:
        """Whether a step takes random bits."""
        return any(storage.stochastic for _, storage in self.roles)

    def components(self, dtype: torch.dtype) -> dict[str, Component]:
        """Name -> component of all that stands in ``optimizer.state`` for parameters of ``dtype``."""
        names: dict[str, Component] = {}
        for role, storage in self.roles:
            components = storage.components(dtype)
            # The leading component of a parameter is the parameter itself, or it bears all.
            kept = components if role != "param" else () if storage.borne else components[1:]
            names.update({component.name.format(role=role): component for component in kept})
        return names

    def block(self, dtype: torch.dtype) -> int:
        """Elements that are stepped together because they share entries of components; 1 where none do."""
        return math.lcm(*(each.span for _, storage in self.roles for each in storage.components(dtype)))

    def parts(self, role: str, param: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
        """The component tensors of one role, leading one first."""
        storage = getattr(self, role)
        if role == "param" and storage.borne:
            return [*getattr(param, "parts")]  # noqa: B009  of a TiledTensor
        names = storage.state_names(role, param.dtype)
        if role == "param":
            return [param, *(state[name] for name in names[1:])]
        return [state[name] for name in names]


@dataclass(frozen=True)
class Hyper:
    """AdamW's hyper-parameters (paper section 4), as Python numbers."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False


@dataclass
class Batch:
    """Tensors that are stepped together, sharing a device, a layout and dtypes: made once, stepped many times. They
    stay where they are in memory: backends keep their addresses.

    Attributes:
        layout: their storages.
        arithmetic: "fp32" or "working".
        seed: of the random bits.
        params: contiguous tensors, updated in place; the local part of a sharded parameter. Where the layout's storage
            is borne by them, tensors with their components as ``parts``.
        states: a dict of contiguous component tensors per parameter, updated in place.
        steps: float32 [number of parameters] on their device: steps taken so far. A backend counts its step in it.
        ordinals: each parameter's place in the optimizer.
        firsts: the index of each tensor's first element within the whole parameter; 0 where it is not sharded.
        kept: what a backend keeps between the steps of this batch, under its own name.
    """

    layout: Layout
    arithmetic: str
    seed: int
    params: Sequence[Tensor]
    states: Sequence[dict[str, Tensor]]
    steps: Tensor
    ordinals: Sequence[int]
    firsts: Sequence[int]
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass
class Inputs:
    """What is new in each step of a batch.

    Attributes:
        hyper: the hyper-parameters.
        grads: contiguous tensors of the parameters' shapes, all in their dtype or all float32; read only.
        addresses: theirs, where whoever checked that they are of one dtype has seen them
            (:func:`collage.kernels.look`); else None.
        lr: a tensor of one element on the batch's device that counts instead of ``hyper.lr``, for backends that need
            not read it on the host; else None.
        grad_scale: float32 tensor of one element: what gradients have been multiplied with (a loss scale), or None.
        found_inf: float32 tensor of one element that is not 0 if the step is to be skipped, for backends that need not
            read it on the host; else None.
        audit: whether to return the sums.
    """

    hyper: Hyper
    grads: Sequence[Tensor]
    addresses: array[int] | None = None
    lr: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    audit: bool = False


def power(beta: float, exponent: int) -> float:
    """``beta ** exponent`` by repeated multiplication in float64, from the left, so that a counter kept on a device
    that multiplies once a step has the same bits."""
    known = _powers.setdefault(beta, {0: 1.0})
    last = max(e for e in known if e <= exponent)
    value = known[last]
    for _ in range(exponent - last):
        value *= beta
    if exponent not in known:
        # Parameters of a model share one step or a few; only the newest few powers are worth keeping.
        _powers[beta] = {0: 1.0, **dict(list(known.items())[1:][-8:]), exponent: value}
    return value


_powers: dict[float, dict[int, float]] = {}


def to_float32(value: float) -> float:
    """The float32 nearest to a Python float, as a Python float."""
    return ctypes.c_float(value).value


def total(terms: Tensor) -> Tensor:
    """The sum of a piece's terms. In parts below the size from which torch divides a sum among threads (2**15): the
    figures are the same for every thread count."""
    return torch.stack([part.sum() for part in terms.split(1 << 14)]).sum()


@dataclass(frozen=True)
class Scalars:
    """The scalars of a step: float64 for "working", each rounded once to float32 for "fp32" arithmetic."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    bias_correction2_sqrt: float
    inverse_bias_correction2_sqrt: float
    eps: float
    decay: float

    @staticmethod
    @lru_cache(maxsize=256)
    def of(hyper: Hyper, step: int, arithmetic: str) -> Scalars:
        """The scalars at a parameter's ``step`` (from 1).

        ``step_size`` is -lr / (1 - beta1^t); ``decay`` is lr * weight_decay.
        """
        correction1 = 1.0 - power(hyper.beta1, step)
        correction2_sqrt = math.sqrt(1.0 - power(hyper.beta2, step))
        exact = {
            "beta1": hyper.beta1,
            "one_minus_beta1": 1.0 - hyper.beta1,
            "beta2": hyper.beta2,
            "one_minus_beta2": 1.0 - hyper.beta2,
            "step_size": -hyper.lr / correction1,
            "bias_correction2_sqrt": correction2_sqrt,
            "inverse_bias_correction2_sqrt": 1.0 / correction2_sqrt,
            "eps": hyper.eps,
            "decay": hyper.lr * hyper.weight_decay,
        }
        if arithmetic == "working":
            return Scalars(**exact)
        return Scalars(**{name: to_float32(value) for name, value in exact.items()})

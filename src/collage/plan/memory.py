"""What a strategy, a number of shards and a micro-batch need on one device.

Parameters, states and gradients are counted on every parameter's shape from the storages of the strategy, as a real
optimizer would make them, sharded along the first dimension as FSDP2 does; the largest shard counts. Activations and
temporaries come from the traced step (:mod:`collage.plan.trace`). The peak is the largest of three phases:

- forward: parameters + states + what is alive in the forward (+ all gradients, where they accumulate);
- backward: the same with the gradients that have arrived, event by event;
- step: parameters + states + all gradients + what the optimizer and the clipping allocate meanwhile.

Memory that an allocator reserves and does not give out, the CUDA context and the code are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np
import torch

import collage
from collage.kernels import ROLES
from collage.plan.models import Subject
from collage.plan.trace import TRACED_BLOCKS, Timeline, trace
from collage.storage import Component
from collage.train.config import UserError
from collage.train.products import NATIVE

MOST_SEQUENCES = 2**24
"""No larger micro-batch is looked for."""
PHASES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Settings:
    """How a model is trained on each device.

    Attributes:
        shards: devices that share parameters, gradients and states; 1 for one device, and for DDP.
        micro_batch: sequences of a forward pass on each device.
        dtype: of the model, where the strategy doesn't fix it.
        gradient: "model" (the parameters' dtype) or "float32".
        reduce: dtype in which shards' gradients are added; None for the gradients' own.
        accumulates: whether gradients stay while the next micro-batch goes forward.
        attention: "sdpa" (keeps no scores) or "eager".
        products: how matrices are multiplied, see :mod:`collage.train.products`.
        autocast: whether a float32 model computes in torch's autocast to bfloat16.
    """

    shards: int = 1
    micro_batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    gradient: str = "model"
    reduce: torch.dtype | None = None
    accumulates: bool = False
    attention: str = "sdpa"
    products: str = NATIVE
    autocast: bool = False

    def on_one_device(self) -> Settings:
        """The same without shards."""
        return replace(self, shards=1)

    def gradient_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of ``.grad`` for parameters of ``dtype``."""
        return torch.float32 if self.gradient == "float32" else dtype


# ---- parameters, gradients, states ---------------------------------------------------------------------------------


def shard_elements(shape: Iterable[int], shards: int) -> int:
    """Elements of the largest shard of a tensor that is cut along its first dimension."""
    first, *rest = tuple(shape) or (1,)
    return -(-first // shards) * prod(rest)


@dataclass(frozen=True)
class Stored:
    """Bytes of the training state on one device: on all together where ``shards`` is 1."""

    params: int
    states: int
    gradients: int


def stored(strategy: collage.Strategy, shapes: Iterable[torch.Size], settings: Settings) -> Stored:
    """What `strategy` keeps for parameters of these shapes. Steps and ordinals stand on the host and don't count.

    Raises:
        ValueError: the strategy can't serve the dtype.
    """
    dtype = strategy.param_dtype(settings.dtype)
    params = states = gradients = 0
    for shape in shapes:
        own, others = _components(strategy, dtype, shape)
        params += sum(_bytes(each, shape, settings.shards) for each in own)
        states += sum(_bytes(each, shape, settings.shards) for each in others)
        gradients += _gradient(shape, settings.gradient_dtype(dtype), settings.shards)
    return Stored(params, states, gradients)


@lru_cache(maxsize=4096)
def _components(
    strategy: collage.Strategy, dtype: torch.dtype, shape: torch.Size
) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """What stands for a parameter in the model, and what in the optimizer's state."""
    form = _form(strategy, shape)
    layout = strategy.layout(dtype, shape, form)
    own, *others = [storage.components(dtype) for _, storage in layout.roles]
    in_model = len(own) if form is not None else 1
    return own[:in_model], (*own[in_model:], *(component for each in others for component in each))


def _form(strategy: collage.Strategy, shape: torch.Size) -> collage.Tiled | None:
    """How a weight bears its components, where the strategy has it do so (:func:`collage.to_fp8_`)."""
    fitted = [getattr(strategy, role).fitted(shape) for role in ROLES] if strategy.param.borne else []
    return None if len(shape) != 2 or not fitted or None in fitted else fitted[0]


def _bytes(component: Component, shape: torch.Size, shards: int) -> int:
    return shard_elements(component.shape(shape), shards) * component.dtype.itemsize


def _gradient(shape: torch.Size, dtype: torch.dtype, shards: int) -> int:
    return shard_elements(shape, shards) * dtype.itemsize


# ---- what is there beside the shards -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """Bytes that FSDP2 holds beside the shards, with each block and the rest of the model a group of its own.

    Attributes:
        forward: the rest of the model, which stays gathered, the block that computes and the one fetched ahead.
        backward: these, the whole gradients of the rest and of one block, and the buffer that reduces the latter.
        end: the rest of the model with its gradients and their buffer, when the activations are gone.
    """

    forward: int = 0
    backward: int = 0
    end: int = 0


def gathered(subject: Subject, strategy: collage.Strategy, settings: Settings) -> Gathered:
    """What FSDP2 gathers; nothing where there is one shard."""
    if settings.shards == 1:
        return Gathered()
    dtype, one = strategy.param_dtype(settings.dtype), settings.on_one_device()
    groups = [[subject.shapes[place] for place in block] for block in subject.by_block]
    in_blocks = {place for block in subject.by_block for place in block}
    outside = [shape for place, shape in enumerate(subject.shapes) if place not in in_blocks]
    rest, blocks = stored(strategy, outside, one), [stored(strategy, group, one) for group in groups]
    weights, gradients = (max((getattr(each, part) for each in blocks), default=0) for part in ("params", "gradients"))
    own = settings.gradient_dtype(dtype)
    buffer = (settings.reduce or own).itemsize / own.itemsize
    forward = rest.params + weights * min(len(blocks), 2)
    backward = forward + rest.gradients + gradients * (1 + buffer)
    return Gathered(forward, round(backward), round(rest.params + rest.gradients * (1 + buffer)))


# ---- together ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What one strategy needs on a device, with or without checkpointing, for any micro-batch."""

    stored: Stored
    gathered: Gathered
    timeline: Timeline
    arrived: np.ndarray
    read: np.ndarray
    scratch: int
    accumulates: bool

    def activations(self, micro_batch: int) -> int:
        """Bytes that the forward leaves to the backward."""
        constant, each = self.timeline.kept
        return round(constant + each * micro_batch)

    def phases(self, micro_batch: int) -> dict[str, int]:
        """The peak of each phase."""
        line, held = self.timeline, self.stored
        alive = line.constant + line.per_sequence * micro_batch
        alive = alive + self.read
        always = held.params + held.states
        gradients = np.full_like(alive, held.gradients) if self.accumulates else self.arrived
        first = line.forward
        forward = always + self.gathered.forward + float((alive + gradients)[:first].max())
        backward = always + self.gathered.backward + float((alive + gradients)[first:].max())
        end = always + held.gradients + self.gathered.end
        step = always + held.gradients + self.scratch
        return {"forward": round(forward), "backward": round(max(backward, end)), "step": step}

    def peak(self, micro_batch: int) -> int:
        """The largest of them."""
        return max(self.phases(micro_batch).values())

    def largest_micro_batch(self, memory: int) -> int:
        """The largest micro-batch whose peak is at most `memory`; 0 where none is."""
        low, high = 0, 1
        while high <= MOST_SEQUENCES and self.peak(high) <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= memory else (low, middle)
        return low


@dataclass(frozen=True)
class Planned:
    """One strategy's plan.

    Attributes:
        strategy: its record.
        needs: on one device, by whether blocks are computed again in the backward.
        reason: why there is none; empty where there is.
    """

    strategy: collage.Strategy
    needs: Mapping[bool, Needs] | None = None
    reason: str = ""


class Planner:
    """Plans for one model; what strategies share is traced once."""

    def __init__(self, subject: Subject, settings: Settings) -> None:
        self.subject = subject
        self.settings = settings
        self._timelines: dict[tuple[torch.dtype, torch.dtype, bool], Timeline] = {}

    def timeline(self, dtype: torch.dtype, checkpointing: bool) -> Timeline:
        """The traced step of a model whose parameters are of `dtype`."""
        # Formats of one size need the same.
        traced = torch.float32 if dtype.itemsize == 4 else torch.bfloat16
        gradient = torch.float32 if self.settings.gradient_dtype(dtype).itemsize == 4 else traced
        key = (traced, gradient, checkpointing)
        if key not in self._timelines:
            self._timelines[key] = trace(
                self.subject,
                dtype=traced,
                gradient=gradient,
                checkpointing=checkpointing,
                attention=self.settings.attention,
                products=self.settings.products,
                autocast=self.settings.autocast,
            )
        return self._timelines[key]

    def needs(self, strategy: collage.Strategy, checkpointing: bool) -> Needs:
        """What a strategy needs.

        Raises:
            ValueError: the strategy can't serve the dtype.
        """
        subject, settings = self.subject, self.settings
        dtype = strategy.param_dtype(settings.dtype)
        gradient = settings.gradient_dtype(dtype)
        timeline = self.timeline(dtype, checkpointing)
        whole = subject if not timeline.missing_blocks else subject.with_layers(TRACED_BLOCKS)
        sizes = [_gradient(shape, gradient, settings.shards) for shape in whole.shapes]
        return Needs(
            stored=stored(strategy, subject.shapes, settings),
            gathered=gathered(subject, strategy, settings),
            timeline=timeline,
            arrived=timeline.gradients(sizes),
            read=timeline.values([_values(strategy, shape, dtype) for shape in whole.shapes]),
            scratch=_scratch(subject.shapes, dtype, settings),
            accumulates=settings.accumulates,
        )

    def plan(self, strategy: collage.Strategy) -> Planned:
        """The plan of a strategy, with and without checkpointing."""
        try:
            strategy.layout(strategy.param_dtype(self.settings.dtype))
            return Planned(strategy, {again: self.needs(strategy, again) for again in (False, True)})
        except UserError:
            raise
        except ValueError as error:
            return Planned(strategy, reason=str(error))


def _values(strategy: collage.Strategy, shape: torch.Size, dtype: torch.dtype) -> int:
    """The bytes that are made of a weight that is in components at rest, where an operation computes with it."""
    return shape.numel() * dtype.itemsize if _form(strategy, shape) is not None else 0


def _scratch(shapes: Iterable[torch.Size], dtype: torch.dtype, settings: Settings) -> int:
    """What the step allocates beside its state for the largest shard.

    The norm of a 16-bit gradient is taken in float32, on a copy of it. The state of float32 parameters is made in the
    first step, beside a copy of the value and as much to split it; that of others before there are gradients.
    """
    largest = max(shard_elements(shape, settings.shards) for shape in shapes)
    if dtype == torch.float32:
        return 8 * largest
    return 4 * largest if settings.gradient_dtype(dtype).itemsize == 2 else 0

"""What a training step keeps in memory, event by event, found without allocating.

The real model of transformers makes a real forward and backward on fake tensors, which have shapes and no memory. A
dispatch mode sees every tensor that any operation makes and when its memory would be freed, in the forward, in
autograd's backward and in the recomputation of checkpointed blocks. So nothing is derived from a formula of some
architecture, and temporaries count as what autograd saves does.

Bytes are linear in the micro-batch, so two traces of different micro-batches give all of them; and every block adds
the same, so that a trace of three blocks gives any number of them (tests compare both with whole traces).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from collage.plan.models import Subject
from collage.train.config import UserError
from collage.train.products import NATIVE, multiplying

TRACED_BLOCKS = 3
"""The first, the last, and one that stands for all between them."""
MICRO_BATCHES = (2, 3)
"""Not 1: there some operations take another way, with a few bytes more or less."""


@dataclass(frozen=True)
class Timeline:
    """Bytes alive after each operation of a training step: ``constant + per_sequence * micro_batch``.

    Parameters and gradients that have arrived in ``.grad`` are not among them.

    Attributes:
        constant, per_sequence: of every event, [events].
        forward: how many of the events are before the backward, the loss included.
        reads: index of the matrix (of the traced parameters) that each event computes with, -1 for none, [events].
        arrived: how many gradients have arrived at each event, [events]: a place in ``order``.
        repeated: 1 where the gradients of the blocks that were not traced have arrived too, else 0, [events].
        order: index of the parameters (of the traced model) whose gradients arrive, first one first.
        kept: bytes that the forward leaves to the backward, (constant, per sequence).
        block_gradients: index in ``order`` of the parameters of the block that stands for those not traced.
        missing_blocks: how many blocks were not traced.
    """

    constant: np.ndarray
    per_sequence: np.ndarray
    forward: int
    reads: np.ndarray
    arrived: np.ndarray
    repeated: np.ndarray
    order: tuple[int, ...]
    kept: tuple[float, float]
    block_gradients: tuple[int, ...]
    missing_blocks: int

    def gradients(self, sizes: Sequence[int]) -> np.ndarray:
        """Bytes of the gradients that have arrived at each event, [events].

        Args:
            sizes: bytes of the gradient of every parameter of the traced model.
        """
        by_place = np.array([sizes[index] for index in self.order], dtype=np.float64)
        block = self.missing_blocks * sum(by_place[place] for place in self.block_gradients)
        return np.concatenate([[0.0], np.cumsum(by_place)])[self.arrived] + block * self.repeated

    def values(self, sizes: Sequence[int]) -> np.ndarray:
        """Bytes of the parameters that each event computes with, [events].

        Args:
            sizes: bytes of the values of every parameter of the traced model.
        """
        return np.array([*sizes, 0], dtype=np.float64)[self.reads]


@dataclass
class _Trace:
    """One traced step of one micro-batch."""

    live: list[int]
    reads: list[int]
    arrived: list[int]
    forward: int
    kept: int
    entered: list[int]
    entered_live: list[int]
    order: list[int]


class _Recorder(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, from when they are made until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.events: list[int] = []
        self.reads: list[int] = []
        self.weights: dict[int, int] = {}
        self.arrivals: list[int] = []
        self.order: list[int] = []
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # asked by autograd of every fake tensor
            return made
        outputs = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
        for each in outputs:
            self._count(each.untyped_storage())
        self.reads.append(self._read(func, args, outputs))
        self.events.append(self.live)
        self.arrivals.append(len(self.order))
        return made

    def _read(self, func: Any, args: Any, outputs: list[Tensor]) -> int:
        """Index of the matrix that an operation computes with; -1 for none. A view computes nothing, an embedding
        with some rows alone."""
        if func is torch.ops.aten.embedding.default:
            return -1
        shown = {each.untyped_storage()._cdata for each in outputs}
        keys = [each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, Tensor)]
        return next((self.weights[key] for key in keys if key in self.weights and key not in shown), -1)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            if self._alive.pop(key, None) is not None:
                self.live -= size

        self.live += size
        self._alive[key] = (weakref.ref(storage, freed), size)

    def ignore(self, tensor: Tensor) -> None:
        """Counts a tensor's memory no more, or never: a parameter, a gradient that has arrived."""
        storage = tensor.untyped_storage()
        known = self._alive.get(storage._cdata)
        self.live -= known[1] if known else 0
        key = storage._cdata
        self._alive[key] = (weakref.ref(storage, lambda _: self._alive.pop(key, None)), 0)

    def arrive(self, index: int, param: Tensor) -> None:
        """The gradient of a parameter has arrived."""
        if param.grad is not None:
            self.ignore(param.grad)
        self.order.append(index)


def trace(
    subject: Subject,
    *,
    dtype: torch.dtype,
    gradient: torch.dtype,
    checkpointing: bool,
    attention: str,
    products: str = NATIVE,
    autocast: bool = False,
    whole: bool = False,
) -> Timeline:
    """The timeline of a training step.

    Args:
        subject: the model and the length of its sequences.
        dtype: of the parameters.
        gradient: of ``.grad``.
        checkpointing: whether each block is computed again in the backward, from its input alone.
        attention: "sdpa" or "eager", as transformers names them.
        products: how matrices are multiplied, see :mod:`collage.train.products`.
        autocast: whether the forward runs in torch's autocast to bfloat16.
        whole: trace all blocks, even where three would do.

    Raises:
        UserError: the model cannot be traced.
    """
    missing = 0 if whole or not subject.uniform else max(0, subject.layers - TRACED_BLOCKS)
    model_of = subject if not missing else subject.with_layers(TRACED_BLOCKS)
    try:
        with _fake():
            model = model_of.build(dtype=dtype, attention=attention, checkpointing=checkpointing)
            low, high = (_trace(model_of, model, gradient, products, autocast, batch) for batch in MICRO_BATCHES)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{subject.label} can't be traced without allocating: {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from error
    if len(low.live) != len(high.live) or low.order != high.order:
        raise UserError(
            f"{subject.label} takes another way for a micro-batch of {MICRO_BATCHES[0]} than for one of "
            f"{MICRO_BATCHES[1]}, so its memory can't be planned for all of them"
        )
    return _timeline(low, high, model_of.block_parameters(model), missing)


@contextmanager
def _fake() -> Iterator[None]:
    # The tensors seem to be on a CPU: there torch's fused attention keeps what it keeps on a GPU.
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # transformers can't look into fake positions, and then masks as if sequences were packed together.
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", _none_packed))
        yield


def _none_packed(*_: object, **__: object) -> None:
    """No position begins another sequence."""


def _trace(
    subject: Subject, model: nn.Module, gradient: torch.dtype, products: str, autocast: bool, batch: int
) -> _Trace:
    recorder = _Recorder()
    entered: list[int] = []
    entered_live: list[int] = []
    forward = [True]

    def enters(*_: object) -> None:
        if forward[0]:
            entered.append(len(recorder.events))
            entered_live.append(recorder.live)

    parameters = [p for p in model.parameters() if p.requires_grad]
    handles = [block.register_forward_pre_hook(enters) for block in subject.blocks(model)]
    for tensor in [*model.parameters(), *model.buffers()]:
        recorder.ignore(tensor)
    # Of a product with a bias it is the matrix that counts.
    recorder.weights = {p.untyped_storage()._cdata: index for index, p in enumerate(parameters) if p.dim() > 1}
    for index, param in enumerate(parameters):
        if gradient != param.dtype:
            param.grad_dtype = gradient
        handles.append(param.register_post_accumulate_grad_hook(lambda p, index=index: recorder.arrive(index, p)))
    tokens = subject.tokens(batch)
    with recorder, multiplying(products):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = subject.loss(model, tokens)
        forward[0], first, kept = False, len(recorder.events), recorder.live
        loss.backward()
        del loss
    for handle in handles:
        handle.remove()
    for param in parameters:
        param.grad = None
    return _Trace(
        recorder.events, recorder.reads, recorder.arrivals, first, kept, entered, entered_live, recorder.order
    )


def _timeline(low: _Trace, high: _Trace, blocks: list[list[int]], missing: int) -> Timeline:
    """Both traces as one that is linear in the micro-batch, with the blocks that were not traced."""
    forward = low.forward
    live = np.array([low.live, high.live], dtype=np.float64)
    kept = np.array([low.kept, high.kept], dtype=np.float64)
    reads, arrived = np.array(low.reads), np.array(low.arrived)
    places = {index: place for place, index in enumerate(low.order)}
    repeated, block = np.zeros_like(arrived), ()
    if missing:
        # A block of those not traced adds what the second of the three does.
        grown = missing * np.array([[each.entered_live[2] - each.entered_live[1]] for each in (low, high)])
        block = tuple(places[index] for index in blocks[1] if index in places)
        last = max(places[index] for index in blocks[2] if index in places) + 1
        later = np.searchsorted(arrived, last)  # where the backward of the second block begins
        end = np.searchsorted(arrived, max(block) + 1)
        live[:, low.entered[1] : forward] += grown
        kept += grown[:, 0]
        # The backward of the second block stands for that of the last but one, with all activations below it still
        # there, and once more for that of the second itself, with none of them but all gradients above it.
        upper = live[:, forward:end] + grown
        live = np.concatenate([live[:, :forward], upper, live[:, later:]], axis=1)
        repeated = np.concatenate([np.zeros(end, dtype=int), np.ones(len(arrived) - later, dtype=int)])
        reads, arrived = (np.concatenate([each[:end], each[later:]]) for each in (reads, arrived))
    step = MICRO_BATCHES[1] - MICRO_BATCHES[0]
    slope, kept_slope = (live[1] - live[0]) / step, float(kept[1] - kept[0]) / step
    return Timeline(
        constant=live[0] - MICRO_BATCHES[0] * slope,
        per_sequence=slope,
        forward=forward,
        reads=reads,
        arrived=arrived,
        repeated=repeated,
        order=tuple(low.order),
        kept=(float(kept[0]) - MICRO_BATCHES[0] * kept_slope, kept_slope),
        block_gradients=block,
        missing_blocks=missing,
    )

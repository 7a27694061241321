"""Which tensors are stepped together. Found once, and found again only when a tensor moved or an option changed: for
thousands of small tensors a step has no time for more than a look at their addresses.

Each run of a sharded parameter's elements (:func:`collage.optim.sharding.runs`) is a tensor of the batch by itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collage import kernels
from collage.kernels import PLAIN, Batch, Layout, look, records
from collage.optim.sharding import is_sharded, local, placed_like, runs, whole_sums
from collage.storage import Component

# The state of at least _MANY parameters of at most _SMALL elements is kept in one tensor.
_SMALL, _MANY = 1 << 14, 32

# What a step takes for a parameter's gradient.
GradOf = Callable[[Tensor], Tensor | None]

_shape_of = attrgetter("shape")


@dataclass(frozen=True)
class Member:
    """A parameter that takes part in a step."""

    group: int
    ordinal: int
    param: Tensor
    name: str | None
    layout: Layout
    arithmetic: str


class Gradients(NamedTuple):
    """The gradients of a batch, and their addresses where they were looked at as they are."""

    tensors: list[Tensor]
    addresses: array[int] | None


def called(name: str | None) -> str:
    """How messages call a parameter."""
    return "a parameter" if name is None else f"parameter {name!r}"


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is of torch's own classes."""
    return type(tensor) in PLAIN


class Together:
    """Members with one batch of the kernels.

    Attributes:
        members: the parameters.
        batch: what the backend steps.
        backend: its name.
        owners: for each tensor of the batch the member it belongs to; None where it is one for one.
    """

    def __init__(
        self, members: list[Member], options: dict[str, Any], states: list[dict[str, Tensor]], grad_dtype: torch.dtype
    ) -> None:
        first = members[0]
        self.members = members
        self.grad_dtype = grad_dtype
        self.sharded = any(is_sharded(m.param) for m in members)
        self.params = [m.param for m in members]
        components = first.layout.components(first.param.dtype)
        names = tuple(components)
        pieces = [(owner, *run) for owner, m in enumerate(members) for run in runs(m.param)]
        _check_blocks(members, pieces, first.layout.block(first.param.dtype))
        _check_states(members, states, components)
        for name in names:
            _gather_small(name, states)
        self.owners = None if len(pieces) == len(members) else [owner for owner, *_ in pieces]
        self._slices = [(owner, begin, end) for owner, _, begin, end in pieces] if self.owners else None
        whole = [local(m.param.detach()).contiguous() for m in members]
        self.copies = [
            (local(m.param), copy) for m, copy in zip(members, whole, strict=True) if not local(m.param).is_contiguous()
        ]
        device = local(first.param).device
        self._borne = first.layout.param.borne
        kept = [local(state[name]) for state in states for name in names]
        # Tensors of one storage move together: one of them stands for all.
        storages = {tensor.untyped_storage()._cdata: tensor for tensor in kept} if _have_memory(kept) else {}
        self._watched = [*(() if self._borne else self.params), *(storages.values() or kept)]
        self.backend = kernels.choose(first.layout, first.arithmetic, first.param.dtype, device, options["backend"])
        stepped = [part for param in whole for part in getattr(param, "parts")] if self._borne else whole  # noqa: B009
        if self.backend != "eager" and not _have_memory([*stepped, *map(local, self._watched)]):
            # Tensor subclasses that compute what they are; torch operations can step them, addresses cannot.
            if options["backend"] is not None:
                raise ValueError(
                    f"backend {self.backend!r} steps memory, and {called(first.name)} or another of its group has none "
                    "of its own (a tensor subclass); use backend=None or 'eager'"
                )
            self.backend = kernels.choose(first.layout, first.arithmetic, first.param.dtype, device, "eager")
        # Held, so that no other tensor gets an address that steps compare with.
        self._held = whole
        # A parameter that can be stepped itself is: another object beside each would cost more than a look at it.
        params = [p if _is_plain(p) and p.is_contiguous() else w for p, w in zip(self.params, whole, strict=True)]
        self.batch = Batch(
            layout=first.layout,
            arithmetic=first.arithmetic,
            seed=options["seed"],
            params=self.cut(params),
            states=self._cut_states(states, components),
            steps=self._join_steps(states, device),
            ordinals=[m.ordinal if "ordinal" not in states[o] else int(states[o]["ordinal"]) for o, m in self._owned()],
            firsts=[index for _, index, _, _ in pieces],
        )
        # torch checks the shape of a gradient that is assigned to a parameter of its own class; sizes guard the memory
        # against what gets around that.
        shapes = [local(param).shape for param in self.params]
        self._shapes = None if all(map(_is_plain, self.params)) else shapes
        self._sizes = array("q", map(prod, shapes))
        with torch.inference_mode(False):
            self._example = torch.empty(0, dtype=grad_dtype, device=device)
        watched = self._looked_at()
        self._seen, self._records = look(watched), records(watched)
        kernels.check_first_use(self.batch, grad_dtype, self.backend)

    def write_copies(self) -> None:
        """Brings what was stepped on copies back to parameters that are not contiguous."""
        for param, copy in self.copies:
            param.copy_(copy)

    def by_member(self, sums: Tensor) -> Tensor:
        """A row per member, over all processes that share it, from a row per tensor of the batch."""
        rows = sums
        if self.owners is not None:
            rows = sums.new_zeros(len(self.members), sums.shape[1])
            rows.index_add_(0, torch.tensor(self.owners, device=sums.device), sums)
        return whole_sums(rows, self.params) if self.sharded else rows

    def _owned(self) -> Iterator[tuple[int, Member]]:
        owners = range(len(self.members)) if self.owners is None else self.owners
        return ((owner, self.members[owner]) for owner in owners)

    def cut(self, tensors: Sequence[Tensor], component: Component | None = None) -> list[Tensor]:
        """The runs of the members' local tensors, of parameters and gradients, or of a component of theirs."""
        if self._slices is None:
            return list(tensors)
        if component is None:
            return [tensors[owner].view(-1)[begin:end] for owner, begin, end in self._slices]
        return [component.cut(tensors[owner], begin, end) for owner, begin, end in self._slices]

    def _cut_states(self, states: list[dict[str, Tensor]], components: dict[str, Component]) -> list[dict[str, Tensor]]:
        # Detached, so that memory that is written lives even if somebody exchanges a tensor's data.
        columns = [
            self.cut([local(state[name]).detach() for state in states], component)
            for name, component in components.items()
        ]
        return [dict(zip(components, row, strict=True)) for row in zip(*columns, strict=True)]

    def _join_steps(self, states: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """One tensor for the step counts of all, so that one operation counts them; each state has its view."""
        # A tensor made in inference mode could not be counted up outside of it.
        with torch.inference_mode(False):
            where = device if self.backend == "triton" else torch.device("cpu")
            counts = torch.stack([states[owner]["step"].to(where, torch.float32) for owner, _ in self._owned()])
        for place, (owner, _) in reversed(list(enumerate(self._owned()))):
            states[owner]["step"] = counts[place]
        return counts

    def _looked_at(self) -> list[Tensor]:
        watched = [*map(local, self._watched)] if self.sharded else self._watched
        if self._borne:
            watched = [*watched, *chain.from_iterable(map(attrgetter("parts"), map(local, self.params)))]
        return watched

    def gradients(self, grad_of: GradOf, fresh: bool = False) -> Gradients | None:
        """The gradients for the batch, or None if anything has changed since it was made.

        Args:
            fresh: it was made in this very step: an error is the user's to see.
        """
        try:
            if look(self._looked_at(), records=self._records) != self._seen:
                return None
            # Only now: the look has brought the parameters into the cache.
            grads: list[Any] = list(map(grad_of, self.params))
            if self.sharded:
                grads = [placed_like(grad, param) for grad, param in zip(grads, self.params, strict=True)]
            return self._usable(grads)
        except (AttributeError, KeyError, RuntimeError, TypeError):
            if fresh:
                raise
            # A missing state or gradient, or one without memory of its own (sparse): whoever asks finds out which.
            return None

    def _usable(self, grads: list[Any]) -> Gradients | None:
        """The gradients as memory that can be stepped, themselves where they are; None if they are not such as the
        batch was made for."""
        looks = look(grads, self._example)
        plain = looks.classes <= PLAIN
        addresses = looks.addresses if plain and self._slices is None else None
        if self._shapes is not None and list(map(_shape_of, grads)) != self._shapes:
            return None
        if looks.sizes != self._sizes:
            grads, addresses = [grad.contiguous() for grad in grads], None
            if look(grads, self._example).sizes != self._sizes:
                return None
        if any(map(Tensor.is_neg, grads)):
            grads, addresses = [grad.resolve_neg() for grad in grads], None
        if self.backend != "eager" and not plain:
            grads = _in_memory(grads)
        return Gradients(self.cut(grads), addresses)


def _check_blocks(members: list[Member], pieces: list[tuple[int, int, int, int]], block: int) -> None:
    """Raises ValueError where a parameter is sharded so that a block of its elements is cut."""
    for owner, first, begin, end in pieces:
        last = first + end - begin == members[owner].param.numel()
        if any(place % block for place in (first, begin, block if last else end)):
            tiled = members[owner].layout.param.borne
            other = (
                "give collage.to_fp8_ the number of shards"
                if tiled
                else "take a strategy without blocks such as 'plus'"
            )
            raise ValueError(
                f"{called(members[owner].name)} is sharded so that elements {first} to {first + end - begin - 1} are "
                f"here, which are no whole blocks of {block}, as its strategy keeps them; shard it along its first "
                f"dimension, or {other}"
            )


def _check_states(members: list[Member], states: list[dict[str, Tensor]], names: dict[str, Component]) -> None:
    """Raises ValueError unless every state tensor is what the layout keeps for its parameter: kernels work on
    addresses."""
    for member, state in zip(members, states, strict=True):
        param = local(member.param)
        missing = sorted(set(names) - set(state))
        if missing:
            raise ValueError(
                f"the state of {called(member.name)} lacks {', '.join(missing)}, which its strategy keeps; load a "
                "state of this strategy, or construct a new optimizer"
            )
        for name, component in names.items():
            tensor, dtype, shape = local(state[name]), component.dtype, torch.Size(component.shape(param.shape))
            found = (tensor.dtype, tensor.shape, tensor.device)
            if found != (dtype, shape, param.device) or not tensor.is_contiguous():
                layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
                raise ValueError(
                    f"{name} of {called(member.name)} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"{layout}; wanted {dtype} {tuple(shape)} on {param.device}, contiguous. If the parameter "
                    "was cast or resized after training had begun, construct a new optimizer, or see collage.convert"
                )


def _gather_small(name: str, states: list[dict[str, Tensor]]) -> None:
    """Puts a state of many small parameters into one tensor, of which each has its view: a step then looks at one
    address in place of thousands. Those that are views already stay where they are."""
    small = [
        state
        for state in states
        if 0 < state[name].numel() <= _SMALL
        and type(state[name]) is Tensor
        and state[name].untyped_storage().nbytes() == state[name].nbytes
    ]
    if len(small) < _MANY:
        return
    # Each begins at a multiple of 64 bytes.
    sizes = [-(-state[name].numel() // 64) * 64 for state in small]
    with torch.inference_mode(False):
        whole = torch.zeros(sum(sizes), dtype=small[0][name].dtype, device=small[0][name].device)
    for state, place in zip(small, whole.split(sizes), strict=True):
        old = state[name]
        state[name] = place[: old.numel()].view(old.shape).copy_(old)


def _have_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether their elements stand at their addresses. Those of torch's own classes do."""
    return set(map(type, tensors)) <= PLAIN or all(t.data_ptr() != 0 or t.numel() == 0 for t in tensors)


def _in_memory(grads: list[Tensor]) -> list[Tensor]:
    """The gradients, copied if any has no memory. Raises TypeError where the copies have none either."""
    if not _have_memory(grads):
        grads = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        if not _have_memory(grads):
            raise TypeError(f"gradients of {set(map(type, grads))} have no memory; use backend='eager'")
    return grads


class Plan:
    """All batches of an optimizer's step.

    Attributes:
        together: the members of each batch.
        number: steps taken so far by the parameter that has taken most.
        lasts: whether it may serve the next step too: a parameter that is not contiguous is stepped on a copy.
    """

    def __init__(self, optimizer: Any, members: list[Member], grad_of: GradOf) -> None:
        batches: dict[tuple[Any, ...], list[Member]] = {}
        for m in members:
            grad: Any = grad_of(m.param)
            key = (m.group, local(m.param).device, m.layout, m.arithmetic, m.param.dtype, grad.dtype)
            batches.setdefault(key, []).append(m)
        self.together = [
            Together(each, optimizer.param_groups[key[0]], [optimizer.state[m.param] for m in each], grad_dtype=key[-1])
            for key, each in batches.items()
        ]
        taking_part = {id(m.param) for m in members}
        self._idle = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in taking_part]
        self._options = [_fixed_options(group) for group in optimizer.param_groups]
        self._params = _params(optimizer)
        self._states, self._changes = optimizer.state, optimizer.state.changes.count
        self.number = max((int(each.batch.steps.max()) for each in self.together), default=0)
        self.lasts = not any(each.copies for each in self.together)

    def gradients(self, optimizer: Any, grad_of: GradOf) -> list[Gradients] | None:
        """The gradients of each batch, or None if anything has changed since the plan was made."""
        if optimizer.state is not self._states or optimizer.state.changes.count != self._changes:
            return None
        params = _params(optimizer)
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return None
        if [_fixed_options(group) for group in optimizer.param_groups] != self._options:
            return None
        if any(grad_of(param) is not None for param in self._idle):
            return None
        return self.gradients_of_all(grad_of)

    def gradients_of_all(self, grad_of: GradOf, fresh: bool = False) -> list[Gradients] | None:
        """The same without a look at anything but the batches; ``fresh``: the plan was made in this very step."""
        found = [grads for each in self.together if (grads := each.gradients(grad_of, fresh)) is not None]
        return found if len(found) == len(self.together) else None


def _params(optimizer: Any) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _fixed_options(group: dict[str, Any]) -> tuple[Any, ...]:
    """Options that are part of a batch, or that were checked against the parameters when it was made."""
    working_eps = float(group["eps"]) if group["arithmetic"] == "working" else None
    return (group["strategy"], group["arithmetic"], group["backend"], group["seed"], working_eps)

"""Watching one optimizer from outside: copies before a step, a replay of it after, what was stored beside it.

Nothing of the run is touched: the optimizer is read, the copies are replayed, the global random state is put back, and
once the step has been compared nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from collage.kernels import SUMS
from collage.metrics import figures
from collage.metrics.families import Family, family_of, second_moment
from collage.metrics.replay import group_copy, widened
from collage.numerics import format_of
from collage.optim.sharding import local
from collage.storage import Rounded

# Elements that are replayed at a time, and the shortest run of them where a parameter is sampled: whole blocks of every
# storage and of every vector unit.
PIECE, RUN = 1 << 17, 1 << 12
# Of the elements, how many a replay of an unknown rule must come near to.
_EXPLAINED = 0.99


@dataclass
class Row:
    """What one parameter contributes to an audited step.

    Attributes:
        group: index of its parameter group.
        param: the parameter.
        name: its name if the optimizer was given named parameters, else None.
        elements: of its local part.
        sums: float64 tensor of :data:`collage.kernels.SUMS`; None if the step could not be replayed.
        more: float64 tensor of :data:`collage.metrics.figures.MORE`; None if nobody asked.
        histogram: see :func:`collage.metrics.figures.histogram`; None likewise.
        reason: why the step could not be replayed.
    """

    group: int
    param: Tensor
    name: str | None
    elements: int
    sums: Tensor | None = None
    more: Tensor | None = None
    histogram: Tensor | None = None
    reason: str | None = None


@dataclass
class _Piece:
    """Copies of some of a parameter's elements before the step."""

    start: int
    end: int
    parts: list[Tensor]
    grad: Tensor
    state: dict[str, Any]
    raw: dict[str, Any] | None


@dataclass
class _Held:
    """A parameter that takes part in the step, and its copies."""

    row: Row
    options: dict[str, Any]
    pieces: list[_Piece] = field(default_factory=list)
    reason: str | None = None


Rows = Sequence[Row]


@dataclass(frozen=True)
class Sample:
    """What some elements of a parameter were to do in a step; flat float64 tensors.

    Attributes:
        param: the parameter.
        elements: of its local part.
        weight: how many of them each element here stands for.
        value: the whole value before the step.
        u: the intended update.
        m: first moment before and after, in float64; None if the optimizer has none.
        v: second moment, likewise.
        update: the intended update, had the moments before the step been these two.
    """

    param: Tensor
    elements: int
    weight: float
    value: Tensor
    u: Tensor
    m: tuple[Tensor, Tensor] | None
    v: tuple[Tensor, Tensor] | None
    update: Callable[[Tensor, Tensor], Tensor]


class Watch:
    """Compares chosen steps of an optimizer with what they intended.

    Args:
        optimizer: a torch optimizer, or anything with ``param_groups`` and a ``step`` (then without a replay).
        wants: whether the step with this number (from 1) is compared.
        record: receives the rows of a compared step.
        memory: bytes that copies may take; where they would take more, evenly spaced runs of the elements stand for all
            (rules that need whole parameters are then replayed as far as they fit). None: no bound.
        window: steps over which the movement is taken where a step cannot be replayed.
        sink: receives samples of what a step intends, in place of the comparison with what it stored.
    """

    def __init__(
        self,
        optimizer: Any,
        wants: Callable[[int], bool],
        record: Callable[[int, Rows], None],
        memory: int | None,
        window: int = 1,
        sink: Callable[[Sample], None] | None = None,
    ) -> None:
        self._sink = sink
        self._optimizer = optimizer
        self._family = family_of(optimizer) if isinstance(optimizer, Optimizer) else None
        self._wants, self._record = wants, record
        self._memory, self._window = memory, window
        self._taken: int | None = None
        self._held: list[_Held] | None = None
        self._window_held: tuple[int, list[tuple[Tensor, Tensor]]] | None = None
        self._handles = self._attach()

    # ---- when ------------------------------------------------------------------------------------------------------

    def _attach(self) -> list[Callable[[], None]]:
        if isinstance(self._optimizer, Optimizer):
            made = (
                self._optimizer.register_step_pre_hook(self._before),
                self._optimizer.register_step_post_hook(self._after),
                # Whoever loads a state counts on from there.
                self._optimizer.register_load_state_dict_post_hook(lambda _: setattr(self, "_taken", None)),
            )
            return [each.remove for each in made]
        return [self._wrap_step()]

    def _wrap_step(self) -> Callable[[], None]:
        """For what has no hooks: an instance's ``step`` that looks before and after."""
        inner = self._optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self._before(self._optimizer, args, kwargs) or (args, kwargs)
            out = inner(*args, **kwargs)
            self._after(self._optimizer, args, kwargs)
            return out

        self._optimizer.step = step

        def restore() -> None:
            if self._optimizer.__dict__.get("step") is step:
                del self._optimizer.step

        return restore

    def detach(self) -> None:
        """Stops watching."""
        for remove in self._handles:
            remove()
        self._handles, self._held, self._window_held = [], None, None

    @_disable_dynamo
    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copies now, or where the step evaluates the model itself, once it has."""
        self._held = None
        number = self._number() + 1
        self._open_window(number)
        if not self._wants(number):
            return None
        given = [kwargs.get("closure"), *(each for each in args if each is not optimizer)]
        closure = next((each for each in given if callable(each)), None)
        if closure is None:
            self._copy()
            return None
        return self._with_closure(closure, args, kwargs)

    def _with_closure(self, closure: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def then_copy() -> Any:
            loss = closure()
            # A closure that is called again and again belongs to a rule that is not replayed.
            self._copy()
            return loss

        args = tuple(then_copy if each is closure else each for each in args)
        return args, {name: then_copy if each is closure else each for name, each in kwargs.items()}

    @_disable_dynamo
    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held, self._held = self._held, None
        number = self._number() + 1
        self._taken = number
        if not held or _skipped(optimizer):
            return
        if self._sink is not None:
            self._give(held, self._sink)
            return
        with torch.no_grad(), _random_state_kept(held):
            rows = [self._compared(each) for each in held]
        self._close_window(number, rows)
        self._record(number, rows)

    def replay_only(self) -> None:
        """Gives the sink what the next step would do with the gradients at hand; nothing is stepped."""
        self._copy()
        held, self._held = self._held, None
        if self._sink is not None:
            self._give(held or [], self._sink)

    def _give(self, held: list[_Held], sink: Callable[[Sample], None]) -> None:
        family = self._family
        if family is None:
            return
        with torch.no_grad(), _random_state_kept(held):
            for each in held:
                seen = sum(piece.end - piece.start for piece in each.pieces)
                for piece in each.pieces:
                    sink(self._sample(family, each, piece, each.row.elements / max(1, seen)))

    def _sample(self, family: Family, held: _Held, piece: _Piece, weight: float) -> Sample:
        group, row = held.options, held.row
        storage = family.storage(group, row.param)
        old = (storage if len(piece.parts) == len(storage.components(row.param.dtype)) else Rounded()).exact(
            piece.parts
        )
        old, grad = old.view_as(piece.grad), piece.grad.to(torch.float64)
        new, after = family.intended(group, old, grad, widened(piece.state))
        u = self._update(family, group, piece, old, new, grad)

        def moment(name: str | None) -> tuple[Tensor, Tensor] | None:
            if name is None or name not in after:
                return None
            before = piece.state.get(name)
            before = torch.zeros_like(after[name]) if before is None else before.to(torch.float64)
            return before.flatten(), after[name].flatten()

        def update(m: Tensor, v: Tensor) -> Tensor:
            if not piece.state or second is None:
                return u.flatten()
            state = widened(piece.state) | {"exp_avg": m.view_as(old).clone(), second: v.view_as(old).clone()}
            return (family.intended(group, old, grad, state)[0] - old).flatten()

        second = second_moment(after)
        m, v = moment("exp_avg"), moment(second)
        return Sample(row.param, row.elements, weight, old.flatten(), u.flatten(), m, v, update)

    def _number(self) -> int:
        """Steps taken so far: by the optimizer's own count where it keeps one, which is read once."""
        if self._taken is None:
            state = getattr(self._optimizer, "state", {})
            counts = [entry["step"] for entry in state.values() if isinstance(entry, dict) and "step" in entry]
            counts += [group["step"] for group in self._optimizer.param_groups if "step" in group]
            self._taken = max((int(count) for count in counts), default=0)
        return self._taken

    # ---- copies ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _copy(self) -> None:
        members = list(self._members())
        sizes = [0 if each.reason else self._bytes(each) for each in members]
        room = float("inf") if self._memory is None else float(self._memory)
        share = min(1.0, room / max(1, sum(sizes)))
        elementwise = self._family is not None and self._family.elementwise
        for each, size in zip(members, sizes, strict=True):
            if each.reason:
                continue
            if elementwise:
                each.pieces = [self._piece(each, *bounds) for bounds in _runs(each.row.elements, share)]
            elif size <= room:
                each.pieces = [self._piece(each, 0, each.row.elements)]
                room -= size
            else:
                each.reason = (
                    f"its rule needs the whole parameter, {size} bytes of copies, which memory= does not allow"
                )
        self._held = members

    def _members(self) -> Iterator[_Held]:
        """Every parameter that has a gradient."""
        for index, group in enumerate(self._optimizer.param_groups):
            names = group.get("param_names", [None] * len(group["params"]))
            for param, name in zip(group["params"], names, strict=True):
                if param.grad is None:
                    continue
                row = Row(index, param, name, local(param).numel())
                reason = "it is no torch.optim.Optimizer" if self._family is None else self._refusal(group, param)
                # As they are now: some count their steps in the group.
                yield _Held(row, group_copy(group), reason=reason)

    def _refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        assert self._family is not None
        return self._family.refusal(group, param)

    def _bytes(self, each: _Held) -> int:
        param, group = each.row.param, each.options
        assert self._family is not None
        assert param.grad is not None
        states = [*self._family.state(param).values(), *(self._family.raw(param) or {}).values()]
        tensors = [*self._family.parts(group, param), local(param.grad), *states]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def _piece(self, each: _Held, start: int, end: int) -> _Piece:
        family, param, group = self._family, each.row.param, each.options
        assert family is not None
        assert param.grad is not None
        whole = end - start == each.row.elements

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if family.elementwise and value.shape == local(param).shape:
                return value.reshape(-1)[start:end].clone()
            return value.clone()

        scale = getattr(self._optimizer, "grad_scale", None)
        grad = cut(local(param.grad))
        repeatable = family.bits and scale is None and (whole or family.bits_of_pieces)
        state, raw = {name: cut(value) for name, value in family.state(param).items()}, None
        if repeatable:
            own = family.raw(param)
            raw = state if own is None else {name: value.clone() for name, value in own.items()}
        return _Piece(
            start,
            end,
            [_cut_part(part, each.row.elements, start, end, family) for part in family.parts(group, param)],
            grad if scale is None else grad.to(torch.float64) / scale.to(grad.device, torch.float64),
            state,
            raw,
        )

    # ---- comparison ------------------------------------------------------------------------------------------------

    def _compared(self, held: _Held) -> Row:
        row, family = held.row, self._family
        if held.reason is not None or family is None:
            row.reason = held.reason
            row.more = self._seen_only(held)
            return row
        try:
            self._add_up(held, family)
        except Exception as error:
            # Somebody else's code on copies that it was not written for: the run goes on, the report says what it was.
            row.sums = row.histogram = None
            row.reason, row.more = f"the replay raised {type(error).__name__}: {error}", self._seen_only(held)
        if row.sums is not None and row.more is not None and not family.known:
            explained, seen = (float(row.more[figures.MORE.index(name)]) for name in ("explained", "seen"))
            if explained < _EXPLAINED * seen:
                row.reason = f"a replay in float64 comes near to {explained / seen:.0%} of the elements alone"
                row.sums = row.histogram = None
        held.pieces.clear()
        return row

    def _add_up(self, held: _Held, family: Family) -> None:
        row = held.row
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        more = torch.zeros(len(figures.MORE), dtype=torch.float64)
        histogram = torch.zeros(2, figures.BINS, dtype=torch.float64)
        fmt, v_format = format_of(row.param), family.v_format(held.options, row.param)
        after, state = family.parts(held.options, row.param), family.state(row.param)
        for piece in held.pieces:
            values = self._values(held, piece, family, after, state)
            sums += figures.sums(values)
            more += figures.more(values, fmt, v_format, family.known)
            histogram += figures.histogram(values, fmt).cpu()
        # Runs that stand for the whole parameter.
        share = row.elements / max(1.0, float(more[figures.MORE.index("seen")]))
        row.sums, row.more, row.histogram = sums * share, more * share, histogram * share

    def _values(
        self, held: _Held, piece: _Piece, family: Family, after: list[Tensor], state: dict[str, Any]
    ) -> figures.Values:
        group, row = held.options, held.row
        new = [_cut_part(part, row.elements, piece.start, piece.end, family) for part in after]
        storage = family.storage(group, row.param)
        # A low part that the step itself created held nothing before.
        before = storage if len(piece.parts) == len(new) else Rounded()
        old_value = before.exact(piece.parts).view_as(piece.grad)
        grad = piece.grad.to(torch.float64)
        value, replayed = family.intended(group, old_value, grad, widened(piece.state))
        u = self._update(family, group, piece, old_value, value, grad)
        moved = storage.moved(new, piece.parts) if before is storage else storage.exact(new) - old_value.flatten()
        old_hi, new_hi = (parts[0].to(torch.float64).view_as(u) for parts in (piece.parts, new))
        decayed, lost = self._decay(family, held, piece, new, old_value)
        return figures.Values(
            u,
            moved.view_as(u),
            new_hi - old_hi,
            old_hi,
            new_hi,
            _moments(piece, replayed, state, family),
            decayed,
            lost,
        )

    def _update(
        self, family: Family, group: dict[str, Any], piece: _Piece, old: Tensor, new: Tensor, grad: Tensor
    ) -> Tensor:
        """New minus old; where even float64 saw nothing of the update beside the value, the update of a zero."""
        u = new - old
        if family.elementwise and bool(((u == 0) & (old != 0)).any()):
            alone, _ = family.intended(group, torch.zeros_like(old), grad, widened(piece.state))
            u = torch.where((u == 0) & (old != 0), alone, u)
        return u

    def _decay(
        self, family: Family, held: _Held, piece: _Piece, new: list[Tensor], value: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Where weight decay acts and the step's bits could be repeated; where a step without it stores the same."""
        group, like = held.options, local(held.row.param)
        if piece.raw is None or not float(group.get("weight_decay") or 0) or not float(group["lr"]):
            return None, None
        again, without = (
            family.stored(group, piece.parts, piece.grad, piece.raw, like, **changed)
            for changed in ({}, {"weight_decay": 0.0})
        )
        same = [_equal(parts, new).view_as(value) for parts in (again, without)]
        return (value != 0) & same[0], same[1]

    # ---- what can be seen without a replay -------------------------------------------------------------------------

    def _seen_only(self, held: _Held) -> Tensor | None:
        """Subnormal and saturated elements; what moved follows from the window."""
        values = local(held.row.param.detach())
        if not values.is_floating_point():
            return None
        info, size = torch.finfo(values.dtype), values.to(torch.float64).abs()
        row = dict.fromkeys(figures.MORE, 0.0) | {
            "subnormal": float(((size > 0) & (size < info.smallest_normal)).sum()),
            "saturated": float((size >= info.max).sum()),
            "seen": float(values.numel()),
        }
        return torch.tensor(list(row.values()), dtype=torch.float64)

    def _open_window(self, number: int) -> None:
        """Copies the parameters that cannot be replayed, at the first of the steps up to the audited one."""
        if self._window_held is not None and number <= self._window_held[0]:
            return
        self._window_held = None
        if not self._wants(number + self._window - 1):
            return
        kept, room = [], float("inf") if self._memory is None else float(self._memory)
        for index, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                whole = local(param.detach())
                if self._family is None or self._unknown(index, param):
                    room -= whole.nbytes
                    if room >= 0:
                        kept.append((param, whole.clone()))
        self._window_held = (number + self._window - 1, kept)

    def _unknown(self, group: int, param: Tensor) -> bool:
        """Whether a replay may turn out to be impossible."""
        assert self._family is not None
        return not self._family.known or self._family.refusal(self._optimizer.param_groups[group], param) is not None

    def _close_window(self, number: int, rows: Rows) -> None:
        held, self._window_held = self._window_held, None
        if held is None:
            return
        before = {id(param): value for param, value in held[1]}
        unchanged, moved, seen = (figures.MORE.index(name) for name in ("unchanged", "moved_squared", "seen"))
        for row in rows:
            old = before.get(id(row.param))
            if row.sums is None and row.more is not None and old is not None:
                way = local(row.param.detach()).to(torch.float64) - old.to(torch.float64)
                row.more[unchanged], row.more[moved] = float((way == 0).sum()), float((way * way).sum())
                row.more[seen] = way.numel()


def _random_state_kept(held: list[_Held]) -> Any:
    """Puts the global generators back, of the CPU and of the parameters' devices."""
    devices = {each.row.param.device for each in held if each.row.param.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng(list(devices), device_type=kind)


def _cut_part(part: Tensor, elements: int, start: int, end: int, family: Family) -> Tensor:
    """A component's entries for the elements start to end, copied; an entry may serve several."""
    if not family.elementwise:
        return part.clone()
    each = max(1, elements // max(1, part.numel()))
    return part.reshape(-1)[start // each : -(-end // each)].clone()


def _moments(
    piece: _Piece, replayed: dict[str, Any], state: dict[str, Any], family: Family
) -> tuple[Tensor, Tensor, Tensor] | None:
    name = second_moment(replayed)
    if name is None or name not in state or state[name].numel() == 0:
        return None
    stored = state[name].reshape(-1)[piece.start : piece.end] if family.elementwise else state[name]
    stored = stored.to(torch.float64)
    old = piece.state.get(name)
    return (torch.zeros_like(stored) if old is None else old.to(torch.float64), stored, replayed[name])


def _equal(parts: list[Tensor], others: list[Tensor]) -> Tensor:
    """Where all components of an element agree."""
    same = torch.ones(parts[0].numel(), dtype=torch.bool, device=parts[0].device)
    for part, other in zip(parts, others, strict=True):
        alike = (part.flatten() == other.flatten()).repeat_interleave(max(1, same.numel() // max(1, part.numel())))
        same &= alike[: same.numel()]
    return same


def _runs(elements: int, share: float) -> list[tuple[int, int]]:
    """Evenly spaced runs that hold this share of the elements; all of them, in pieces, where the share is 1."""
    if share >= 1 or elements <= RUN:
        return [(start, min(start + PIECE, elements)) for start in range(0, elements, PIECE)] or [(0, 0)]
    count = max(1, int(elements * share) // RUN)
    places = (elements // RUN) * torch.arange(count, dtype=torch.float64) / count
    return [(int(place) * RUN, int(place) * RUN + RUN) for place in places.tolist()]


def _skipped(optimizer: Any) -> bool:
    """Whether a loss scaler made the step do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)

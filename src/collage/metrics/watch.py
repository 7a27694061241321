"""Watching one optimizer from outside: copies before a step, a replay of it after, what was stored beside it.

Nothing of the run is touched: the optimizer is read, the copies are replayed, the global random state is put back, and
once the step has been compared nothing is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer

from collage.metrics import figures
from collage.metrics.comparison import Sample, compared, sampled
from collage.metrics.copies import Held, Row, Rows, bytes_of, copied, runs
from collage.metrics.families import family_of
from collage.metrics.family import Family
from collage.metrics.replay import group_copy
from collage.optim.sharding import local


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
        self._held: list[Held] | None = None
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
            rows = [compared(each, self._family) for each in held]
        self._close_window(number, rows)
        self._record(number, rows)

    def replay_only(self) -> None:
        """Gives the sink what the next step would do with the gradients at hand; nothing is stepped."""
        self._copy()
        held, self._held = self._held, None
        if self._sink is not None:
            self._give(held or [], self._sink)

    def _give(self, held: list[Held], sink: Callable[[Sample], None]) -> None:
        family = self._family
        if family is None:
            return
        with torch.no_grad(), _random_state_kept(held):
            for each in held:
                seen = sum(piece.end - piece.start for piece in each.pieces)
                for piece in each.pieces:
                    sink(sampled(family, each, piece, each.row.elements / max(1, seen)))

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
        family, members = self._family, list(self._members())
        # Without a family there is a reason for each.
        sizes = [0 if each.reason or family is None else bytes_of(each, family) for each in members]
        room = float("inf") if self._memory is None else float(self._memory)
        share = min(1.0, room / max(1, sum(sizes)))
        scale = getattr(self._optimizer, "grad_scale", None)
        for each, size in zip(members, sizes, strict=True):
            if each.reason or family is None:
                continue
            if family.elementwise:
                each.pieces = [
                    copied(each, family, scale, *bounds)
                    for bounds in runs(each.row.elements, share, self._block(family, each))
                ]
            elif size <= room:
                each.pieces = [copied(each, family, scale, 0, each.row.elements)]
                room -= size
            else:
                each.reason = (
                    f"its rule needs the whole parameter, {size} bytes of copies, which memory= does not allow"
                )
        self._held = members

    @staticmethod
    def _block(family: Family, held: Held) -> int:
        """Elements that share entries of the parameter's components."""
        storage = family.storage(held.options, held.row.param)
        return math.lcm(*(each.elements for each in storage.components(held.row.param.dtype)))

    def _members(self) -> Iterator[Held]:
        """Every parameter that has a gradient."""
        for index, group in enumerate(self._optimizer.param_groups):
            names = group.get("param_names", [None] * len(group["params"]))
            for param, name in zip(group["params"], names, strict=True):
                if param.grad is None:
                    continue
                row = Row(index, param, name, local(param).numel())
                reason = "it is no torch.optim.Optimizer" if self._family is None else self._refusal(group, param)
                # As they are now: some count their steps in the group.
                yield Held(row, group_copy(group), reason=reason)

    def _refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        assert self._family is not None
        return self._family.refusal(group, param)

    # ---- what can be seen without a replay -------------------------------------------------------------------------

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


def _random_state_kept(held: list[Held]) -> Any:
    """Puts the global generators back, of the CPU and of the parameters' devices."""
    devices = {each.row.param.device for each in held if each.row.param.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    return torch.random.fork_rng(list(devices), device_type=kind)


def _skipped(optimizer: Any) -> bool:
    """Whether a loss scaler made the step do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)

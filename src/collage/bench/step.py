"""`collage bench step`: builds the contenders, times them beside the reference and the null kernels, and pairs the
rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import collage
from collage import kernels
from collage.bench.contenders import Contender, Widths, copy_all, state_bytes
from collage.bench.plan import NULL_ELEMENTS, Plan, groups
from collage.bench.shapes import ShapeSet, Values
from collage.bench.timing import Clock, Lane, Watcher, clock_of, error_text, run_ahead, run_rounds, warm_up

NOT_KNOWN = "it is not known what it moves on these tensors"
COPY: Widths = (), (2, 2)
"""What torch's copy moves, by which the bandwidth of a GPU is known."""
COPIES = 8
"""One after the other: a single one begins slowly."""
NULL_BACKEND = {"cpu": "native", "cuda": "triton"}


@dataclass
class Measured:
    """What was found of one contender, or of a null kernel (then `contender` is None), on one set of shapes.

    Attributes:
        name: of its row.
        shapes: the set.
        contender: its record.
        widths: the item sizes of the null kernel's streams.
        seconds: of its steps.
        ratios: its step to the reference's in the same round.
        shares: the null kernel's time to its own in the same round.
        joined: its step to that on the same elements in one tensor, in the same round.
        host: seconds that a step takes on the host, on a GPU.
        state_bytes: bytes of its state.
        status: "timed", "failed" or "skipped".
        reason: why it was not timed.
        null_reason: why there are no shares.
    """

    name: str
    shapes: ShapeSet
    contender: Contender | None
    widths: Widths | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    joined: list[float] = field(default_factory=list)
    host: float | None = None
    state_bytes: int | None = None
    status: str = "timed"
    reason: str = ""
    null_reason: str = ""


@dataclass
class _Entry:
    """A lane of a group and what it is."""

    name: str
    shapes: ShapeSet
    lane: Lane
    contender: Contender | None = None
    widths: Widths | None = None
    state_bytes: int | None = None


# ---- null kernels --------------------------------------------------------------------------------------------------

NullStep = Callable[[Sequence[Tensor], Sequence[Tensor]], object]


def null_step(device: torch.device) -> tuple[NullStep | None, str]:
    """The in-place null kernel for a device, or None with the reason."""
    name = NULL_BACKEND[device.type]
    backend = collage.backends()[name]
    if not backend.available:
        return None, f"backend {name} cannot run here: {backend.reason}"
    return lambda read_write, read_only: kernels.null_step(read_write, read_only, name), ""


def _null_entry(step: NullStep, shapes: ShapeSet, widths: Widths, plan: Plan, clock: Clock) -> _Entry:
    """A null kernel over flat tensors, one for each stream."""
    dtypes = {1: torch.uint8, 2: plan.dtype, 4: torch.float32}
    count = min(shapes.parameters, NULL_ELEMENTS)
    # Written, not zeros: pages of zeros are one page of memory until they are written.
    flat = [[torch.ones(count, dtype=dtypes[width], device=plan.device) for width in each] for each in widths]
    if widths == COPY:
        lane = Lane("copy", lambda: [flat[1][0].copy_(flat[1][1]) for _ in range(COPIES)], scale=1 / COPIES)
    else:
        name = "null " + "+".join("".join(map(str, each)) for each in widths)
        lane = Lane(name, lambda: step(flat[0], flat[1]))
    lane.scale *= shapes.parameters / count
    _warm_up(lane, clock, plan)
    return _Entry(lane.name, shapes, lane, widths=widths)


def _warm_up(lane: Lane, clock: Clock, plan: Plan) -> None:
    warm_up(lane, clock, plan.rounds, plan.budget)
    if plan.device.type == "cuda":
        run_ahead(lane)


# ---- a run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet(contender: Contender) -> Iterator[None]:
    """Without the warnings of other packages, which would run through the progress bar."""
    if contender.kind != "peer":
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _entry(contender: Contender, shapes: ShapeSet, values: Values, plan: Plan, clock: Clock) -> _Entry:
    """Builds a contender and warms it up."""
    entry = _Entry(contender.name, shapes, Lane(contender.name, lambda: None), contender)
    with quiet(contender):
        try:
            params = values.parameters(contender.dtype)
            grads = [param.grad for param in params if param.grad is not None]
            stepper = contender.build(params)
        except Exception as error:
            entry.lane.error = error_text(error)
            return entry

        def restore_gradients() -> None:
            for param, grad in zip(params, grads, strict=True):
                if param.grad is not grad:
                    param.grad = grad
            if contender.spoils_gradients:
                copy_all(grads, values.grads)

        lane = entry.lane = Lane(contender.name, stepper.step, restore_gradients)
        before = params[0].detach().flatten()[:4096].clone()
        _warm_up(lane, clock, plan)
        if not lane.error and torch.equal(before, params[0].detach().flatten()[:4096]):
            lane.error = "its steps leave the parameters as they are"
        if not lane.error:
            entry.state_bytes = state_bytes(stepper)
            entry.contender = _with_true_streams(contender, entry.state_bytes / shapes.parameters)
    return entry


def _with_true_streams(contender: Contender, state: float) -> Contender:
    """The contender, without its streams where its state is not what they say: some peers keep small tensors in other
    formats. Scales of blocks are no difference."""
    if contender.kind != "peer" or contender.streams is None:
        return contender
    stated = contender.streams.bytes_kept - 2 * contender.dtype.itemsize
    return contender if abs(state - stated) < 0.5 else dataclasses.replace(contender, streams=None)


def _measure(contenders: Sequence[Contender], shapes: ShapeSet, plan: Plan, watcher: Watcher) -> list[Measured]:
    """Times a group, its reference and its null kernels in the same rounds."""
    clock = clock_of(plan.device)
    step, reason = null_step(plan.device)
    entries: list[_Entry] = []
    for each in [shapes, shapes.as_one()] if shapes.joined else [shapes]:
        values = Values.of(each, plan.dtype, plan.device)
        for contender in contenders:
            watcher.warming(f"{contender.name} on {each.name}")
            entries.append(_entry(contender, each, values, plan, clock))
        if step is not None:
            watcher.warming(f"null kernels on {each.name}")
            widths = [*_widths(entries, each), *([COPY] if plan.device.type == "cuda" else [])]
            entries += [_null_entry(step, each, those, plan, clock) for those in widths]
    run_rounds([entry.lane for entry in entries], clock, plan.rounds, watcher)
    return [_measured(entry, entries, plan, reason) for entry in entries]


def _widths(entries: Sequence[_Entry], shapes: ShapeSet) -> list[Widths]:
    """The streams for which there must be null kernels of all elements of `shapes`."""
    records = [entry.contender for entry in entries if entry.shapes is shapes and not entry.lane.error]
    return sorted({record.streams.null() for record in records if record and record.streams})


def _measured(entry: _Entry, entries: Sequence[_Entry], plan: Plan, no_null: str) -> Measured:
    lanes = {(other.name, other.shapes.name): other.lane for other in entries}
    nulls = {(other.widths, other.shapes.name): other.lane for other in entries if other.widths}
    shapes, lane = entry.shapes, entry.lane
    found = Measured(entry.name, shapes, entry.contender, entry.widths, list(lane.seconds.values()))
    found.host, found.state_bytes = lane.host, entry.state_bytes
    if lane.error:
        found.status, found.reason = "failed", lane.error
    found.ratios = _paired(lane, lanes[plan.reference.name, shapes.name])
    if entry.contender:
        found.joined = _paired(lane, lanes.get((entry.name, f"{shapes.name}-joined")))
        streams = entry.contender.streams
        null = nulls.get((streams.null(), shapes.name)) if streams else None
        found.shares = [1 / ratio for ratio in _paired(lane, null)]
        found.null_reason = NOT_KNOWN if streams is None else null.error if null else no_null
    return found


def _paired(lane: Lane, other: Lane | None) -> list[float]:
    """The lane's seconds to the other's, in the rounds of both."""
    if other is None:
        return []
    return [seconds / other.seconds[index] for index, seconds in lane.seconds.items() if index in other.seconds]


def _merge(found: list[Measured]) -> list[Measured]:
    """One entry for each name and set: the reference and the null kernels are measured in every group."""
    merged: dict[tuple[str, str], Measured] = {}
    for each in found:
        known = merged.setdefault((each.name, each.shapes.name), each)
        if known is not each:
            for key in ("seconds", "ratios", "shares", "joined"):
                getattr(known, key).extend(getattr(each, key))
    return list(merged.values())


def run(plan: Plan, watcher: Watcher) -> list[Measured]:
    """Times everything; contenders that cannot run or that fail are in the result with the reason.

    Raises:
        UserError: shapes do not fit into memory.
    """
    grouped = [(shapes, *groups(plan, shapes)) for shapes in plan.shapes]
    found: list[Measured] = []
    for shapes, members, left_out in grouped:
        timed: list[Measured] = []
        for contenders in members:
            timed += _measure([plan.reference, *contenders], shapes, plan, watcher)
            gc.collect()
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
        for contender in plan.contenders:
            reason = contender.unavailable or left_out.get(contender.name)
            if reason:
                timed.append(Measured(contender.name, shapes, contender, status="skipped", reason=reason))
        found += sorted(_merge(timed), key=lambda each: _place(each, plan))
    return found


def _place(measured: Measured, plan: Plan) -> tuple[Any, ...]:
    """Sorts by set of shapes, then as planned, null kernels last."""
    order = [plan.reference.name, *(contender.name for contender in plan.contenders)]
    known = measured.name in order
    return len(measured.shapes.shapes) == 1, not known, order.index(measured.name) if known else measured.name

"""`collage bench train`: whole training steps of a real model, every strategy beside the ways to train in mixed
precision with torch alone, in interleaved rounds.

Ratios are to the best of the mixed-precision baselines, whichever that is here, and to the unfused one, a Python loop
over the parameters. The peak of each is measured in a process of its own; the largest micro-batch is the plan's.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

import collage
from collage.bench.contenders import Build, Contender, MasterAdamW, own_contenders, torch_contenders
from collage.bench.results import quantile
from collage.bench.timing import Lane, Watcher, clock_of, error_text, run_rounds, warm_up
from collage.bench.training import Setup, Training, peaks
from collage.plan.memory import Needs, Planner, Settings
from collage.plan.models import Subject
from collage.train.config import UserError
from collage.train.products import products

MASTER, AUTOCAST, UNFUSED = "torch fused, fp32 master", "torch autocast, fp32 fused", "torch for-loop, fp32 master"
BASELINES = (MASTER, AUTOCAST)
"""The ways to train in mixed precision of which the best is what ratios are taken to."""
LOW = torch.bfloat16
MASTER_GRADIENTS = 4
"""Bytes per parameter of the float32 gradients that a step on master copies keeps."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: of its row.
        kind: "collage", "baseline" or "unfused".
        strategy: whose storages it has; of a baseline the one that keeps the same.
        dtype: of the model's parameters.
        build: makes the optimizer.
        autocast: whether it computes in torch's autocast.
        extra: bytes per parameter that it keeps beside the strategy's.
    """

    name: str
    kind: str
    strategy: str
    dtype: torch.dtype
    build: Build
    autocast: bool = False
    extra: int = 0


def _loop(params: Any, **hyper: Any) -> MasterAdamW:
    return MasterAdamW(params, fused=False, **hyper)


def arms(strategies: Iterable[str]) -> list[Arm]:
    """The baselines, then every strategy."""
    fp32: Contender = next(each for each in torch_contenders(LOW) if each.name == "torch fused fp32")
    own = own_contenders(strategies, [None], LOW)
    return [
        Arm(MASTER, "baseline", "mixed", LOW, MasterAdamW, extra=MASTER_GRADIENTS),
        Arm(AUTOCAST, "baseline", "fp32", torch.float32, fp32.build, autocast=True),
        Arm(UNFUSED, "unfused", "mixed", LOW, _loop, extra=MASTER_GRADIENTS),
        *(Arm(each.name, "collage", str(each.strategy), each.dtype, each.build) for each in own),
    ]


@dataclass(frozen=True)
class TrainPlan:
    """What is timed.

    Attributes:
        subjects: the models, one after the other.
        strategies: names.
        micro_batch: sequences of a step.
        attention: transformers' name.
        checkpointing: whether blocks are computed again in the backward.
        device: where.
        rounds: how many; what is slow takes part in fewer.
        budget: seconds for the rounds of one arm.
        memory: bytes that may be in use at a time.
    """

    subjects: tuple[Subject, ...]
    strategies: tuple[str, ...]
    micro_batch: int
    attention: str
    checkpointing: bool
    device: torch.device
    rounds: int
    budget: float
    memory: int

    def settings(self, arm: Arm) -> Settings:
        """How an arm computes here."""
        low = LOW if arm.autocast else arm.dtype
        return Settings(
            micro_batch=self.micro_batch,
            attention=self.attention,
            products=products(self.device, low),
            autocast=arm.autocast,
        )

    def setup(self, subject: Subject, arm: Arm) -> Setup:
        """What trains a model with an arm."""
        own = arm.strategy if arm.kind == "collage" else None
        return Setup(subject, self.settings(arm), self.checkpointing, arm.dtype, arm.build, own)


@dataclass
class Timed:
    """What was found of one arm on one model; times in seconds, by round."""

    subject: Subject
    arm: Arm
    planned: int
    largest: int
    group: int = 0
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    peak: int | None = None
    status: str = "timed"
    reason: str = ""


def run(plan: TrainPlan, watcher: Watcher) -> list[dict[str, Any]]:
    """A row for every arm on every model; one that doesn't fit or that fails has the reason.

    Raises:
        UserError: nothing fits.
    """
    rows: list[dict[str, Any]] = []
    for subject in plan.subjects:
        found = _planned(plan, subject)
        _time(plan, [each for each in found if each.status == "timed"], watcher)
        for each in found:
            if each.status == "timed":
                watcher.warming(f"{each.arm.name} by itself, for its peak")
                _peak(plan, each)
        rows += _rows(plan, found)
    if not any(row["status"] == "timed" for row in rows):
        reasons = "; ".join(f"{row['contender']}: {row['reason']}" for row in rows)
        raise UserError(f"nothing was timed: {reasons}. Take a smaller model, --micro-batch or --seq")
    return rows


# ---- what fits -----------------------------------------------------------------------------------------------------


def _planned(plan: TrainPlan, subject: Subject) -> list[Timed]:
    """All arms, those that don't fit skipped, the others in groups that fit together."""
    planners: dict[Settings, Planner] = {}
    found, used, group = [], 0, 0
    for arm in arms(plan.strategies):
        settings = plan.settings(arm)
        planner = planners.setdefault(settings, Planner(subject, settings))
        needs = with_extra(planner.needs(collage.strategies()[arm.strategy], plan.checkpointing), arm, subject)
        timed = Timed(subject, arm, needs.peak(plan.micro_batch), needs.largest_micro_batch(plan.memory))
        kept = needs.stored.params + needs.stored.states
        if timed.planned > plan.memory:
            timed.status = "skipped"
            timed.reason = f"the plan says {timed.planned / 1e9:.1f} GB, {plan.memory / 1e9:.1f} GB may be used"
        else:
            # The arms of a group keep weights and states all the time, and one of them computes.
            if used + timed.planned > plan.memory:
                used, group = 0, group + 1
            used += kept
            timed.group = group
        found.append(timed)
    return found


def with_extra(needs: Needs, arm: Arm, subject: Subject) -> Needs:
    """What an arm needs: a strategy's needs, with what it keeps beside them."""
    extra = arm.extra * subject.count
    return dataclasses.replace(needs, stored=dataclasses.replace(needs.stored, states=needs.stored.states + extra))


# ---- time ----------------------------------------------------------------------------------------------------------


def _time(plan: TrainPlan, found: Sequence[Timed], watcher: Watcher) -> None:
    """Times the arms of each group in interleaved rounds."""
    clock = clock_of(plan.device)
    for group in dict.fromkeys(each.group for each in found):
        lanes: list[tuple[Timed, Lane]] = []
        for each in (each for each in found if each.group == group):
            watcher.warming(f"{each.arm.name}, {each.subject.label}")
            lane = Lane(each.arm.name, lambda: None)
            try:
                lane = Lane(each.arm.name, Training(plan.setup(each.subject, each.arm), plan.device).step)
                warm_up(lane, clock, plan.rounds, plan.budget)
            except Exception as error:
                lane.error = error_text(error)
            lanes.append((each, lane))
        run_rounds([lane for _, lane in lanes], clock, plan.rounds, watcher)
        for each, lane in lanes:
            each.seconds = lane.seconds
            each.status, each.reason = ("failed", lane.error) if lane.error else ("timed", "")
        del lanes
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _peak(plan: TrainPlan, timed: Timed) -> None:
    """Measures an arm's peak in a process of its own."""
    # Without what is cached on it: shapes are quickly found again.
    subject = dataclasses.replace(timed.subject)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            setup = plan.setup(subject, timed.arm)
            name = timed.arm.name
            timed.peak = pool.submit(_peak_of, name, plan.strategies, setup_without_build(setup), plan.device).result()
        except (BrokenProcessPool, RuntimeError) as error:
            timed.status, timed.reason = "failed", error_text(error)


def setup_without_build(setup: Setup) -> Setup:
    """A setup that can be sent to another process, which finds the optimizer by its arm's name."""
    return dataclasses.replace(setup, build=MasterAdamW)


def _peak_of(name: str, strategies: Sequence[str], setup: Setup, device: torch.device) -> int:
    arm = next(each for each in arms(strategies) if each.name == name)
    return max(peaks(dataclasses.replace(setup, build=arm.build), device).values())


# ---- rows ----------------------------------------------------------------------------------------------------------


def _rows(plan: TrainPlan, found: Sequence[Timed]) -> list[dict[str, Any]]:
    timed = [each for each in found if each.status == "timed" and each.seconds]
    medians = {each.arm.name: quantile(list(each.seconds.values()), 0.5) for each in timed}
    best = min((name for name in BASELINES if name in medians), key=lambda name: medians[name] or 0.0, default=None)
    by_name = {each.arm.name: each for each in timed}
    return [_row(plan, each, by_name, best) for each in found]


def _row(plan: TrainPlan, each: Timed, by_name: dict[str, Timed], best: str | None) -> dict[str, Any]:
    milliseconds = [1e3 * seconds for seconds in each.seconds.values()]
    middle = quantile(milliseconds, 0.5)
    tokens = plan.micro_batch * each.subject.seq_len
    reference = by_name.get(best) if best else None
    return {
        "contender": each.arm.name,
        "kind": each.arm.kind,
        "status": each.status,
        "reason": each.reason or None,
        "strategy": each.arm.strategy if each.arm.kind == "collage" else None,
        "model": each.subject.label,
        "parameters": each.subject.count,
        "seq_len": each.subject.seq_len,
        "micro_batch": plan.micro_batch,
        "attention": plan.attention,
        "checkpointing": plan.checkpointing,
        "products": plan.settings(each.arm).products,
        "rounds": len(milliseconds),
        "ms_p10": quantile(milliseconds, 0.1),
        "ms_p50": middle,
        "ms_p90": quantile(milliseconds, 0.9),
        "tokens_per_s": 1e3 * tokens / middle if middle else None,
        "best": best,
        "ratio": _ratio(each, reference),
        "ratio_to_unfused": _ratio(each, by_name.get(UNFUSED)),
        "same_rounds": reference is not None and reference.group == each.group,
        "peak_bytes": each.peak,
        "planned_peak_bytes": each.planned,
        "max_micro_batch": each.largest,
        "memory_bytes": plan.memory,
    }


def _ratio(each: Timed, other: Timed | None) -> float | None:
    """The median of the per-round ratios; of arms that were not timed in the same rounds the ratio of the medians."""
    if other is None or not each.seconds:
        return None
    if each.group == other.group:
        pairs = [seconds / other.seconds[at] for at, seconds in each.seconds.items() if at in other.seconds]
        return quantile(pairs, 0.5)
    own, its = (quantile(list(timed.seconds.values()), 0.5) for timed in (each, other))
    return own / its if own and its else None

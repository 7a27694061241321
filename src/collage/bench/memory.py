"""`collage bench memory`: the peak of real training steps beside what `collage plan` says of them.

On a CPU torch's profiler reports every allocation and every release with its bytes, and the peak is that of their
running sum from before the model is built. On a GPU it is the allocator's own figure.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import collage
from collage.bench.timing import Watcher
from collage.plan.memory import Planner, Settings
from collage.plan.models import Subject
from collage.train.models import parameter_groups
from collage.train.products import multiplying, products

STEPS = 2
"""The first makes what an optimizer makes late, the second finds it there."""
COMPUTING, STEPPING = "collage: forward and backward", "collage: step"
CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """One model, strategy and way to train it.

    Attributes:
        subject: the model.
        strategy: name of the strategy.
        checkpointing: whether blocks are computed again in the backward.
        settings: the rest; its products are those of the device.
    """

    subject: Subject
    strategy: str
    checkpointing: bool
    settings: Settings

    @property
    def name(self) -> str:
        """For people who watch."""
        how = ", checkpointing" if self.checkpointing else ""
        return f"{self.strategy}, {self.settings.attention}{how}"


def settings_here(device: torch.device, strategy: str, micro_batch: int, attention: str) -> Settings:
    """How a device trains a strategy: with matrix products as `collage train` makes them there."""
    dtype = collage.strategies()[strategy].param_dtype(torch.bfloat16)
    return Settings(micro_batch=micro_batch, attention=attention, products=products(device, dtype))


def measure(cases: Sequence[Case], device: torch.device, watcher: Watcher) -> list[dict[str, Any]]:
    """A row for every case: bytes planned and measured, of both halves of a step and of the whole."""
    planners: dict[tuple[int, Settings], Planner] = {}
    rows = []
    for case in cases:
        watcher.warming(case.name)
        planner = planners.setdefault((id(case.subject), case.settings), Planner(case.subject, case.settings))
        needs = planner.needs(collage.strategies()[case.strategy], case.checkpointing)
        phases = needs.phases(case.settings.micro_batch)
        planned = {COMPUTING: max(phases["forward"], phases["backward"]), STEPPING: phases["step"]}
        found = _measured_on_cpu(case, device) if device.type == "cpu" else _measured_on_gpu(case, device)
        rows.append(_row(case, planned, found))
    return rows


def _row(case: Case, planned: dict[str, int], found: dict[str, int]) -> dict[str, Any]:
    peak, real = max(planned.values()), max(found.values())
    return {
        "model": case.subject.label,
        "parameters": case.subject.count,
        "strategy": case.strategy,
        "seq_len": case.subject.seq_len,
        "micro_batch": case.settings.micro_batch,
        "attention": case.settings.attention,
        "checkpointing": case.checkpointing,
        "products": case.settings.products,
        "planned_bytes": peak,
        "measured_bytes": real,
        "error": peak / real - 1,
        "computing": {"planned_bytes": planned[COMPUTING], "measured_bytes": found[COMPUTING]},
        "stepping": {"planned_bytes": planned[STEPPING], "measured_bytes": found[STEPPING]},
    }


# ---- a real training step ------------------------------------------------------------------------------------------


class Training:
    """A model with fresh weights, its optimizer and one batch."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        dtype = collage.strategies()[case.strategy].param_dtype(torch.bfloat16)
        how = {"attention": case.settings.attention, "checkpointing": case.checkpointing}
        with torch.device(device):
            self.model: nn.Module = case.subject.build(dtype=torch.float32, **how)
        if dtype != torch.float32:
            collage.to_low_precision(self.model, dtype)
        self.optimizer = collage.AdamW(parameter_groups(self.model, 0.1), strategy=case.strategy)
        self.params: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.tokens = case.subject.tokens(case.settings.micro_batch).to(device)

    def compute(self) -> None:
        """Forward and backward."""
        with multiplying(self.case.settings.products):
            self.case.subject.loss(self.model, self.tokens).backward()

    def step(self) -> None:
        """Clips gradients to a norm, as `collage train` does, and steps."""
        clip_gradients(self.params, CLIP)
        self.optimizer.step()


def clip_gradients(params: Sequence[Tensor], most: float) -> None:
    """Scales gradients down to a norm, computed in float32."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params if p.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(list(params), most, torch.linalg.vector_norm(torch.stack(norms)))


def _measured_on_cpu(case: Case, device: torch.device) -> dict[str, int]:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        training = Training(case, device)
        for _ in range(STEPS):
            with record_function(COMPUTING):
                training.compute()
            with record_function(STEPPING):
                training.step()
            training.optimizer.zero_grad()
    return _peaks(profiler)


def _peaks(profiler: Any) -> dict[str, int]:
    """The largest running sum of all allocations within each kind of span."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    spans = [(each.name(), each.start_ns(), each.end_ns()) for each in events if each.name() in (COMPUTING, STEPPING)]
    if len(spans) != 2 * STEPS or not changes:
        raise RuntimeError(f"torch's profiler gave {len(spans)} spans and {len(changes)} allocations")
    peaks, alive, at = {COMPUTING: 0, STEPPING: 0}, 0, 0
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        while at < len(changes) and changes[at][0] < start:
            alive, at = alive + changes[at][1], at + 1
        peaks[name] = max(peaks[name], alive)
        while at < len(changes) and changes[at][0] <= end:
            alive, at = alive + changes[at][1], at + 1
            peaks[name] = max(peaks[name], alive)
    return peaks


def _measured_on_gpu(case: Case, device: torch.device) -> dict[str, int]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    training = Training(case, device)
    peaks = {COMPUTING: 0, STEPPING: 0}
    parts: list[tuple[str, Callable[[], None]]] = [(COMPUTING, training.compute), (STEPPING, training.step)]
    for _ in range(STEPS):
        for name, part in parts:
            torch.cuda.reset_peak_memory_stats(device)
            part()
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - before)
        training.optimizer.zero_grad()
    return peaks

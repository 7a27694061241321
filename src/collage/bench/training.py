"""A whole training step of a real model, and the bytes that torch allocates for it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import collage
from collage.bench.contenders import Build, Stepper
from collage.plan.memory import Settings
from collage.plan.models import Subject
from collage.train.products import multiplying

STEPS = 2
"""The first makes what an optimizer makes late, the second finds it there."""
COMPUTING, STEPPING = "collage: forward and backward", "collage: step"
CLIP = 1.0


@dataclass(frozen=True)
class Setup:
    """One way to train a model.

    Attributes:
        subject: the model and the length of its sequences.
        settings: micro-batch, attention, products, whether in autocast.
        checkpointing: whether blocks are computed again in the backward.
        dtype: of the parameters.
        build: makes the optimizer.
        strategy: of collage's own optimizer, whose model is brought into its form; None of others.
    """

    subject: Subject
    settings: Settings
    checkpointing: bool
    dtype: torch.dtype
    build: Build
    strategy: str | None = None


class Training:
    """A model with fresh weights, its optimizer and one batch."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        how = {"attention": setup.settings.attention, "checkpointing": setup.checkpointing}
        with torch.device(device):
            self.model: nn.Module = setup.subject.build(dtype=torch.float32, **how)
        if setup.dtype != torch.float32 and setup.strategy is None:
            nn.Module.to(self.model, setup.dtype)
        elif setup.dtype != torch.float32:
            collage.to_low_precision(self.model, setup.dtype)
        if setup.strategy is not None and collage.strategies()[setup.strategy].param.borne:
            collage.to_fp8_(self.model, setup.strategy)
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer: Stepper = setup.build(self.params)
        self.tokens = setup.subject.tokens(setup.settings.micro_batch).to(device)

    def compute(self) -> None:
        """Forward and backward."""
        low = torch.autocast(self.device.type, torch.bfloat16) if self.setup.settings.autocast else None
        with multiplying(self.setup.settings.products):
            with low or contextlib.nullcontext():
                loss = self.setup.subject.loss(self.model, self.tokens)
            loss.backward()

    def update(self) -> None:
        """Clips gradients to a norm, as `collage train` does, and steps."""
        clip_gradients(self.params, CLIP)
        self.optimizer.step()

    def step(self) -> None:
        """All of a training step."""
        self.compute()
        self.update()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Frees the gradients."""
        for param in self.params:
            param.grad = None


def clip_gradients(params: Sequence[Tensor], most: float) -> None:
    """Scales gradients down to a norm, computed in float32."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params if p.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(list(params), most, torch.linalg.vector_norm(torch.stack(norms)))


# ---- bytes ---------------------------------------------------------------------------------------------------------


def peaks(setup: Setup, device: torch.device) -> dict[str, int]:
    """The most bytes that torch had allocated at a time, in the forwards and backwards and in the steps.

    On a CPU torch's profiler reports every allocation and every release, from before the model is built, and the peak
    is that of their running sum. On a GPU the allocator tells.
    """
    gc.collect()
    return _on_cpu(setup, device) if device.type == "cpu" else _on_gpu(setup, device)


def _on_cpu(setup: Setup, device: torch.device) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        training = Training(setup, device)
        for _ in range(STEPS):
            with record_function(COMPUTING):
                training.compute()
            with record_function(STEPPING):
                training.update()
            training.drop_gradients()
    return _running_sums(profiler)


def _running_sums(profiler: Any) -> dict[str, int]:
    """The largest running sum of all allocations within each kind of span."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    spans = [(each.name(), each.start_ns(), each.end_ns()) for each in events if each.name() in (COMPUTING, STEPPING)]
    if len(spans) != 2 * STEPS or not changes:
        raise RuntimeError(f"torch's profiler gave {len(spans)} spans and {len(changes)} allocations")
    found, alive, at = {COMPUTING: 0, STEPPING: 0}, 0, 0
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        while at < len(changes) and changes[at][0] < start:
            alive, at = alive + changes[at][1], at + 1
        found[name] = max(found[name], alive)
        while at < len(changes) and changes[at][0] <= end:
            alive, at = alive + changes[at][1], at + 1
            found[name] = max(found[name], alive)
    return found


def _on_gpu(setup: Setup, device: torch.device) -> dict[str, int]:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    training = Training(setup, device)
    found = {COMPUTING: 0, STEPPING: 0}
    parts: list[tuple[str, Callable[[], None]]] = [(COMPUTING, training.compute), (STEPPING, training.update)]
    for _ in range(STEPS):
        for name, part in parts:
            torch.cuda.reset_peak_memory_stats(device)
            part()
            found[name] = max(found[name], torch.cuda.max_memory_allocated(device) - before)
        training.drop_gradients()
    return found

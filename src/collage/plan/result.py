"""A plan as data: a row for every strategy, with the model and the settings beside them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import collage
from collage.plan.memory import PHASES, Needs, Planned, Planner, Settings, stored
from collage.plan.models import Subject


def make(
    subject: Subject, settings: Settings, strategy: str, memory: int, checkpointing: bool, command: str
) -> dict[str, Any]:
    """The plan of every strategy.

    Args:
        subject: the model.
        settings: how it is trained.
        strategy: name of the one that is asked for.
        memory: bytes of a device.
        checkpointing: whether the rows' own figures are those with checkpointing.
        command: how it was asked for.
    """
    planner = Planner(subject, settings)
    rows = [_row(planner.plan(each), planner, memory, checkpointing) for each in collage.strategies().values()]
    return {
        "model": {"name": subject.label, "type": subject.config.model_type, "parameters": subject.count},
        "seq_len": subject.seq_len,
        "micro_batch": settings.micro_batch,
        "shards": settings.shards,
        "dtype": _name(settings.dtype),
        "grad_dtype": settings.gradient,
        "reduce_dtype": None if settings.reduce is None else _name(settings.reduce),
        "accumulate": settings.accumulates,
        "attention": settings.attention,
        "products": settings.products,
        "checkpointing": checkpointing,
        "memory_bytes": memory,
        "strategy": strategy,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": command,
        "strategies": rows,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_per_param(strategy: collage.Strategy, settings: Settings) -> float:
    """By the strategy's record, the gradient included: what the documentation's table has."""
    dtype = strategy.param_dtype(settings.dtype)
    return strategy.bytes_per_param(dtype, grad=False) + settings.gradient_dtype(dtype).itemsize


def _row(planned: Planned, planner: Planner, memory: int, checkpointing: bool) -> dict[str, Any]:
    """A row; figures are bytes on one device."""
    settings, strategy, subject = planner.settings, planned.strategy, planner.subject
    if planned.needs is None:
        return {"strategy": strategy.name, "reason": planned.reason}
    needs = planned.needs[checkpointing]
    whole = stored(strategy, subject.shapes, settings.on_one_device())
    both = {again: _peaks(each, settings.micro_batch, memory) for again, each in planned.needs.items()}
    return {
        "strategy": strategy.name,
        "reason": None,
        "bytes_per_param": bytes_per_param(strategy, settings),
        "bytes_per_param_counted": (whole.params + whole.states + whole.gradients) / subject.count,
        "params_bytes": needs.stored.params,
        "gradients_bytes": needs.stored.gradients,
        "states_bytes": needs.stored.states,
        "gathered_bytes": {"forward": needs.gathered.forward, "backward": needs.gathered.backward},
        **both[checkpointing],
        "without_checkpointing": both[False],
        "with_checkpointing": both[True],
    }


def _peaks(needs: Needs, micro_batch: int, memory: int) -> dict[str, Any]:
    phases = needs.phases(micro_batch)
    peak = max(phases.values())
    return {
        "activations_bytes": needs.activations(micro_batch),
        "peak_bytes": peak,
        "peak_phase": next(name for name in PHASES if phases[name] == peak),
        "phases_bytes": phases,
        "max_micro_batch": needs.largest_micro_batch(memory),
    }

"""What the options of the benchmarks mean: refusals are made here, before anything is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import collage
from collage.bench.contenders import own_contenders, reference
from collage.bench.peers import peer_contenders, peer_names
from collage.bench.plan import Plan, free_memory
from collage.bench.precision import ROW, PrecisionPlan
from collage.bench.shapes import DEFAULT, shape_sets
from collage.train.config import UserError
from collage.train.models import attention_for

if TYPE_CHECKING:
    from collage.bench.train import TrainPlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_SHARE = {"cpu": 0.6, "cuda": 0.9}
"""What of the free memory may be used; others use a machine's memory, seldom a GPU's."""


def names(text: str, option: str) -> list[str]:
    """The names in a list separated by commas, each once.

    Raises:
        UserError: there is none.
    """
    found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise UserError(f"{option} must be names separated by commas, got {text!r}")
    return found


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        UserError: it is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise UserError(f"--dtype must be {' or '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        UserError: it is neither cpu nor cuda, or torch finds no GPU.
    """
    if name not in DEFAULT:
        raise UserError(f"--device must be {' or '.join(DEFAULT)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use, and it finds none; use --device cpu")
    return torch.device(name)


def parse_strategies(text: str | None) -> list[str]:
    """Names of strategies; all of them where there is no text.

    Raises:
        UserError: one is none.
    """
    known = collage.strategies()
    found = list(known) if text is None else names(text, "--strategies")
    for name in found:
        if name not in known:
            raise UserError(f"--strategies must be names of {', '.join(known)}, got {name!r}")
    return found


def _backends(text: str | None, device: torch.device) -> list[str]:
    known = collage.backends()
    serving = {name: each for name, each in known.items() if not each.devices or device.type in each.devices}
    if text is None:
        # Fast ones first, as one reads the table.
        return sorted((name for name, each in serving.items() if each.available), key=lambda name: name == "eager")
    found = names(text, "--backends")
    for name in found:
        if name not in serving:
            raise UserError(f"--backends must be names of {', '.join(serving)} on {device.type}, got {name!r}")
        if not serving[name].available:
            raise UserError(f"--backends {name} cannot run here: {serving[name].reason}")
    return found


def make_plan(
    *,
    strategies: str | None,
    backends: str | None,
    peers: str,
    shapes: str | None,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    budget: float,
    memory: float | None,
) -> Plan:
    """What the options ask for.

    Raises:
        UserError: an option that cannot be followed.
    """
    if rounds < 2:
        raise UserError(f"--rounds must be >= 2, got {rounds}")
    if not budget > 0:
        raise UserError(f"--budget must be > 0 seconds, got {budget}")
    if memory is not None and not memory > 0:
        raise UserError(f"--memory must be > 0 GB, got {memory}")
    own = own_contenders(parse_strategies(strategies), _backends(backends, device), dtype)
    others = peer_contenders(peer_names(names(peers, "--peers")), dtype, device)
    return Plan(
        reference=reference(dtype),
        contenders=(*own, *others),
        shapes=tuple(shape_sets(DEFAULT[device.type] if shapes is None else names(shapes, "--shapes"))),
        device=device,
        dtype=dtype,
        rounds=rounds,
        budget=budget,
        memory=MEMORY_SHARE[device.type] * free_memory(device) if memory is None else 1e9 * memory,
    )


LEAST_ELEMENTS = 4096
"""Smaller tensors are kept otherwise than large ones by those who keep moments in blocks."""


def make_precision_plan(
    *, strategies: str | None, peers: str, device: torch.device, elements: int, steps: int
) -> PrecisionPlan:
    """What the options of `collage bench precision` ask for.

    Raises:
        UserError: an option that cannot be followed.
    """
    if elements < LEAST_ELEMENTS or elements % (2 * ROW):
        raise UserError(f"--elements must be a multiple of {2 * ROW}, at least {LEAST_ELEMENTS}, got {elements}")
    if steps < 10:
        raise UserError(f"--steps must be >= 10, got {steps}")
    dtype = torch.bfloat16
    chosen = peer_names(names(peers, "--peers"))
    own = own_contenders(parse_strategies(strategies), [None], dtype)
    controls = [reference(dtype)] if "torch" in chosen else []
    return PrecisionPlan((*own, *controls, *peer_contenders(chosen, dtype, device)), device, elements, steps)


def make_train_plan(
    *,
    models: str,
    strategies: str,
    seq: int,
    micro_batch: int,
    attention: str | None,
    checkpointing: bool,
    device: torch.device,
    rounds: int,
    budget: float,
    memory: str | None,
) -> TrainPlan:
    """What the options of `collage bench train` ask for.

    Raises:
        UserError: an option that cannot be followed.
    """
    from collage.bench.train import TrainPlan
    from collage.plan.options import check_attention, check_micro_batch, parse_memory, subject

    check_micro_batch(micro_batch)
    if rounds < 1:
        raise UserError(f"--rounds must be >= 1, got {rounds}")
    if not budget > 0:
        raise UserError(f"--budget must be > 0 seconds, got {budget}")
    return TrainPlan(
        subjects=tuple(subject(name, {}, seq) for name in names(models, "--models")),
        strategies=tuple(parse_strategies(strategies)),
        micro_batch=micro_batch,
        attention=attention_for(device.type, seq) if attention is None else check_attention(attention),
        checkpointing=checkpointing,
        device=device,
        rounds=rounds,
        budget=budget,
        memory=round(MEMORY_SHARE[device.type] * free_memory(device)) if memory is None else parse_memory(memory),
    )


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is written at the end.

    Raises:
        UserError: it can't be made, or `path` is a folder itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json must be a file that can be written, got {path}: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"--json must be a file, got the folder {path}")


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[int]:
    """Runs its body with so many CPU threads (None: as it is); gives the number.

    Raises:
        UserError: not a positive number.
    """
    if count is not None and count < 1:
        raise UserError(f"--threads must be >= 1, got {count}")
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

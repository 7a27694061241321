"""What is allowed as settings of a run, and a clear error for what isn't."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import collage
from collage.storage.tensor import FORWARDS
from collage.train.config import (
    ARITHMETICS,
    BYTE_VOCABULARY,
    DTYPES,
    GLUE,
    GRAD_DTYPES,
    OWN_TASK,
    REDUCE_DTYPES,
    SCHEDULES,
    TOKENIZERS,
    TrainConfig,
    UserError,
    setting_names,
)
from collage.train.models import BERT, CAUSAL, MODELS


def _fail(name: str, got: object, allowed: str, remedy: str = "") -> UserError:
    tail = f"; {remedy}" if remedy else ""
    return UserError(f"{name} must be {allowed}, got {got!r}{tail}")


_INTEGERS = ("steps", "warmup", "batch_size", "seq_len", "micro_batch", "corpus_bytes", "vocab_size", "eval_every")
_INTEGERS += ("eval_batches", "log_every", "audit_every", "seed", "checkpoint_every", "keep_checkpoints", "threads")
_NUMBERS = ("lr", "min_lr", "eps", "weight_decay", "clip", "dropout")
_FLAGS = ("fsdp", "stream")
_OPTIONAL = ("backend", "warmup", "min_lr", "micro_batch", "data", "corpus_bytes", "vocab_size", "device", "threads")
_OPTIONAL += ("from_checkpoint", "recipe", "dropout", "task", "pretrained", "text_columns")


def check_types(config: TrainConfig) -> None:
    """Raise `UserError` unless every setting is of its type."""
    for name in setting_names():
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        if name == "betas":
            _check_betas(config.betas)
        elif name in _FLAGS:
            if not isinstance(value, bool):
                raise _fail(name, value, "true or false")
        elif name in _INTEGERS:
            if not isinstance(value, int) or isinstance(value, bool):
                raise _fail(name, value, "a whole number")
        elif name in _NUMBERS:
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise _fail(name, value, "a finite number")
        elif not isinstance(value, str) or not value:
            raise _fail(name, value, "a non-empty text")


def _check_betas(betas: Any) -> None:
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in betas):
        raise _fail("betas", betas, "two numbers in [0, 1)")


def check_values(config: TrainConfig) -> None:
    """Raise `UserError` unless the settings, of the right types, are allowed and fit each other."""
    _check_choices(config)
    _check_ranges(config)
    _check_together(config)


def _check_choices(config: TrainConfig) -> None:
    choices: dict[str, Iterable[str]] = {} if config.task else {"model": MODELS}
    choices |= {
        "strategy": collage.strategies(),
        "dtype": DTYPES,
        "arithmetic": ARITHMETICS,
        "schedule": SCHEDULES,
        "grad_dtype": GRAD_DTYPES,
        "reduce_dtype": REDUCE_DTYPES,
        "forward": FORWARDS,
    }
    if config.backend is not None:
        choices["backend"] = [backend.name for backend in collage.backends().values() if backend.available]
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise _fail(name, getattr(config, name), "one of " + ", ".join(allowed))
    if config.recipe is not None:
        from collage.train.recipes import known  # recipes are made of these settings

        known(config.recipe)
    if config.task is None and config.tokenizer not in TOKENIZERS and not Path(config.tokenizer).exists():
        raise _fail("tokenizer", config.tokenizer, f"one of {', '.join(TOKENIZERS)}, or a tokenizer.json that exists")


_LEAST = {"steps": 1, "warmup": 0, "batch_size": 1, "seq_len": 2, "micro_batch": 1, "corpus_bytes": 1}
_LEAST |= {"vocab_size": 257, "eval_every": 0, "eval_batches": 1, "log_every": 1, "audit_every": 0, "seed": 0}
_LEAST |= {"checkpoint_every": 0, "keep_checkpoints": 1, "threads": 1}
_LEAST |= {"lr": 0.0, "min_lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "clip": 0.0, "dropout": 0.0}
_SEEDS = 2**63


def _check_ranges(config: TrainConfig) -> None:
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise _fail(name, value, f">= {least}")
    if config.seed >= _SEEDS:
        raise _fail("seed", config.seed, f"less than 2^63 = {_SEEDS}")


def _check_together(config: TrainConfig) -> None:
    try:
        _ = config.model_dtype
    except ValueError as error:
        raise _fail("dtype", config.dtype, f"one that strategy {config.strategy} serves", str(error)) from error
    if config.warmup and config.warmup >= config.steps:
        raise _fail("warmup", config.warmup, f"less than steps ({config.steps})", "lower warmup or raise steps")
    if config.schedule != "constant" and config.min_lr is not None and config.min_lr > config.lr:
        raise _fail("min_lr", config.min_lr, f"at most lr ({config.lr})", "lower min_lr or raise lr")
    if config.micro_batch is not None and config.batch_size % config.micro_batch:
        raise _fail("micro_batch", config.micro_batch, f"a divisor of batch_size ({config.batch_size})")
    if config.arithmetic == "working" and not collage.strategies()[config.strategy].has_working_arithmetic:
        able = [name for name, strategy in collage.strategies().items() if strategy.has_working_arithmetic]
        raise _fail("strategy", config.strategy, f"one of {', '.join(able)} with arithmetic working")
    if config.arithmetic == "working" and config.backend not in (None, "eager"):
        raise _fail("backend", config.backend, "eager with arithmetic working", "leave it unset")
    if config.forward != "value" and not collage.strategies()[config.strategy].param.borne:
        able = [name for name, strategy in collage.strategies().items() if strategy.param.borne]
        raise _fail("strategy", config.strategy, f"one of {', '.join(able)} with forward {config.forward}")
    if config.dropout is not None and config.dropout >= 1.0:
        raise _fail("dropout", config.dropout, "less than 1")
    if config.stream and config.corpus_bytes is not None:
        raise _fail("corpus_bytes", config.corpus_bytes, "unset with stream", "leave one of them out")
    if config.task is None:
        _check_text(config)
    else:
        _check_task(config)


def _check_task(config: TrainConfig) -> None:
    """Raise `UserError` unless the settings are those of fine-tuning."""
    if config.task not in (*GLUE, OWN_TASK):
        raise _fail("task", config.task, f"one of {', '.join((*GLUE, OWN_TASK))}")
    if config.pretrained is None:
        raise _fail("pretrained", None, "the model to fine-tune", "name it with --from")
    for name in ("recipe", "from_checkpoint", "stream", "corpus_bytes", "vocab_size"):
        if getattr(config, name):
            raise _fail(name, getattr(config, name), "unset with a task")


def _check_text(config: TrainConfig) -> None:
    """Raise `UserError` unless sequences and tokens fit each other and the model."""
    spec = MODELS[config.model]
    if spec.positions is not None and config.seq_len > spec.positions:
        raise _fail("seq_len", config.seq_len, f"at most {spec.positions}, the positions of {config.model}")
    if spec.family.objective != CAUSAL and config.tokenizer == "bytes":
        kind = "wordpiece" if spec.family is BERT else "bpe"
        raise _fail("tokenizer", "bytes", f"one with a mask token for {config.model}", f"use tokenizer {kind}")
    if config.tokenizer == "wordpiece" and spec.family is not BERT:
        raise _fail("tokenizer", "wordpiece", f"one with the special tokens of {config.model}", "use tokenizer bpe")
    if config.tokenizer == "bytes" and config.vocab_size not in (None, BYTE_VOCABULARY):
        raise _fail("vocab_size", config.vocab_size, f"{BYTE_VOCABULARY} with the byte tokenizer", "use tokenizer bpe")

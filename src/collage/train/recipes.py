"""Recipes: functions that return the whole configuration of a run.

A variant is a function that calls another one and replaces fields. Settings are those of the paper's experiments
(its released configurations) where a docstring names no other source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from collage.train.config import TrainConfig, UserError

# ---- GPT -------------------------------------------------------------------------------------------------------


def gpt_125m() -> TrainConfig:
    """GPT with 125 million parameters: 1,024 sequences of 2,048 tokens, 20,000 steps, beta2 = .95."""
    return TrainConfig(
        recipe="gpt-125m",
        model="gpt-125m",
        lr=6e-4,
        min_lr=6e-5,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip=1.0,
        steps=20_000,
        schedule="cosine",
        warmup=200,
        batch_size=1024,
        micro_batch=16,
        seq_len=2048,
        data="wikipedia",
        tokenizer="gpt2",
        seed=1234,
        eval_every=1000,
        log_every=10,
        audit_every=100,
        checkpoint_every=1000,
    )


def gpt_1_3b() -> TrainConfig:
    """GPT with 1.3 billion parameters."""
    return replace(gpt_125m(), recipe="gpt-1.3b", model="gpt-1.3b", lr=2e-4, min_lr=2e-5)


def gpt_2_7b() -> TrainConfig:
    """GPT with 2.7 billion parameters."""
    shape = {"model": "gpt-2.7b", "batch_size": 512, "micro_batch": 8}
    return replace(gpt_125m(), recipe="gpt-2.7b", lr=1.6e-4, min_lr=1.6e-5, **shape)


def gpt_6_7b() -> TrainConfig:
    """GPT with 6.7 billion parameters."""
    shape = {"model": "gpt-6.7b", "batch_size": 256, "micro_batch": 4}
    return replace(gpt_125m(), recipe="gpt-6.7b", lr=1.2e-4, min_lr=1.2e-5, **shape)


def gpt_tiny() -> TrainConfig:
    """The GPT recipe in a minute on two cores; the learning rate is that of a small model."""
    return replace(_small(gpt_125m()), recipe="gpt-tiny", model="gpt-tiny", lr=2e-3, min_lr=2e-5, tokenizer="bpe")


# ---- BERT ------------------------------------------------------------------------------------------------------


def bert_base_phase1() -> TrainConfig:
    """BERT-base, first phase: 16,384 sequences of 128 tokens, 28,125 steps, beta2 = .999."""
    return TrainConfig(
        recipe="bert-base-phase1",
        model="bert-base",
        lr=4e-4,
        min_lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        clip=1.0,
        steps=28_125,
        schedule="linear",
        warmup=2000,
        batch_size=16_384,
        micro_batch=64,
        seq_len=128,
        data="wikipedia",
        tokenizer="bert",
        eval_every=1000,
        eval_batches=1,
        log_every=10,
        audit_every=100,
        checkpoint_every=1000,
    )


def bert_base_phase2() -> TrainConfig:
    """BERT-base, second phase: goes on from the first one's checkpoint (--from) with 32,768 sequences of 512 tokens.

    Weights and moments are the first phase's, the schedule is its own.
    """
    longer = {"seq_len": 512, "batch_size": 32_768, "micro_batch": 16}
    return replace(bert_base_phase1(), recipe="bert-base-phase2", lr=2.8e-4, steps=1563, warmup=781, **longer)


def bert_large_phase1() -> TrainConfig:
    """BERT-large, first phase. Its settings beside the shape are not known to us: those of BERT-base."""
    return replace(bert_base_phase1(), recipe="bert-large-phase1", model="bert-large", micro_batch=32)


def bert_large_phase2() -> TrainConfig:
    """BERT-large, second phase; see `bert_large_phase1`."""
    return replace(bert_base_phase2(), recipe="bert-large-phase2", model="bert-large", micro_batch=8)


def bert_tiny() -> TrainConfig:
    """BERT's first phase in a minute on two cores, at the same learning rate."""
    small = _small(bert_base_phase1())
    return replace(small, recipe="bert-tiny", model="bert-tiny", steps=600, warmup=40, tokenizer="wordpiece")


def bert_tiny_phase2() -> TrainConfig:
    """BERT's second phase in a minute on two cores: goes on from bert-tiny (--from) with twice the sequence length."""
    return replace(bert_tiny(), recipe="bert-tiny-phase2", lr=2.8e-4, steps=60, warmup=30, seq_len=128, batch_size=16)


# ---- RoBERTa and LLaMA -----------------------------------------------------------------------------------------


def roberta_base() -> TrainConfig:
    """RoBERTa-base: 8,192 sequences of 512 tokens, 28,125 steps, beta2 = .98; the rest as BERT-base."""
    own = {"recipe": "roberta-base", "model": "roberta-base", "tokenizer": "roberta"}
    batch = {"batch_size": 8192, "micro_batch": 16, "seq_len": 512}
    return replace(bert_base_phase1(), lr=6e-4, betas=(0.9, 0.98), **own, **batch)


def roberta_tiny() -> TrainConfig:
    """The RoBERTa recipe in a minute on two cores, at the same learning rate."""
    small = _small(roberta_base())
    return replace(small, recipe="roberta-tiny", model="roberta-tiny", steps=600, warmup=40, tokenizer="bpe")


def llama_7b() -> TrainConfig:
    """LLaMA-7B: 4 million tokens a step in sequences of 2,048, a trillion in all, beta2 = .95.

    The settings are those that LLaMA was published with (Touvron et al. 2023, arXiv 2302.13971, section 2); the paper's
    own, of OpenLLaMA-7B, are not known to us. Of LLaMA's mixture of texts C4 stands for the whole.
    """
    own = {"recipe": "llama-7b", "model": "llama-7b", "tokenizer": "llama", "data": "c4"}
    batch = {"batch_size": 2048, "micro_batch": 4, "steps": 238_419, "warmup": 2000}
    return replace(gpt_125m(), lr=3e-4, min_lr=3e-5, **own, **batch)


def llama_tiny() -> TrainConfig:
    """The LLaMA recipe in a minute on two cores."""
    small = _small(llama_7b())
    return replace(small, recipe="llama-tiny", model="llama-tiny", lr=2e-3, min_lr=2e-5, tokenizer="bpe")


def _small(config: TrainConfig) -> TrainConfig:
    """The run in a minute on two cores: short, with a vocabulary trained on the text, and measured more often."""
    shape: dict[str, Any] = {"steps": 300, "warmup": 20, "batch_size": 8, "micro_batch": None, "seq_len": 64}
    measured = {"eval_every": 150, "eval_batches": 16, "log_every": 1, "audit_every": 10, "checkpoint_every": 100}
    return replace(config, data=None, vocab_size=1024, seed=0, **shape, **measured)


# ---- by name ---------------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "gpt-tiny": gpt_tiny,
    "gpt-125m": gpt_125m,
    "gpt-1.3b": gpt_1_3b,
    "gpt-2.7b": gpt_2_7b,
    "gpt-6.7b": gpt_6_7b,
    "bert-tiny": bert_tiny,
    "bert-tiny-phase2": bert_tiny_phase2,
    "bert-base-phase1": bert_base_phase1,
    "bert-base-phase2": bert_base_phase2,
    "bert-large-phase1": bert_large_phase1,
    "bert-large-phase2": bert_large_phase2,
    "roberta-tiny": roberta_tiny,
    "roberta-base": roberta_base,
    "llama-tiny": llama_tiny,
    "llama-7b": llama_7b,
}

CONTINUING = {
    "bert-tiny-phase2": "bert-tiny",
    "bert-base-phase2": "bert-base-phase1",
    "bert-large-phase2": "bert-large-phase1",
}
"""Recipes that go on from another one's checkpoint -> that one."""


def known(name: str) -> None:
    """Raise `UserError` if there is no recipe of this name."""
    if name not in RECIPES:
        raise UserError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")


def recipe(name: str) -> TrainConfig:
    """The configuration of a recipe. Raises `UserError` if there is none of this name."""
    known(name)
    return RECIPES[name]()


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` on top of the settings of the recipe that it names, if it names one.

    Raises:
        UserError: there is no such recipe, or it continues another one's checkpoint and `given` names none.
    """
    name = given.get("recipe")
    if name is None:
        return dict(given)
    whole = recipe(name)
    if name in CONTINUING and given.get("from_checkpoint") is None:
        raise UserError(f"recipe {name} goes on from a checkpoint of {CONTINUING[name]}; name it with --from")
    return {
        **{field.name: getattr(whole, field.name) for field in fields(whole)},
        **_in_proportion(whole, given),
        **given,
    }


def _in_proportion(whole: TrainConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What follows a given setting: warm-up the steps, last learning rate the first, micro-batches the batch."""
    steps, lr, size = given.get("steps"), given.get("lr"), given.get("batch_size")
    following: dict[str, Any] = {}
    if isinstance(steps, int) and whole.warmup is not None:
        following["warmup"] = whole.warmup * steps // whole.steps
    if isinstance(lr, (int, float)) and whole.min_lr is not None:
        following["min_lr"] = whole.min_lr * lr / whole.lr
    if isinstance(size, int) and whole.micro_batch is not None:
        following["micro_batch"] = math.gcd(size, whole.micro_batch)
    return following

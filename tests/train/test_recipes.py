"""The whole configurations, against the paper's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collage.train import checkpoints, runfiles
from collage.train.config import TrainConfig, UserError
from collage.train.continuation import continued
from collage.train.loop import train
from collage.train.models import MODELS
from collage.train.recipes import CONTINUING, RECIPES, filled, recipe

GPT = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "steps": 20_000, "warmup": 200}
GPT |= {"schedule": "cosine", "seq_len": 2048, "seed": 1234, "tokenizer": "gpt2"}
BERT = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "clip": 1.0, "schedule": "linear", "min_lr": 0.0}
PHASE_1 = {**BERT, "seq_len": 128, "batch_size": 16_384, "steps": 28_125, "lr": 4e-4, "warmup": 2000}
PHASE_2 = {**BERT, "seq_len": 512, "batch_size": 32_768, "steps": 1563, "lr": 2.8e-4, "warmup": 781}
ROBERTA = {**BERT, "betas": (0.9, 0.98), "seq_len": 512, "batch_size": 8192, "steps": 28_125, "lr": 6e-4}
PAPER: dict[str, dict[str, Any]] = {
    "gpt-125m": {**GPT, "micro_batch": 16, "batch_size": 1024, "lr": 6e-4, "min_lr": 6e-5},
    "gpt-1.3b": {**GPT, "micro_batch": 16, "batch_size": 1024, "lr": 2e-4, "min_lr": 2e-5},
    "gpt-2.7b": {**GPT, "micro_batch": 8, "batch_size": 512, "lr": 1.6e-4, "min_lr": 1.6e-5},
    "gpt-6.7b": {**GPT, "micro_batch": 4, "batch_size": 256, "lr": 1.2e-4, "min_lr": 1.2e-5},
    "bert-base-phase1": PHASE_1,
    "bert-base-phase2": PHASE_2,
    "bert-large-phase1": PHASE_1,
    "bert-large-phase2": PHASE_2,
    "roberta-base": {**ROBERTA, "warmup": 2000},
}


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_has_the_papers_settings(name: str) -> None:
    config = recipe(name)
    assert {key: getattr(config, key) for key in PAPER[name]} == PAPER[name]


def test_llama_is_trained_on_a_trillion_tokens_four_million_a_step() -> None:
    config = recipe("llama-7b")
    assert config.batch_size * config.seq_len == 2**22
    assert config.steps * 2**22 == pytest.approx(1e12, rel=1e-5)
    assert (config.lr, config.min_lr, config.warmup, config.betas) == (3e-4, 3e-5, 2000, (0.9, 0.95))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_bears_its_name_and_survives_json(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("tiny", "whole"),
    [
        ("gpt-tiny", "gpt-125m"),
        ("bert-tiny", "bert-base-phase1"),
        ("bert-tiny-phase2", "bert-base-phase2"),
        ("roberta-tiny", "roberta-base"),
        ("llama-tiny", "llama-7b"),
    ],
)
def test_a_tiny_recipe_keeps_every_choice_of_its_sibling_but_the_size(tiny: str, whole: str) -> None:
    small, large = recipe(tiny), recipe(whole)
    kept = ("betas", "eps", "weight_decay", "clip", "schedule", "strategy", "dtype", "dropout", "arithmetic")
    assert {key: getattr(small, key) for key in kept} == {key: getattr(large, key) for key in kept}
    assert MODELS[small.model].family is MODELS[large.model].family
    assert small.steps <= 600
    assert small.batch_size * small.seq_len <= 2048


def test_phase_2_goes_on_from_phase_1_with_longer_sequences_on_the_same_model() -> None:
    for later, earlier in CONTINUING.items():
        second, first = recipe(later), recipe(earlier)
        assert (second.model, second.tokenizer, second.vocab_size) == (first.model, first.tokenizer, first.vocab_size)
        positions = MODELS[second.model].positions
        assert positions is not None
        assert first.seq_len < second.seq_len <= positions


def test_options_count_more_than_the_recipe_and_a_recipe_more_than_the_defaults() -> None:
    config = TrainConfig.from_json(filled({"recipe": "gpt-125m", "weight_decay": 0.5}))
    expected = {**recipe("gpt-125m").to_json(), "weight_decay": 0.5}
    assert config.to_json() == expected
    assert filled({"lr": 1.0}) == {"lr": 1.0}


def test_what_depends_on_a_given_setting_keeps_its_proportion() -> None:
    found = filled({"recipe": "gpt-125m", "steps": 1000, "lr": 1e-3, "batch_size": 24})
    assert (found["warmup"], found["min_lr"], found["micro_batch"]) == (10, pytest.approx(1e-4), 8)
    TrainConfig.from_json(found)
    assert filled({"recipe": "gpt-125m", "steps": 1000, "warmup": 3})["warmup"] == 3


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_any_recipe_can_be_cut_short(name: str, steps: int) -> None:
    given = {"recipe": name, "steps": steps, **({"from_checkpoint": "somewhere"} if name in CONTINUING else {})}
    assert TrainConfig.from_json(filled(given)).steps == steps


def test_an_unknown_recipe_and_a_phase_without_its_first_are_refused() -> None:
    with pytest.raises(UserError, match=r"recipe must be one of gpt-tiny, .*got 'gpt-3'"):
        filled({"recipe": "gpt-3"})
    with pytest.raises(UserError, match="recipe must be one of gpt-tiny"):
        TrainConfig(recipe="gpt-3")
    with pytest.raises(UserError, match="goes on from a checkpoint of bert-base-phase1; name it with --from"):
        filled({"recipe": "bert-base-phase2"})


def test_the_second_phase_takes_model_moments_and_text_and_has_its_own_schedule_and_length(
    text: Path, tmp_path: Path
) -> None:
    short = {"data": str(text), "eval_batches": 1, "device": "cpu", "threads": 1}
    first = TrainConfig.from_json(continued({"recipe": "bert-tiny", "steps": 3, "vocab_size": 270, **short}))
    train(first, tmp_path / "phase1")
    given = {"recipe": "bert-tiny-phase2", "from_checkpoint": str(tmp_path / "phase1"), "steps": 4}
    second = TrainConfig.from_json(continued({**given, **{name: short[name] for name in ("device", "threads")}}))
    whole = recipe("bert-tiny-phase2")
    own = ("lr", "min_lr", "schedule", "seq_len", "batch_size", "betas", "eps", "recipe", "model")
    assert {name: getattr(second, name) for name in own} == {name: getattr(whole, name) for name in own}
    assert (second.warmup, second.data, second.vocab_size) == (2, str(text), 270)
    run = train(second, tmp_path / "phase2")
    assert run["source"]["step"] == 3
    assert run["corpus"]["sha256"] == runfiles.read_run(tmp_path / "phase1")["corpus"]["sha256"]
    newest = checkpoints.latest(tmp_path / "phase2/checkpoints")
    assert newest is not None
    saved = checkpoints.read(newest, "")
    assert {float(entry["step"]) for entry in saved.optimizer["state"].values()} == {7.0}
    with pytest.raises(UserError, match=r"keeps its model.*--model bert-base"):
        continued({"recipe": "bert-base-phase2", "from_checkpoint": str(tmp_path / "phase1")})

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

import collage
from collage.train.config import TrainConfig, UserError, option, resumed


def test_settings_survive_json() -> None:
    config = TrainConfig(strategy="mixed", betas=(0.8, 0.95), micro_batch=4, data="somewhere")
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_unknown_setting_is_named_with_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"unknown settings: batch_sise; did you mean batch_size"):
        TrainConfig.from_json({"batch_sise": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "pluss"}, "strategy must be one of plain.*got 'pluss'"),
        ({"model": "gpt-2"}, "model must be one of gpt-tiny, gpt-1m.*got 'gpt-2'"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, got 'int8'"),
        ({"schedule": "step"}, "schedule must be one of cosine"),
        ({"backend": "abacus"}, "backend must be one of eager"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"seed": 2**63}, "seed must be less than"),
        ({"betas": 0.9}, r"betas must be two numbers"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": None}, "steps must be a whole number, got None"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": -1.0}, "lr must be >= 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"steps": 10, "warmup": 10}, r"warmup must be less than steps \(10\), got 10; lower"),
        ({"lr": 1e-4, "min_lr": 1e-3}, r"min_lr must be at most lr \(0.0001\)"),
        ({"batch_size": 6, "micro_batch": 4}, r"micro_batch must be a divisor of batch_size \(6\), got 4"),
        ({"vocab_size": 300}, "vocab_size must be 257 with the byte tokenizer, got 300; use tokenizer bpe"),
        ({"arithmetic": "working", "strategy": "plus"}, "with arithmetic working, got 'plus'"),
        ({"forward": "lo", "strategy": "fp8"}, "forward must be one of value, hi, fp8, got 'lo'"),
        ({"forward": "hi"}, "strategy must be one of fp8, .* with forward hi, got 'plus'"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_got_and_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_unset_warmup_and_min_lr_follow_steps_and_lr() -> None:
    config = TrainConfig(steps=6, lr=1e-5)
    assert (config.warmup_steps, config.final_lr) == (0, pytest.approx(5e-7))
    assert TrainConfig().warmup_steps == 20
    assert TrainConfig().final_lr == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("strategy", "dtype", "expected"),
    [
        ("plus", "bfloat16", torch.bfloat16),
        ("mixed", "float16", torch.float16),
        ("fp32", "bfloat16", torch.float32),
    ],
)
def test_the_strategy_fp32_alone_trains_a_float32_model(strategy: str, dtype: str, expected: torch.dtype) -> None:
    assert TrainConfig(strategy=strategy, dtype=dtype).model_dtype == expected


def test_every_setting_has_a_text_and_a_panel() -> None:
    for setting in fields(TrainConfig):
        assert len(setting.metadata["help"]) > 10
        assert setting.metadata["panel"]


def test_a_resumed_run_may_be_observed_and_executed_otherwise() -> None:
    stored = TrainConfig(steps=50)
    assert resumed(stored, {"log_every": 5, "threads": 1, "steps": 50}) == replace(stored, log_every=5, threads=1)


def test_contradicting_a_resumed_run_names_each_option() -> None:
    with pytest.raises(UserError, match=r"got --lr 0.1 \(the run has 0.001\); --batch-size 8 \(the run has 16\)"):
        resumed(TrainConfig(), {"lr": 0.1, "batch_size": 8, "log_every": 2})


def test_the_option_of_the_checkpoint_to_continue_from_is_from() -> None:
    assert option("from_checkpoint") == "--from"
    with pytest.raises(UserError, match=r"got --from a \(the run has None\)"):
        resumed(TrainConfig(), {"from_checkpoint": "a"})
    with pytest.raises(UserError, match=r"from_checkpoint must be a non-empty text, got ''"):
        TrainConfig(from_checkpoint="")


def test_a_resumed_run_may_grow_under_a_constant_learning_rate_only() -> None:
    assert resumed(TrainConfig(schedule="constant"), {"steps": 400}).steps == 400
    with pytest.raises(UserError, match="--steps 400"):
        resumed(TrainConfig(schedule="cosine"), {"steps": 400})
    with pytest.raises(UserError, match="--steps 200"):
        resumed(TrainConfig(schedule="constant"), {"steps": 200})


def test_a_run_that_grows_keeps_the_warm_up_it_began_with() -> None:
    stored = TrainConfig(schedule="constant", steps=300)
    assert resumed(stored, {"steps": 3000}).warmup_steps == 20


def test_what_an_unset_setting_stood_for_does_not_contradict_it() -> None:
    assert resumed(TrainConfig(), {"warmup": 20, "min_lr": 5e-5}) == TrainConfig()
    with pytest.raises(UserError, match="--warmup 21"):
        resumed(TrainConfig(), {"warmup": 21})


def test_working_arithmetic_has_the_eager_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: collage.Backend(name, True) for name in ("eager", "native")}
    monkeypatch.setattr(collage, "backends", lambda: known)
    assert TrainConfig(strategy="plain", arithmetic="working", backend="eager").backend == "eager"
    with pytest.raises(UserError, match="backend must be eager with arithmetic working, got 'native'; leave it unset"):
        TrainConfig(strategy="plain", arithmetic="working", backend="native")


def test_a_resumed_run_that_grew_is_resumed_again_with_the_settings_in_full() -> None:
    stored = TrainConfig(schedule="constant", steps=300)
    grown = resumed(stored, {**stored.to_json(), "steps": 600})
    assert (grown.steps, grown.warmup_steps) == (600, 20)
    assert resumed(stored, grown.to_json()) == resumed(grown, grown.to_json()) == grown

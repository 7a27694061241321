"""The Trainer of transformers, with collage's AdamW and the audit in its logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import collage
from comparing import bits

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=16)
    return collage.to_low_precision(transformers.GPT2LMHeadModel(config))


def data() -> list[dict[str, Any]]:
    ids = torch.randint(0, 64, (40, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: Path, *, strategy: str = "plus", **arguments: Any) -> Any:
    from collage.integrations.huggingface import optimizer

    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 4,
        "logging_steps": 100,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.Trainer(
        model=model(),
        args=transformers.TrainingArguments(**settings | arguments),
        train_dataset=data(),
        optimizer_cls_and_kwargs=optimizer(strategy, lr=1e-3, weight_decay=0.1),
    )


def held(made: Any) -> list[torch.Tensor]:
    """Parameters and the whole of their states."""
    optimizer = made.optimizer.optimizer
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param] for param in params]
    return [*params, *(state[name] for state in states for name in sorted(state))]


def test_a_resumed_training_ends_with_the_bits_of_one_that_never_stopped_and_its_logs_hold_the_audit(
    tmp_path: Path,
) -> None:
    from collage.integrations.huggingface import audit_trainer

    whole = trainer(tmp_path / "whole")
    callback = audit_trainer(whole, every=3, loggers=[tmp_path / "audit.jsonl"], modules=True)
    whole.train()
    assert callback.audit.steps == [3, 6]
    logged = {entry["step"]: entry for entry in whole.state.log_history if "edq_ratio" in entry}
    assert sorted(logged) == [3, 6]
    assert all(entry["edq_ratio"] == pytest.approx(1.0, abs=0.02) for entry in logged.values())
    assert "transformer.h.0.attn.c_attn/lost_fraction" in logged[6]
    lines = (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6]

    resumed = trainer(tmp_path / "resumed")
    audited = audit_trainer(resumed, every=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert audited.audit.steps == [6]
    assert resumed.state.global_step == 8
    for one, other in zip(held(whole), held(resumed), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(bits(one), bits(other))


def test_the_trainers_own_optimizer_is_audited_and_its_tensorboard_has_the_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from collage.integrations.huggingface import audit_trainer

    made = trainer(tmp_path, report_to=["tensorboard"])
    made.optimizer_cls_and_kwargs = None
    callback = audit_trainer(made, every=4)
    made.train()
    total = callback.audit.report()["total"]
    assert total["replayed"] is True
    assert total["edq_ratio"] is not None
    [folder] = {path.parent for path in tmp_path.rglob("events.out.*")}
    events = accumulator.EventAccumulator(str(folder)).Reload()
    name = next(tag for tag in events.Tags()["scalars"] if tag.endswith("lost_fraction"))
    assert [event.step for event in events.Scalars(name)] == [4, 8]


def test_the_callback_given_by_argument_writes_the_history(tmp_path: Path) -> None:
    from collage.integrations.huggingface import AuditCallback

    made = trainer(tmp_path, max_steps=2)
    made.add_callback(AuditCallback(every=2))
    made.train()
    assert [entry["step"] for entry in made.state.log_history if "edq_ratio" in entry] == [2]

"""Fine-tuning whole models on small tasks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import collage
from collage import cli
from collage.train import checkpoints, runfiles
from collage.train.classification import byte_tokenizer, prepare, read_pretrained
from collage.train.config import TrainConfig, UserError
from collage.train.finetune import settings
from collage.train.loop import train
from collage.train.tokens import pack_bytes

GOOD, BAD = ["float", "carry", "sum"], ["ulp", "split", "round"]


def sst2(folder: Path, train_rows: int = 48, dev_rows: int = 12) -> Path:
    """A task that a tiny model can learn: which of two sets a sentence's words are from."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, rows in (("train", train_rows), ("dev", dev_rows)):
        lines = [f"{' '.join(draw.choice((BAD, GOOD)[n % 2], 3 + n % 4))}\t{n % 2}" for n in range(rows)]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def stsb(folder: Path) -> Path:
    folder.mkdir()
    for name, rows in (("train", 32), ("dev", 9)):
        lines = [f"{GOOD[n % 3]}\t{(GOOD + BAD)[n % 6]}\t{n % 6 / 1.2:.2f}" for n in range(rows)]
        (folder / f"{name}.tsv").write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines) + "\n")
    return folder


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"model": "gpt-tiny"},
    "bert": {"model": "bert-tiny", "tokenizer": "wordpiece", "vocab_size": 270},
    "roberta": {"model": "roberta-tiny", "tokenizer": "bpe", "vocab_size": 270},
}


@pytest.fixture
def source(request: pytest.FixtureRequest, tiny: TrainConfig, tmp_path: Path) -> Path:
    """A run to fine-tune, of the family that a test names (BERT)."""
    own = FAMILIES[getattr(request, "param", "bert")]
    train(replace(tiny, steps=2, warmup=0, checkpoint_every=0, seq_len=24, **own), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def given(source: Path, tmp_path: Path) -> dict[str, Any]:
    data = sst2(tmp_path / "sst2")
    options = {"seq_len": 16, "lr": 3e-3, "batch_size": 8, "device": "cpu", "threads": 1, "log_every": 1}
    return {"task": "sst2", "data": str(data), "pretrained": str(source), **options}


def whole(given: dict[str, Any], epochs: float | None = None) -> TrainConfig:
    return TrainConfig.from_json(settings(given, epochs))


# ---- settings ----


def test_unset_settings_are_berts_for_glue(given: dict[str, Any]) -> None:
    config = whole({name: given[name] for name in ("task", "data", "pretrained")})
    assert (config.batch_size, config.lr, config.schedule, config.min_lr) == (32, 2e-5, "linear", 0.0)
    assert (config.steps, config.warmup, config.eval_every) == (5, 0, 2)  # 3 epochs of 48 examples in batches of 32
    assert config.model == "bert"
    assert whole(given, epochs=0.5).steps == 3
    assert whole({**given, "steps": 7}).steps == 7


def test_settings_that_make_no_fine_tuning_are_refused(given: dict[str, Any]) -> None:
    for change, epochs, message in (
        ({"task": "sst3"}, None, "task must be one of cola, .*classification, got 'sst3'"),
        ({"pretrained": "/nowhere"}, None, "--from must be a folder that `collage train` wrote"),
        ({"steps": 3}, 1.0, "--epochs and --steps both say how long"),
        ({}, 0.0, "epochs must be > 0"),
    ):
        with pytest.raises(UserError, match=message):
            settings({**given, **change}, epochs)


# ---- the model ----


def test_the_weights_are_all_that_the_strategy_kept(source: Path) -> None:
    found = read_pretrained(source)
    newest = checkpoints.latest(source / "checkpoints")
    assert newest is not None
    saved = checkpoints.read(newest, "")
    keys = [name for group in saved.optimizer["param_groups"] for name in group["param_names"]]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    low = saved.optimizer["state"][keys.index(name)]["param_lo"]
    assert found.weights is not None
    assert low.any()
    assert torch.equal(found.weights[name], saved.weights[name].float() + low.float())
    model: Any = found.model(2, 0, "eager", None)
    assert torch.equal(model.get_parameter(name), found.weights[name])
    assert model.training
    assert model.dtype == torch.float32


def test_the_head_is_a_function_of_the_seed(source: Path) -> None:
    found = read_pretrained(source)
    heads = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        heads.append(found.model(3, seed, "eager", None).get_parameter("classifier.weight"))
    assert heads[0].shape == (3, 96)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_checkpoint_of_transformers_is_fine_tuned(given: dict[str, Any], source: Path, tmp_path: Path) -> None:
    own = read_pretrained(source)
    own.model(2, 0, "eager", None).save_pretrained(tmp_path / "published")
    with pytest.raises(UserError, match=r"has the files of neither \(config.json, and one of tokenizer.json"):
        settings({**given, "pretrained": str(tmp_path / "published")})
    own.tokenizer.save_pretrained(tmp_path / "published")
    run = train(whole({**given, "pretrained": str(tmp_path / "published"), "steps": 1}), tmp_path / "run")
    assert run["status"] == "finished"
    assert 0.0 <= run["final"]["metrics"]["accuracy"] <= 1.0


def test_the_byte_tokenizer_of_transformers_has_the_numbers_of_ours() -> None:
    text = "Über 3 <|endofdocument|> \n\t漢"
    made = byte_tokenizer()
    made.encode_special_tokens = True  # pyright: ignore[reportAttributeAccessIssue]
    assert made.encode(text).ids == pack_bytes([text])[:-1].tolist()


PAIRS = {
    "gpt": "a t<|endofdocument|>c",
    "bert": "[CLS] a t [SEP] c [SEP]",
    "roberta": "<s>a t</s></s>c</s>",
}


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_a_pair_is_joined_as_its_family_does(source: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = read_pretrained(source).tokenizer
    family = request.node.callspec.params["source"]
    both = tokenizer("a t", "c")
    assert tokenizer.decode(both["input_ids"]) == PAIRS[family]
    assert ("token_type_ids" in both) == (family == "bert")


# ---- whole runs ----


@pytest.mark.parametrize("source", FAMILIES, indirect=True)
def test_a_model_learns_a_task_from_files_in_glues_format(given: dict[str, Any], tmp_path: Path) -> None:
    run = train(whole({**given, "lr": 1e-2}, epochs=6), tmp_path / "run")
    assert run["final"]["metrics"]["accuracy"] >= 0.9
    assert run["final"]["perplexity"] is None
    assert run["objective"]["task"] == "sst2"
    assert run["objective"]["labels"] == ["0", "1"]
    records = runfiles.read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records if "metrics" in r] == list(range(6, 37, 6))
    assert all(r["edq_ratio"] == pytest.approx(1.0, abs=0.05) for r in records[:-1] if "edq_ratio" in r)


def test_scores_are_predicted_and_correlated(given: dict[str, Any], tmp_path: Path) -> None:
    data = stsb(tmp_path / "stsb")
    options = {"task": "stsb", "data": str(data), "strategy": "fp32"}
    run = train(whole({**given, **options}, epochs=2), tmp_path / "run")
    assert run["objective"]["name"] == "regression"
    assert set(run["final"]["metrics"]) == {"pearson", "spearman"}
    config = TrainConfig.from_json(run["config"])
    tuning = prepare(config)
    newest = checkpoints.latest(tmp_path / "run/checkpoints")
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(newest).eval()
    batch = tuning.objective.validation(slice(None))
    with torch.no_grad():
        predicted = model(**batch.inputs).logits.float().squeeze(-1).numpy()
    labels = batch.labels.numpy()
    assert run["final"]["metrics"]["pearson"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1], rel=1e-3)
    assert run["final"]["validation_loss"] == pytest.approx(((predicted - labels) ** 2).mean(), rel=1e-4)


def test_batches_are_padded_to_their_longest_and_tokens_counted_without_padding(given: dict[str, Any]) -> None:
    tuning = prepare(whole(given))
    seen = 0
    for step in (1, 2, 3):
        batch = tuning.objective.batch(step, 0, slice(None))
        real = batch.inputs["attention_mask"].sum(1)
        assert batch.inputs["input_ids"].shape[1] == real.max()
        seen += int(real.sum())
        assert tuning.objective.tokens(step, 0) == seen
    again = prepare(whole(given)).objective.batch(3, 0, slice(None))
    assert torch.equal(again.inputs["input_ids"], batch.inputs["input_ids"])
    assert tuning.objective.sha256(3, 0) != tuning.objective.sha256(3, 1)


def test_a_resumed_run_has_every_bit_of_an_uninterrupted_one(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(whole(given, epochs=1), checkpoint_every=2)
    train(config, tmp_path / "whole")
    real = collage.AdamW.step

    def failing(self: collage.AdamW, closure: Any = None) -> Any:
        if next(iter(self.state.values()), {}).get("step", torch.tensor(0.0)).item() == 3:
            raise OSError("power cut")
        return real(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(collage.AdamW, "step", failing)
        with pytest.raises(OSError, match="power cut"):
            train(config, tmp_path / "cut")
    train(runfiles.resume_config(tmp_path / "cut", {}), tmp_path / "cut", resume=True)
    records = [runfiles.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    for each in records:
        for record in each:
            del record["tokens_per_s"]
    assert records[0] == records[1]


# ---- the command ----


def test_the_command_fine_tunes_and_compares_strategies(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = given["pretrained"]
    base = ["finetune", "--task", "sst2", "--data", given["data"], "--from", source, "--device", "cpu"]
    base += ["--threads", "1", "--lr", "1e-3", "--batch-size", "24", "--seq-len", "16", "--epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*base, "--out", str(tmp_path / "one"), "--json", str(tmp_path / "one.json")])
    assert ended.value.code == 0
    run = json.loads((tmp_path / "one.json").read_text())
    assert f"accuracy {run['final']['metrics']['accuracy']:.4f}" in capsys.readouterr().out

    several = [*base, "--strategies", "plain,mixed", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path / "several")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*several, "--json", str(tmp_path / "several.json")])
    assert ended.value.code == 0
    result = json.loads((tmp_path / "several.json").read_text())
    assert result == json.loads((tmp_path / "several/compare.json").read_text())
    assert [(row["strategy"], row["seeds"]) for row in result["strategies"]] == [("plain", 2), ("mixed", 2)]
    accuracy = result["strategies"][0]["metrics"]["accuracy"]
    assert accuracy["mean"] == pytest.approx(sum(accuracy["values"]) / 2)
    assert math.isfinite(accuracy["spread"])
    hashes = {
        seed: {
            json.loads((tmp_path / f"several/{s}-seed{seed}/run.json").read_text())["init_sha256"]
            for s in ("plain", "mixed")
        }
        for seed in (0, 1)
    }
    assert all(len(found) == 1 for found in hashes.values())
    assert "accuracy" in capsys.readouterr().out
    page, text = ((tmp_path / f"several/report.{kind}").read_text() for kind in ("html", "md"))
    shown = f"{accuracy['mean']:.4f} ± {accuracy['spread']:.4f}"
    assert f"| plain | {shown} |" in text
    assert shown in page
    assert "| strategy | accuracy | validation loss |" in text

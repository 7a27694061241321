"""Runs that continue from another run's checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import collage
from collage.train import checkpoints, continuation, loop, runfiles, runsetup
from collage.train.checkpoints import CheckpointError
from collage.train.config import EXECUTING, OBSERVING, TrainConfig, UserError
from collage.train.continuation import continued, continued_text, find, order_seed, read, start
from collage.train.data import Windows, prepare_corpus
from collage.train.loop import train
from collage.train.models import build_model, parameter_groups
from collage.train.schedule import learning_rate
from comparing import CASES

MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "source"


@pytest.fixture
def source(tiny: TrainConfig, text: Path, tmp_path: Path, kept: Path) -> Path:
    """A finished fp32 run of eight steps, with checkpoints of steps 6 and 8; trained once, and copied for each test."""
    if not kept.exists():
        settings = {"seed": 3, "lr": 2e-3, "betas": (0.8, 0.95), "eps": 1e-7, "clip": 0.5, "weight_decay": 0.05}
        train(replace(tiny, strategy="fp32", **settings), kept)
        (kept / "text").write_text(str(text))
    out = shutil.copytree(kept, tmp_path / "source")
    for file in out.rglob("*.json"):
        file.write_text(file.read_text().replace((kept / "text").read_text(), str(text)))
    return out


def branch(source: Path, **given: Any) -> TrainConfig:
    small = {"steps": 6, "device": "cpu", "threads": 1, "checkpoint_every": 3, "audit_every": 2, "eval_every": 0}
    return TrainConfig.from_json(continued({"from_checkpoint": str(source), **small, **given}))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def parts(config: TrainConfig, vocab_size: int) -> tuple[Any, collage.AdamW]:
    """A model and an optimizer as a run of `config` has them before it starts."""
    model = build_model(config.model, vocab_size=vocab_size, seq_len=config.seq_len, seed=77)
    if config.model_dtype != torch.float32:
        collage.to_low_precision(model, config.model_dtype)
    groups = parameter_groups(model, config.weight_decay)
    return model, collage.AdamW(groups, strategy=config.strategy, lr=config.lr, betas=config.betas)


def started(config: TrainConfig) -> tuple[Any, collage.AdamW, continuation.Start]:
    model, optimizer = parts(config, 257)
    return model, optimizer, start(config, model, optimizer)


def saved_in(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and optimizer state, by "name of the parameter.name of the state", of a run's newest checkpoint."""
    path = find(run)
    weights, state = (load_file(path / f"{name}.safetensors") for name in ("model", "optimizer"))
    groups = json.loads((path / "optimizer.json").read_text())["param_groups"]
    names = [name for group in groups for name in group["param_names"]]
    split = ((key.partition("."), tensor) for key, tensor in state.items())
    return weights, {f"{names[int(index)]}:{kind}": tensor for (index, _, kind), tensor in split}


def batches(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What every later run trains on, batch by batch."""
    seen, taken = [], Windows.batch

    def batch(self: Windows, *arguments: int) -> Any:
        found = taken(self, *arguments)
        seen.append(found.tobytes())
        return found

    monkeypatch.setattr(Windows, "batch", batch)
    return seen


def records(out: Path) -> list[dict[str, Any]]:
    found = runfiles.read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "tokens_per_s"} for record in found]


def last_bytes(out: Path) -> dict[str, bytes]:
    path = find(out)
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    def watched(config: TrainConfig, number: int) -> float:
        if number == step:
            action()
        return learning_rate(config, number)

    monkeypatch.setattr(loop, "learning_rate", watched)


def crash() -> None:
    raise OSError("the disk is gone")


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# ---- finding a checkpoint --------------------------------------------------------------------------------------


def test_a_checkpoint_is_named_by_its_folder_or_by_its_run_whose_newest_whole_one_it_is(source: Path) -> None:
    folder = source / "checkpoints"
    assert find(folder / "step-000006") == (folder / "step-000006").resolve()
    assert find(source) == (folder / "step-000008").resolve()
    (folder / "step-000008" / "optimizer.json").unlink()
    assert find(source) == (folder / "step-000006").resolve()


def test_what_is_no_checkpoint_is_refused_with_what_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "compared" / "plus-seed0").mkdir(parents=True)
    (tmp_path / "compared" / "compare.json").write_text("{}")
    (tmp_path / "compared" / "plus-seed0" / "run.json").write_text("{}")
    (source / "checkpoints/step-000006/trainer.json").unlink()
    cases = {
        tmp_path / "nowhere": "which doesn't exist",
        tmp_path / "file": "which is a file",
        tmp_path / "empty": "which is neither",
        tmp_path / "compared": "a comparison; name one of its runs: plus-seed0",
        tmp_path / "compared" / "plus-seed0": "a run without a whole checkpoint; go on with it",
        source / "checkpoints/step-000006": r"in which trainer.json is missing; take another checkpoint",
    }
    for path, said in cases.items():
        with pytest.raises(UserError, match=rf"--from must be a folder that `collage train` wrote.*got {path}, {said}"):
            continued({"from_checkpoint": str(path)})


@pytest.mark.parametrize("name", [*checkpoints.FILES, "config.json"])
def test_a_damaged_file_is_named_and_nothing_is_to_be_removed(source: Path, name: str) -> None:
    file = find(source) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"{name} can't be read.*take another checkpoint$"):
        continued({"from_checkpoint": str(source)})


@pytest.mark.parametrize("change", [{"config": {"learning_rate": 1}}, {"config": None}, {"config": {"model": "x"}}])
def test_settings_of_another_version_are_refused(source: Path, change: dict[str, Any]) -> None:
    file = find(source) / "trainer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match="holds no checkpoint that this version can use"):
        continued({"from_checkpoint": str(source)})


# ---- settings --------------------------------------------------------------------------------------------------


def test_settings_without_a_checkpoint_stay_as_they_are() -> None:
    assert continued({"lr": 0.5}) == {"lr": 0.5}
    assert continued({"from_checkpoint": None}) == {"from_checkpoint": None}
    with pytest.raises(UserError, match="did you mean from_checkpoint"):
        continued({"from_checkpoin": "x"})


def test_the_defaults_are_those_of_a_continuation_at_a_low_learning_rate(source: Path, tiny: TrainConfig) -> None:
    config = TrainConfig.from_json(continued({"from_checkpoint": str(source)}))
    assert config.from_checkpoint == str(find(source))
    assert (config.steps, config.schedule, config.warmup_steps) == (250, "cosine", 0)
    assert (config.lr, config.final_lr) == (pytest.approx(2e-4), pytest.approx(2e-5))
    assert (config.betas, config.eps, config.weight_decay, config.clip) == ((0.8, 0.95), 1e-7, 0.05, 0.5)
    assert (config.model, config.data, config.batch_size, config.seq_len) == ("tiny", tiny.data, 4, 16)
    for name in (*OBSERVING, *EXECUTING, "strategy", "seed"):
        assert getattr(config, name) == getattr(TrainConfig(), name), name


def test_what_is_given_counts_and_the_last_learning_rate_follows_the_given_one(source: Path) -> None:
    given = {"lr": 1e-6, "steps": 5, "betas": (0.9, 0.999), "seq_len": 8, "batch_size": 2, "dtype": "float16"}
    config = branch(source, **given)
    assert {name: getattr(config, name) for name in given} == given
    assert config.final_lr == pytest.approx(1e-7)
    assert branch(source, lr=1e-6, min_lr=5e-7).final_lr == 5e-7
    assert branch(source, schedule="constant", warmup=2).warmup_steps == 2
    with pytest.raises(UserError, match="lr must be a finite number, got 'much'"):
        branch(source, lr="much")


def test_a_bound_on_the_sources_text_is_none_on_another(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, corpus_bytes=4000, steps=2, warmup=0), tmp_path / "source")
    assert branch(tmp_path / "source").corpus_bytes == 4000
    assert branch(tmp_path / "source", data="elsewhere").corpus_bytes is None
    assert branch(tmp_path / "source", data="elsewhere", corpus_bytes=7).corpus_bytes == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "gpt-1m"}, r"--model gpt-1m \(the checkpoint has tiny\)"),
        ({"vocab_size": 300}, r"--vocab-size 300 \(the checkpoint has 257\)"),
        ({"tokenizer": "bpe"}, r"--tokenizer bpe \(the checkpoint has bytes\)"),
        ({"model": "gpt-1m", "tokenizer": "bpe"}, r"--model gpt-1m .*; --tokenizer bpe .*; leave the options out"),
    ],
)
def test_another_model_or_vocabulary_than_the_checkpoints_is_refused(
    source: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=rf"keeps its model and its vocabulary, got .*{said}"):
        continued({"from_checkpoint": str(source), **given})
    config = replace(branch(source), **(given if "vocab_size" not in given else {"model": "gpt-tiny"}))
    with pytest.raises(UserError, match="keeps its model and its vocabulary"):
        start(config, *parts(branch(source), 257))


def test_the_checkpoints_own_model_and_vocabulary_may_be_named(source: Path) -> None:
    assert branch(source, model="tiny", tokenizer="bytes", vocab_size=257).vocab_size == 257


# ---- the text --------------------------------------------------------------------------------------------------


@pytest.fixture
def bpe(tiny: TrainConfig, tmp_path: Path) -> Path:
    """A run of two steps with a bpe tokenizer."""
    train(replace(tiny, tokenizer="bpe", vocab_size=270, steps=2, warmup=0), tmp_path / "bpe")
    return tmp_path / "bpe"


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    (tmp_path / "other").mkdir()
    for index in range(30):
        (tmp_path / "other" / f"{index}.txt").write_text(f"sum and split number {index}, ulp by ulp " * 20)
    return tmp_path / "other"


def test_the_text_is_the_source_runs_token_for_token(bpe: Path, tiny: TrainConfig) -> None:
    text = continued_text(branch(bpe))
    original = prepare_corpus(replace(tiny, tokenizer="bpe", vocab_size=270))
    assert text.info == original.info
    assert np.array_equal(text.train, original.train)


def test_another_text_has_the_checkpoints_tokenizer_and_not_one_of_its_own(bpe: Path, other_text: Path) -> None:
    config = branch(bpe, data=str(other_text))
    text, own = continued_text(config), prepare_corpus(config)
    assert text.tokenizer_json == (bpe / "tokenizer.json").read_text() != own.tokenizer_json
    assert (text.info.name, text.info.vocab_size) == ("other", 270)
    run = train(config, bpe.parent / "run")
    assert run["corpus"]["sha256"] == own.info.sha256
    assert (bpe.parent / "run/tokenizer.json").read_text() == text.tokenizer_json


def test_a_tokenizer_that_is_not_there_or_does_not_fit_is_refused(bpe: Path) -> None:
    config, file = branch(bpe), bpe / "tokenizer.json"
    kept = file.read_text()
    file.unlink()
    with pytest.raises(UserError, match=r"bpe tokenizer must stand in .*step-000002 or .*bpe as tokenizer.json, got"):
        continued_text(config)
    (find(bpe) / "tokenizer.json").write_text(kept)
    assert continued_text(config).info.vocab_size == 270
    file = find(bpe) / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="must be a tokenizer that `collage train`"):
        continued_text(config)
    file.write_text(str(prepare_corpus(replace(config, vocab_size=280)).tokenizer_json))
    with pytest.raises(UserError, match=r"must have the 270 tokens of the model in .*, got 280"):
        continued_text(config)


def test_a_source_text_that_changed_is_refused_and_another_one_may_be_named(
    source: Path, text: Path, other_text: Path
) -> None:
    (text / "00.txt").write_text("other words")
    with pytest.raises(UserError, match=r"must be as it was for the source run, sha256 .*or name another .* --data"):
        continued_text(branch(source))
    assert continued_text(branch(source, data=str(other_text))).info.name == "other"


def test_a_checkpoint_by_itself_needs_its_text_named(source: Path, tmp_path: Path, other_text: Path) -> None:
    alone = shutil.copytree(find(source), tmp_path / "alone")
    with pytest.raises(UserError, match=r"known by the hash in its run.json, got none in .*alone; .* with --data"):
        continued_text(branch(alone))
    assert train(branch(alone, data=str(other_text)), tmp_path / "run")["source"]["run"] is None


# ---- the conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [*((name, str(dtype).removeprefix("torch.")) for name, dtype in CASES), ("fp32", "bfloat16"), ("fp16", "bfloat16")],
)
def test_every_strategy_takes_a_float32_checkpoint_as_exactly_as_it_says(
    source: Path, strategy: str, dtype: str
) -> None:
    weights, _ = saved_in(source)
    model, optimizer, begun = started(branch(source, strategy=strategy, dtype=dtype))
    worst = 0.0
    for name, p in model.named_parameters():
        full, wanted = optimizer.full_param(p, torch.float64), weights[name].double()
        worst = max(worst, float((full - wanted).abs().max() / (wanted.abs().max() or 1.0)))
        assert optimizer.state[p]["step"] == 8
    assert begun.conversion["param"] == pytest.approx(worst, rel=1e-6)
    assert set(begun.conversion) == {"param", *MOMENTS}
    assert (begun.source["step"], begun.source["strategy"], begun.source["dtype"]) == (8, "fp32", "float32")
    assert begun.source["lr"] == 2e-3
    assert (begun.source["run"], begun.source["seed"]) == ("fp32-seed3", 3)


@pytest.mark.parametrize("strategy", ["fp32", "mixed"])
def test_weights_and_moments_are_bit_for_bit_where_the_storage_can_hold_them(source: Path, strategy: str) -> None:
    weights, state = saved_in(source)
    model, optimizer, begun = started(branch(source, strategy=strategy))
    assert begun.conversion == dict.fromkeys(("param", *MOMENTS), 0.0)
    for name, p in model.named_parameters():
        assert raw(optimizer.full_param(p)) == raw(weights[name])
        for moment in MOMENTS:
            assert raw(optimizer.state[p][moment]) == raw(state[f"{name}:{moment}"])
            assert state[f"{name}:{moment}"].any()


@pytest.mark.parametrize("strategy", collage.strategies())
def test_a_checkpoint_of_every_strategy_goes_to_float32_as_the_values_it_held(
    tiny: TrainConfig, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, bytes] = {}

    def watch(*arguments: Any) -> Path:
        model, optimizer = arguments[3:5]
        held.update({name: raw(optimizer.full_param(p)) for name, p in model.named_parameters()})
        return real(*arguments)

    real = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", watch)
    # Weights in tiles must be of some size.
    model_name = "gpt-1m" if collage.strategies()[strategy].param.borne else tiny.model
    train(replace(tiny, strategy=strategy, model=model_name, steps=2, warmup=0), tmp_path / "source")
    model, optimizer, begun = started(branch(tmp_path / "source", strategy="fp32"))
    assert {name: raw(p) for name, p in model.named_parameters()} == held
    assert begun.source["strategy"] == strategy
    assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


def test_the_optimizers_options_are_the_runs_own_and_not_the_checkpoints(source: Path) -> None:
    _, optimizer, _ = started(branch(source, strategy="plus", lr=1e-6, betas=(0.5, 0.75)))
    for group in optimizer.param_groups:
        assert (group["strategy"], group["lr"], group["betas"], group["arithmetic"]) == (
            "plus",
            1e-6,
            (0.5, 0.75),
            "fp32",
        )


def test_tied_weights_stay_one_tensor_with_one_state(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tied(name: str, **options: Any) -> Any:
        model = build_model(name, **options)
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return model

    monkeypatch.setattr(runsetup, "build_model", tied)
    train(replace(tiny, strategy="fp32"), tmp_path / "source")
    weights, _ = saved_in(tmp_path / "source")
    model = tied("tiny", vocab_size=257, seq_len=16, seed=5)
    ((second, first),) = checkpoints.tied_names(model).items()
    assert first in weights
    assert second not in weights
    config = branch(tmp_path / "source", strategy="mixed", lr=0.0)
    run = train(config, tmp_path / "run")
    assert run["conversion"]["param"] == 0.0
    _, state = saved_in(tmp_path / "run")
    assert raw(state[f"{first}:master_param"]) == raw(weights[first])
    collage.to_low_precision(model, torch.bfloat16)
    optimizer = collage.AdamW(parameter_groups(model, 0.1), strategy="mixed")
    start(config, model, optimizer)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert raw(optimizer.full_param(model.get_output_embeddings().weight)) == raw(weights[first])


def test_tensors_that_are_no_such_models_are_refused(source: Path) -> None:
    file = find(source) / "optimizer.json"
    groups = json.loads(file.read_text())["param_groups"]
    file.write_text(json.dumps({"param_groups": groups[::-1]}))
    with pytest.raises(CheckpointError, match=r"doesn't fit the model tiny: .*parameters differ in their order; take"):
        started(branch(source))
    file.write_text(json.dumps({"param_groups": [{**group, "strategy": "lost"} for group in groups]}))
    with pytest.raises(CheckpointError, match=r"no strategy is called 'lost'"):
        started(branch(source))
    file.write_text(json.dumps({"param_groups": groups}))
    with pytest.raises(CheckpointError, match=r"doesn't fit the model tiny: .*size mismatch"):
        start(branch(source), *parts(branch(source), 300))
    weights = find(source) / "model.safetensors"
    tensors = load_file(weights)
    del tensors["gpt_neox.final_layer_norm.bias"]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"has no 'gpt_neox.final_layer_norm.bias'"):
        started(branch(source))


def test_a_state_that_lacks_what_its_strategy_keeps_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, strategy="mixed", steps=2, warmup=0), tmp_path / "source")
    file = find(tmp_path / "source") / "optimizer.safetensors"
    state = load_file(file)
    save_file({name: tensor for name, tensor in state.items() if not name.endswith("master_param")}, file)
    with pytest.raises(CheckpointError, match="doesn't fit the model tiny: there is no 'master_param'; take another"):
        started(branch(tmp_path / "source"))


# ---- what runs of a seed have in common ------------------------------------------------------------------------


def test_the_hash_of_the_start_is_one_for_all_strategies_and_seeds_and_follows_weights_moments_and_steps(
    source: Path,
) -> None:
    file = find(source) / "optimizer.safetensors"
    hashes = {
        started(branch(source, strategy=name, seed=seed))[2].sha256 for seed, name in enumerate(("plain", "plus"))
    }
    assert len(hashes) == 1
    original = load_file(file)
    for name in ("0.exp_avg", "3.exp_avg_sq", "12.step"):
        changed = {**original, name: original[name] + 1.0}
        save_file(changed, file)
        hashes.add(started(branch(source))[2].sha256)
    save_file(original, file)
    weights = load_file(find(source) / "model.safetensors")
    weights["gpt_neox.final_layer_norm.bias"][0] += 1e-3
    save_file(weights, find(source) / "model.safetensors")
    hashes.add(started(branch(source))[2].sha256)
    assert len(hashes) == 5


def test_batches_follow_from_seed_and_checkpoint_and_are_never_in_the_source_runs_order(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = batches(monkeypatch)
    own = train(branch(source, strategy="plain", seed=3, steps=8), tmp_path / "plain")
    ours, count = list(seen), len(seen)
    train(branch(source, strategy="mixed", seed=3, steps=8), tmp_path / "mixed")
    assert seen[count:] == ours
    del seen[:]
    train(branch(source, strategy="plain", seed=4, steps=8), tmp_path / "seed4")
    assert not set(seen) & set(ours)
    # The source run's own batches, and those of a run that continues this one with the same seed.
    config = TrainConfig.from_json(runfiles.read_run(source)["config"])
    windows = Windows(prepare_corpus(config).train, config.seq_len, "train")
    assert not {windows.batch(step, 4, config.seed).tobytes() for step in range(1, 9)} & set(ours)
    del seen[:]
    again = train(branch(tmp_path / "plain", strategy="plain", seed=3, steps=8), tmp_path / "again")
    assert not set(seen) & set(ours)
    assert again["batches_sha256"] != own["batches_sha256"]
    assert own["batches_sha256"] == windows.sha256(8, 4, order_seed(own["init_sha256"], 3))


def test_the_order_seed_is_the_documented_one() -> None:
    # printf 'ab 1' | sha256sum
    assert order_seed("ab", 1) == int("32c9baccc3f715a1", 16) >> 1
    assert 0 <= order_seed("ab", 2**63 - 1) < 2**63


# ---- whole runs ------------------------------------------------------------------------------------------------


def test_a_run_starts_where_the_source_ended_and_counts_its_own_steps(source: Path, tmp_path: Path) -> None:
    config = branch(source, strategy="fp32", lr=0.0, audit_every=3)
    run = train(config, tmp_path / "run")
    weights, _ = saved_in(source)
    after, later = saved_in(tmp_path / "run")
    assert {name: raw(t) for name, t in after.items()} == {name: raw(t) for name, t in weights.items()}
    assert {float(t) for name, t in later.items() if name.endswith(":step")} == {8.0 + 6.0}
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 1, 2, 3, 4, 5, 6]
    ended = runfiles.read_run(source)["final"]["validation_loss"]
    assert found[0] == {"step": 0, "tokens": 0, "validation_loss": ended}
    assert [record["step"] for record in found if "edq_ratio" in record] == [3, 6]
    assert run["final"]["step"] == 6
    assert run["final"]["validation_loss"] == ended
    assert run["source"]["checkpoint"] == str(find(source)) == run["config"]["from_checkpoint"]
    assert run["conversion"] == {"param": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}


def test_bias_corrections_and_moments_go_on(source: Path, tmp_path: Path) -> None:
    weights, state = saved_in(source)
    train(branch(source, strategy="fp32", steps=1, lr=1e-3, schedule="constant", clip=0.0), tmp_path / "run")
    gradients: dict[str, torch.Tensor] = {}
    after, later = saved_in(tmp_path / "run")
    for name, before in weights.items():
        m, v = (later[f"{name}:{moment}"].double() for moment in MOMENTS)
        gradients[name] = (m - 0.8 * state[f"{name}:exp_avg"].double()) / 0.2
        expected_v = 0.95 * state[f"{name}:exp_avg_sq"].double() + 0.05 * gradients[name] ** 2
        assert torch.allclose(v, expected_v, rtol=1e-4, atol=1e-12)
        update = (m / (1 - 0.8**9)) / ((v / (1 - 0.95**9)).sqrt() + 1e-7)
        decay = 1e-3 * 0.05 if before.ndim >= 2 else 0.0
        expected = before.double() * (1 - decay) - 1e-3 * update
        assert torch.allclose(after[name].double(), expected, rtol=1e-5, atol=1e-7), name


def test_a_run_says_where_it_comes_from_and_how_exactly(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(branch(source, strategy="plus"), tmp_path / "run")
    shown = capsys.readouterr().out
    assert f"continues from step 8 of fp32-seed3 (fp32), {find(source)}; converted to plus: param " in shown
    assert "exp_avg_sq " in shown
    assert "step 0/6  validation loss" in shown
    train(branch(source, strategy="mixed"), tmp_path / "mixed")
    assert "converted to mixed: param exact, exp_avg exact, exp_avg_sq exact" in capsys.readouterr().out


def test_float16_goes_on_with_the_sources_loss_scale(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, strategy="mixed", dtype="float16"), tmp_path / "source")
    file = find(tmp_path / "source") / "trainer.json"
    trainer = json.loads(file.read_text())
    trainer["scaler"]["scale"] = 1024.0
    file.write_text(json.dumps(trainer))
    run = branch(tmp_path / "source", strategy="mixed", steps=2)
    train(run, tmp_path / "run")
    assert read(find(tmp_path / "run")).saved.trainer["scaler"]["scale"] == 1024.0
    train(replace(run, dtype="bfloat16"), tmp_path / "other")
    assert read(find(tmp_path / "other")).saved.trainer["scaler"] == {}


# ---- stopping and going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["plus", "stochastic"])
@pytest.mark.parametrize("stop", [ctrl_c, crash])
def test_a_resumed_continuation_has_every_bit_and_needs_its_source_no_more(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, stop: Callable[[], None]
) -> None:
    config, out = branch(bpe, strategy=strategy), tmp_path / "stopped"
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5, stop)
        if stop is ctrl_c:
            assert train(config, out)["status"] == "interrupted"
        else:
            with pytest.raises(OSError, match="disk is gone"):
                train(config, out)
    shutil.rmtree(bpe)
    run = train(runfiles.resume_config(out, config.to_json()), out, resume=True)
    assert run["status"] == "finished"
    assert last_bytes(out) == last_bytes(tmp_path / "whole")
    assert records(out) == records(tmp_path / "whole")
    for key in ("source", "conversion", "init_sha256", "batches_sha256"):
        assert run[key] == whole[key], key


def test_a_continuation_stopped_before_its_first_checkpoint_starts_from_the_source_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = branch(source, strategy="plus"), tmp_path / "run"
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 2, crash)
        with pytest.raises(OSError, match="disk is gone"):
            train(config, out)
    moved = find(source).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"--from must be .*step-000008, which doesn't exist"):
        train(config, out, resume=True)
    changed = load_file(moved / "optimizer.safetensors")
    moved.rename(source / "checkpoints/step-000008")
    file = source / "checkpoints/step-000008/optimizer.safetensors"
    kept = file.read_bytes()
    changed["0.exp_avg"] += 1.0
    save_file(changed, file)
    with pytest.raises(UserError, match="must have the values in the checkpoint it was started with"):
        train(config, out, resume=True)
    file.write_bytes(kept)
    train(config, out, resume=True)
    assert last_bytes(out) == last_bytes(tmp_path / "whole")
    assert records(out) == records(tmp_path / "whole")


def test_resuming_with_another_checkpoint_is_refused_and_the_same_may_be_named_by_its_run(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(branch(source / "checkpoints/step-000006"), out)
    for same in (source / "checkpoints/step-000006", source, out / "../source"):
        assert runfiles.resume_config(out, {"from_checkpoint": str(same)}).from_checkpoint == str(
            source.resolve() / "checkpoints/step-000006"
        )
    with pytest.raises(UserError, match=r"got --from .*step-000008 \(the run has .*step-000006\)"):
        runfiles.resume_config(out, {"from_checkpoint": str(source / "checkpoints/step-000008")})
    with pytest.raises(UserError, match=r"got --from .*source \(the run has None\)"):
        runfiles.resume_config(source, {"from_checkpoint": str(source)})

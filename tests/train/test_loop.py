"""Whole runs of a tiny model."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from collage.storage import TiledTensor
from collage.train import checkpoints, loop, runfiles, runsetup
from collage.train.config import RunFailed, TrainConfig, UserError
from collage.train.data import Windows, prepare_corpus
from collage.train.loop import train
from collage.train.objectives import Batch, Objective
from collage.train.schedule import learning_rate


def records(out: Path) -> list[dict[str, Any]]:
    """The records but for the one figure that is a measurement."""
    found = runfiles.read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "tokens_per_s"} for record in found]


def last_tensors(out: Path) -> dict[str, bytes]:
    path = checkpoints.latest(out / "checkpoints")
    assert path is not None
    files = [load_file(path / f"{name}.safetensors") for name in ("model", "optimizer")]
    return {
        f"{index}:{name}:{tensor.dtype}": tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for index, tensors in enumerate(files)
        for name, tensor in tensors.items()
    }


def last_scaler(out: Path) -> dict[str, Any]:
    path = checkpoints.latest(out / "checkpoints")
    assert path is not None
    return json.loads((path / "trainer.json").read_text())["scaler"]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Let `action` happen at the start of a step."""

    def watched(config: TrainConfig, number: int) -> float:
        if number == step:
            action()
        return learning_rate(config, number)

    monkeypatch.setattr(loop, "learning_rate", watched)


@contextmanager
def watching_steps(watch: Callable[[Optimizer], None]) -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, options: watch(optimizer))
    try:
        yield
    finally:
        handle.remove()


def crash() -> None:
    raise OSError("the disk is gone")


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# ---- the files of a run ----


def test_a_run_leaves_what_its_readers_expect(tiny: TrainConfig, tmp_path: Path) -> None:
    run = train(tiny, tmp_path / "run", command="collage train --x")
    assert run == json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["name"] == "plus-seed0"
    assert run["command"] == "collage train --x"
    assert TrainConfig.from_json(run["config"]) == tiny
    assert run["model"]["dtype"] == "bfloat16"
    assert run["bytes_per_param"] == 12.0
    assert run["threads"] == 1
    assert run["corpus"]["documents"] == 30
    counters = 12 * len(load_file(tmp_path / "run/checkpoints/step-000008/model.safetensors"))
    assert run["state_bytes"] == 8 * run["model"]["parameters"] + counters
    assert run["final"]["tokens"] == 8 * 4 * 16
    assert run["final"]["perplexity"] == pytest.approx(math.exp(run["final"]["validation_loss"]))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_steps_are_audited_evaluated_and_logged_when_due_and_at_the_end(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, log_every=5), tmp_path / "run")
    found = records(tmp_path / "run")
    assert [r["step"] for r in found] == [3, 4, 5, 6, 8]
    assert [r["step"] for r in found if "edq_ratio" in r] == [3, 6, 8]
    assert [r["step"] for r in found if "validation_loss" in r] == [4, 8]
    assert all(0.9 < r["edq_ratio"] < 1.1 for r in found if "edq_ratio" in r)
    audits = runfiles.read_metrics(tmp_path / "run" / runfiles.AUDIT_FILE)
    tensors = load_file(tmp_path / "run/checkpoints/step-000008/model.safetensors")
    assert [r["step"] for r in audits] == [3, 6, 8]
    assert [runfiles.HISTOGRAM in r for r in audits] == [False, False, True]
    assert sum(audits[-1][runfiles.HISTOGRAM]["elements"]) > 0
    assert all(set(r["modules"]) == {name.rpartition(".")[0] for name in tensors} for r in audits)


def test_zero_means_only_at_the_end(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, eval_every=0, audit_every=0, checkpoint_every=0), tmp_path / "run")
    found = records(tmp_path / "run")
    assert [r["step"] for r in found if "edq_ratio" in r] == [8]
    assert [r["step"] for r in found if "validation_loss" in r] == [8]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000008"]


def test_the_validation_loss_is_that_of_the_checkpoint_as_transformers_loads_it(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    from transformers import GPTNeoXForCausalLM

    run = train(tiny, tmp_path / "run")
    model = GPTNeoXForCausalLM.from_pretrained(tmp_path / "run/checkpoints/step-000008", dtype=torch.bfloat16)
    windows = Windows(prepare_corpus(tiny).validation, 16, "validation").spread(8)
    sequences = torch.from_numpy(windows)
    with torch.no_grad():
        logits = model(input_ids=sequences[:, :-1]).logits.float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
    assert run["final"]["validation_loss"] == pytest.approx(expected.item(), rel=2e-3)


def test_a_bpe_run_keeps_its_tokenizer(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, tokenizer="bpe", vocab_size=270)
    run = train(config, tmp_path / "run")
    assert run["corpus"]["vocab_size"] == 270
    assert (tmp_path / "run/tokenizer.json").read_text() == prepare_corpus(config).tokenizer_json


def test_a_prepared_corpus_gives_the_same_run(tiny: TrainConfig, tmp_path: Path) -> None:
    prepare_corpus(tiny).save(tmp_path / "corpus")
    train(tiny, tmp_path / "a")
    train(replace(tiny, data="/nowhere"), tmp_path / "b", corpus=tmp_path / "corpus")
    assert records(tmp_path / "a") == records(tmp_path / "b")


# ---- what strategies share, and the step ----


def test_every_strategy_starts_from_the_same_weights_and_sees_the_same_batches(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[bytes]] = {}
    taken, losses, runs = Windows.batch, {}, []

    for strategy in ("plain", "plus", "mixed", "fp32"):

        def batch(self: Windows, *arguments: int, name: str = strategy) -> Any:
            found = taken(self, *arguments)
            seen.setdefault(name, []).append(found.tobytes())
            return found

        monkeypatch.setattr(Windows, "batch", batch)
        runs.append(train(replace(tiny, strategy=strategy, steps=3), tmp_path / strategy))
        losses[strategy] = records(tmp_path / strategy)[0]["loss"]
    assert seen["plain"] == seen["plus"] == seen["mixed"] == seen["fp32"]
    assert len({run["init_sha256"] for run in runs}) == len({run["batches_sha256"] for run in runs}) == 1
    # Not equal: hi of hi + lo is the rounding of what the two hold, which at a tie isn't that of the fp32 weight.
    assert [losses[name] for name in seen] == pytest.approx([losses["fp32"]] * 4, rel=1e-3)


def test_each_step_has_the_schedules_learning_rate_in_both_groups(tiny: TrainConfig, tmp_path: Path) -> None:
    rates: list[list[float]] = []
    with watching_steps(lambda optimizer: rates.append([group["lr"] for group in optimizer.param_groups])):
        train(tiny, tmp_path / "run")
    expected = [learning_rate(tiny, step) for step in range(1, 9)]
    assert rates == [[lr, lr] for lr in expected]
    assert [r["lr"] for r in records(tmp_path / "run")] == expected


def gradients(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def exact_norm(grads: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


def test_the_recorded_norm_is_the_exact_one_and_zero_clips_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    norms: list[float] = []
    with watching_steps(lambda optimizer: norms.append(exact_norm(gradients(optimizer)))):
        train(replace(tiny, clip=0.0), tmp_path / "run")
    assert [r["grad_norm"] for r in records(tmp_path / "run")] == pytest.approx(norms, rel=1e-5)


def test_gradients_are_clipped_to_the_norm(tiny: TrainConfig, tmp_path: Path) -> None:
    norms: list[float] = []
    with watching_steps(lambda optimizer: norms.append(exact_norm(gradients(optimizer)))):
        train(replace(tiny, clip=0.01), tmp_path / "run")
    assert norms == pytest.approx([0.01] * 8, rel=5e-3)
    assert all(r["grad_norm"] > 0.1 for r in records(tmp_path / "run"))


def test_micro_batches_add_up_to_the_whole_batch(tiny: TrainConfig, tmp_path: Path) -> None:
    for micro in (1, 2, 4):
        train(replace(tiny, strategy="fp32", micro_batch=micro), tmp_path / str(micro))
    whole = records(tmp_path / "4")
    for micro in (1, 2):
        for key in ("loss", "grad_norm"):
            found = [r[key] for r in records(tmp_path / str(micro))]
            assert found == pytest.approx([r[key] for r in whole], rel=1e-4)


@pytest.mark.parametrize(("grad_dtype", "expected"), [("model", torch.bfloat16), ("float32", torch.float32)])
def test_gradients_are_kept_in_the_chosen_dtype(
    tiny: TrainConfig, tmp_path: Path, grad_dtype: str, expected: torch.dtype
) -> None:
    dtypes: set[torch.dtype] = set()
    with watching_steps(lambda optimizer: dtypes.update(grad.dtype for grad in gradients(optimizer))):
        train(replace(tiny, micro_batch=1, grad_dtype=grad_dtype), tmp_path / "run")
    assert dtypes == {expected}


def test_the_thread_count_is_the_setting_and_is_put_back(tiny: TrainConfig, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    assert train(tiny, tmp_path / "run")["threads"] == 1
    assert torch.get_num_threads() == 2


# ---- stopping and going on ----


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("plus", "bfloat16"),
        ("stochastic", "bfloat16"),
        ("kahan", "bfloat16"),
        ("mixed", "float16"),
        ("fp32", "bfloat16"),
    ],
)
@pytest.mark.parametrize("stop", [ctrl_c, crash])
def test_a_resumed_run_has_every_bit_of_an_uninterrupted_one(
    tiny: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    dtype: str,
    stop: Callable[[], None],
) -> None:
    config = replace(tiny, strategy=strategy, dtype=dtype)
    train(config, tmp_path / "whole")
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        at_step(patch, 5, stop)
        if stop is ctrl_c:
            assert train(config, out)["status"] == "interrupted"
            assert (out / "checkpoints/step-000005").is_dir()
        else:
            with pytest.raises(OSError, match="disk is gone"):
                train(config, out)
            assert runfiles.read_run(out)["status"] == "failed"
            assert checkpoints.latest(out / "checkpoints") == out / "checkpoints/step-000003"
    assert records(out)[-1]["step"] == (5 if stop is ctrl_c else 4)

    run = train(runfiles.resume_config(out, {}), out, resume=True)
    assert run["status"] == "finished"
    assert last_tensors(out) == last_tensors(tmp_path / "whole")
    assert last_scaler(out) == last_scaler(tmp_path / "whole")
    assert records(out) == records(tmp_path / "whole")
    audits = [(folder / runfiles.AUDIT_FILE).read_text() for folder in (out, tmp_path / "whole")]
    assert audits[0] == audits[1]
    measured = {"tokens_per_s"}
    whole = runfiles.read_run(tmp_path / "whole")["final"]
    assert {k: v for k, v in run["final"].items() if k not in measured} == {
        k: v for k, v in whole.items() if k not in measured
    }


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 2, crash)
        with pytest.raises(OSError, match="disk is gone"):
            train(tiny, tmp_path / "run", command="the first command")
    run = train(tiny, tmp_path / "run", resume=True, command="another command")
    assert run["command"] == "the first command"
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_ctrl_c_in_the_last_step_finishes_the_run(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 8, ctrl_c)
    assert train(tiny, tmp_path / "run")["status"] == "finished"


def test_more_steps_under_a_constant_learning_rate_continue_the_run(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, schedule="constant")
    train(config, tmp_path / "whole")
    out = tmp_path / "grown"
    train(replace(config, steps=4), out)
    run = train(runfiles.resume_config(out, {"steps": 8}), out, resume=True)
    assert run["config"]["steps"] == 8
    assert last_tensors(out) == last_tensors(tmp_path / "whole")
    assert [r["loss"] for r in records(out)] == [r["loss"] for r in records(tmp_path / "whole")]


def test_a_finished_run_is_neither_overwritten_nor_changed(tiny: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds plus-seed0 \(finished\); choose another folder"):
        train(tiny, out)
    assert train(tiny, out, resume=True)["status"] == "finished"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_text_cannot_be_resumed_with(
    tiny: TrainConfig, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, ctrl_c)
        train(tiny, out)
    (text / "00.txt").write_text("other words", encoding="utf-8")
    with pytest.raises(UserError, match="must have the text it was started with, sha256"):
        train(tiny, out, resume=True)
    assert runfiles.read_run(out)["status"] == "interrupted"


def test_other_weights_cannot_be_resumed_with(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, ctrl_c)
        train(tiny, out)
    real = runsetup.build_model
    monkeypatch.setattr(runsetup, "build_model", lambda name, **options: real(name, **{**options, "seed": 9}))
    with pytest.raises(UserError, match="must have the initial weights it was started with"):
        train(tiny, out, resume=True)


def test_other_tokens_of_the_same_text_cannot_be_resumed_with(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", replace(tiny, tokenizer="bpe", vocab_size=270)
    with monkeypatch.context() as patch:
        at_step(patch, 5, ctrl_c)
        train(config, out)
    prepare_corpus(replace(config, vocab_size=275)).save(tmp_path / "corpus")
    with pytest.raises(UserError, match="must have the batches it was started with"):
        train(config, out, resume=True, corpus=tmp_path / "corpus")


def test_a_damaged_checkpoint_is_named_and_removing_it_resumes_from_the_one_before(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, tmp_path / "whole")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(OSError, match="disk is gone"):
            train(tiny, out)
    damaged = out / "checkpoints/step-000006"
    (damaged / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer.safetensors can't be read.*remove the folder .*step-000006"):
        train(tiny, out, resume=True)
    shutil.rmtree(damaged)
    train(tiny, out, resume=True)
    assert last_tensors(out) == last_tensors(tmp_path / "whole")
    assert records(out) == records(tmp_path / "whole")


# ---- failing ----


def test_a_checkpoint_that_cannot_be_written_fails_the_run_and_keeps_the_one_before(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, tmp_path / "whole")
    out, real = tmp_path / "run", checkpoints.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        if "step-000006" in str(path):
            raise OSError("no space left on device")
        real(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(RunFailed, match=r"checkpoint until step 6 can't be written.*no space.*--resume"):
            train(tiny, out)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000003"]
    train(tiny, out, resume=True)
    assert last_tensors(out) == last_tensors(tmp_path / "whole")
    assert records(out) == records(tmp_path / "whole")


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_step(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    out, steps, real = tmp_path / "run", [0], Objective.losses

    def losses(self: Objective, model: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
        (found,) = real(self, model, batch)
        if steps[0] == 4 and poison == "loss":
            return [found * math.nan]
        if steps[0] == 4 and found.requires_grad:
            found.register_hook(lambda grad: grad * math.inf)
        return [found]

    def count(optimizer: Optimizer) -> None:
        steps[0] += 1

    monkeypatch.setattr(Objective, "losses", losses)
    name = {"loss": "the loss of step 5 is nan", "gradient": "the gradient norm of step 5 is nan"}[poison]
    with watching_steps(count), pytest.raises(RunFailed, match=rf"{name}.*last checkpoint is step-000003.*--lr"):
        train(tiny, out)
    assert steps == [4]
    assert runfiles.read_run(out)["status"] == "failed"
    assert runfiles.read_run(out)["final"] is None
    assert records(out)[-1]["step"] == 4
    assert (out / "checkpoints/step-000003").is_dir()


def test_float16_skips_a_step_that_overflows_and_goes_on(tiny: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(tiny, dtype="float16", strategy="mixed", steps=20, warmup=2), tmp_path / "run")
    trainer = json.loads((tmp_path / "run/checkpoints/step-000020/trainer.json").read_text())
    assert trainer["scaler"]["scale"] <= 65536.0
    assert math.isfinite(run["final"]["validation_loss"])
    assert run["final"]["validation_loss"] < records(tmp_path / "run")[0]["loss"]


@pytest.mark.parametrize("forward", ["value", "fp8"])
def test_a_resumed_run_in_tiles_has_the_bits_of_one_that_never_stopped(
    tiny: TrainConfig, tmp_path: Path, forward: str
) -> None:
    config = replace(tiny, model="gpt-tiny", strategy="fp8", forward=forward, steps=4, schedule="constant", warmup=0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    train(replace(config, steps=2), parts)
    train(runfiles.resume_config(parts, {"steps": 4}), parts, resume=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [(out / "checkpoints/step-000004" / name).read_bytes() for out in (whole, parts)]
        assert files[0] == files[1]
    weights = checkpoints.read(whole / "checkpoints/step-000004", "").weights
    assert {weight.forward for weight in weights.values() if isinstance(weight, TiledTensor)} == {forward}
    # A CPU multiplies none of the feed-forward layers' two each, and of the head, in float8.
    assert runfiles.read_run(whole).get("products_in_float8") == ("0 of 5 weights" if forward == "fp8" else None)

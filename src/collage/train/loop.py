"""One training run, from its settings to its files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn

import collage
from collage.train import checkpoints, continuation, processes, runfiles, sharded
from collage.train.config import RunFailed, TrainConfig, UserError
from collage.train.data import Corpus, load_corpus, prepare_corpus
from collage.train.display import Display, conversion_text
from collage.train.models import MODELS, attention_for, build_model, parameter_groups
from collage.train.objectives import Batch, dropout_bits, objective_for
from collage.train.products import multiplying, products
from collage.train.schedule import learning_rate
from collage.train.signals import StopSignals
from collage.train.stream import Stream, merged

if TYPE_CHECKING:
    from collage.train.classification import FineTuning


def train(
    config: TrainConfig, out: Path, *, resume: bool = False, corpus: Path | None = None, command: str = ""
) -> dict[str, Any]:
    """Train one model and write its run to `out`.

    Initial weights, batches and roundings are functions of the settings and the seed alone (and of the checkpoint
    that the settings continue from), so that a run resumed from a checkpoint has the bits of one that never stopped,
    on the same machine with the same number of threads.

    Args:
        config: the settings; when resuming, those of `runfiles.resume_config`.
        out: the run's folder.
        resume: go on from the last checkpoint in `out`, or from the start where none was written yet.
        corpus: a folder with a prepared corpus, in place of what `config` names.
        command: how the run was started, for run.json; a resumed run keeps the one it has.

    Returns:
        The content of run.json; its status is "finished" or "interrupted". A finished run stays as it is.

    Raises:
        UserError: settings, text or files that can't be used.
        RunFailed: the loss or the gradient is no longer finite.
    """
    if not resume:
        runfiles.check_unused(out)
    elif (run := runfiles.read_run(out))["status"] == "finished" and run["final"]["step"] >= config.steps:
        return run
    with _threads(config.threads):
        return _Run(config, out, resume, corpus, command).run()


class _Run:
    """The parts of a run, set up; `run` is the loop."""

    def __init__(self, config: TrainConfig, out: Path, resume: bool, corpus: Path | None, command: str) -> None:
        self.config, self.out = config, out

        # ---- machine
        self.accelerator = processes.start_processes(config)
        self.device = _device(config, self.accelerator)
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.sharded = config.fsdp and self.processes > 1
        self.micro_batch = _micro_batch(config, self.processes)
        self.products = products(self.device, config.model_dtype)

        # ---- text
        tuning = self._fine_tuning()
        if tuning is None:
            text = load_corpus(corpus) if corpus else self._prepared_text(resume)
            self.objective = objective_for(config, text)
        else:
            text, self.objective = tuning.text, tuning.objective
        each = config.batch_size // self.processes
        # In one piece, as one process with micro-batches of that size has them.
        self.share = slice(self.rank * each, (self.rank + 1) * each)
        self.notes = [text.info.tokenizer_note] if text.info.tokenizer_note else []

        # ---- model and optimizer
        attention = attention_for(self.device.type, config.seq_len)
        if tuning is None:
            self.weights = build_model(
                config.model,
                vocab_size=text.info.vocab_size,
                seq_len=config.seq_len,
                seed=config.seed,
                attention=attention,
                dropout=config.dropout,
            )
            self.dropout = MODELS[config.model].family.dropout if config.dropout is None else config.dropout
        else:
            self.weights = tuning.model(config.seed, attention, config.dropout)
            self.dropout = 1.0  # the checkpoint's own, whatever that is
        fresh_sha256 = runfiles.weights_sha256(self.weights)
        if collage.strategies()[config.strategy].param.borne:
            self._keep_in_tiles()
        if self.sharded:
            processes.shard(self.weights, self.device, self.processes, config.reduce_dtype)
        else:
            self.weights.to(self.device)  # pyright: ignore[reportArgumentType] - wrapped by transformers
        if config.model_dtype != torch.float32:
            collage.to_low_precision(self.weights, config.model_dtype)
        self.optimizer = collage.AdamW(
            parameter_groups(self.weights, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            strategy=config.strategy,
            arithmetic=config.arithmetic,
            backend=config.backend,
            seed=config.seed,
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if config.grad_dtype == "float32":
            _keep_gradients_in_float32(config, self.parameters, self.processes)
        self.audit = collage.audit(self.optimizer, every=_NEVER)
        # A shard's updates don't stand for the others'.
        self.sizes = None if self.sharded else collage.audit(self.optimizer, _NEVER, details=True, memory=_SIZES_MEMORY)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.model_dtype == torch.float16)
        # Accelerate's optimizer wrapper is left out: it would stand between the loss scaler and the optimizer.
        self.model: nn.Module = self.weights
        if not self.sharded:
            self.model = processes.replicate(self.weights, self.accelerator, config.reduce_dtype)

        # ---- where it starts, and files
        self.step, self.earlier_s, self.order_seed = 0, 0.0, config.seed
        self.saves = sharded.Saves(out / "checkpoints", config.keep_checkpoints) if self.sharded else None
        reached = _reached(out / "checkpoints", self.accelerator) if resume else None
        facts = {"command": command, "corpus": text.info.to_json(), "init_sha256": fresh_sha256}
        facts |= {"products": self.products, "objective": self.objective.facts()}
        facts |= {"processes": self.processes, "sharded": self.sharded}
        if config.from_checkpoint is not None:
            facts |= self._continue() if reached is None else _earlier_start(out)
            self.order_seed = continuation.order_seed(facts["init_sha256"], config.seed)
        facts["batches_sha256"] = self.objective.sha256(config.steps, self.order_seed)
        self.record = runfiles.describe(config, self.weights, self.device, facts)
        if resume:
            self._resume(reached, text)
        self.metrics, self.audits = self._metrics(text)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        config = self.config
        self.started = time.perf_counter()
        display = Display(self.record["name"], config.steps, self.step, enabled=self.accelerator.is_main_process)
        display.say(f"{self._title()}, in {self.out}")
        for note in self.notes:
            display.warn(note)
        if config.from_checkpoint is not None:
            display.say(self._start_text())
        try:
            with StopSignals() as signals, display:
                if config.from_checkpoint is not None and self.step == 0:
                    self._record_start(display)
                while self.step < config.steps:
                    display_record = self._next_step()
                    if display_record is not None:
                        display.show(display_record)
                    stopping = self._any_process(signals.requested) and self.step < config.steps
                    if self._due(config.checkpoint_every, self.step) or stopping:
                        self._save()
                    if stopping:
                        self._wait_for_save()
                        display.say(
                            f"stopped after step {self.step} of {config.steps}; the checkpoint is saved. "
                            f"Go on with: collage train --out {self.out} --resume"
                        )
                        return self._finish("interrupted")
                self._wait_for_save()
            final = runfiles.final_figures(self.metrics.records, config.steps)
            if config.task is not None:
                final |= {"perplexity": None, "metrics": self.metrics.records[-1]["metrics"]}
            return self._finish("finished", final)
        except KeyboardInterrupt:
            self._finish("interrupted")
            raise
        except BaseException as error:
            self._finish("failed")
            if self.processes > 1 and processes.peer_died(error):
                raise RunFailed(
                    f"another of the {self.processes} processes has died in step {self.step + 1} or the save before "
                    f"it; its own output says why. Go on from the last checkpoint, with any number of processes: "
                    f"collage train --out {self.out} --resume"
                ) from error
            raise
        finally:
            if isinstance(self.objective.training, Stream):
                self.objective.training.close()

    def _next_step(self) -> dict[str, Any] | None:
        """One optimizer step; returns its record if it's a step that leaves one."""
        config, step = self.config, self.step + 1
        started = time.perf_counter()
        lr = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        losses = self._accumulate_gradients(self.objective.batch(step, self.order_seed, self.share))
        loss = sum(losses)
        norm = self._clip_gradients()
        self._check_finite(step, loss, norm)

        audited = len(self.audit.steps)
        # The optimizer's own count goes on from the checkpoint that a run continues from.
        self.audit.every = 1 if self._due(config.audit_every, step) else _NEVER
        if self.sizes is not None:
            self.sizes.every = 1 if self._due(_SIZES_EVERY * config.audit_every, step) else _NEVER
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step = step
        seconds = time.perf_counter() - started

        tokens = self.objective.tokens(step, self.order_seed) - self.objective.tokens(step - 1, self.order_seed)
        record = {
            "step": step,
            "tokens": self.objective.tokens(step, self.order_seed),
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": tokens / seconds,
        }
        if len(losses) > 1:
            record |= dict(zip(self.objective.terms, losses, strict=True))
        if len(self.audit.steps) > audited:
            report = self.audit.report()
            record |= {key: value for key, value in report["total"].items() if key in _AUDIT_KEYS}
            sizes = None
            if self.sizes is not None and self.sizes.every == 1:
                sizes = self.sizes.report()["total"].get(runfiles.HISTOGRAM)
            self.audits.append(runfiles.audit_record(step, report, sizes))
        if self._due(config.eval_every, step):
            record |= self._validate()
        if not (self._due(config.log_every, step) or "edq_ratio" in record or "validation_loss" in record):
            return None
        self.metrics.append(record)
        return record

    def _accumulate_gradients(self, batch: Batch) -> list[float]:
        """Backward over this process's share of the batch; for each term of the loss the mean over all processes.

        Each micro-batch's gradient is weighted by its share of what the whole batch predicts before it is added to
        `p.grad`, in the dtype that `grad_dtype` names.
        """
        micro_batches = batch.split(self.micro_batch)
        total = torch.zeros(len(self.objective.terms), device=self.device)
        for index, (micro_batch, weights) in enumerate(zip(micro_batches, self._weights(micro_batches), strict=True)):
            last = index == len(micro_batches) - 1
            sync = nullcontext() if last else self.accelerator.no_sync(self.model)
            with sync, multiplying(self.products), self._dropout(index):
                means = self.objective.losses(self.model, micro_batch)
                losses = torch.stack([mean * weight for mean, weight in zip(means, weights, strict=True)])
                self.accelerator.backward(self.scaler.scale(losses.sum()))
            total += losses.detach()
        return self.accelerator.reduce(total, "mean").tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def _weights(self, micro_batches: list[Batch]) -> list[list[float]]:
        """Of each micro-batch, for each term, its share of what the batch predicts; times the averaged processes."""
        counts = torch.tensor([micro_batch.predicted() for micro_batch in micro_batches], dtype=torch.float64)
        total = counts.sum(0).to(self.device)
        if self.processes > 1:
            total = self.accelerator.reduce(total, "sum")
        assert isinstance(total, Tensor)
        return (counts * self.processes / total.cpu().clamp(min=1.0)).tolist()

    def _dropout(self, micro_batch: int) -> AbstractContextManager[None]:
        """Within it dropout is a function of the seed, the step, the process and the micro-batch."""
        if not self.dropout:
            return nullcontext()
        return dropout_bits(self.device, self.order_seed, self.step, self.rank, micro_batch)

    def _validation_batches(self) -> Iterator[Batch]:
        """This process's share of the validation set."""
        shares = self.objective.validation(slice(self.rank, None, self.processes)).split(self.micro_batch)
        yield from shares
        largest = -(-self.objective.validation_size // self.processes)
        for _ in range(len(shares), -(-largest // self.micro_batch) if self.sharded else 0):
            # In a forward pass all processes exchange their shards, so that each must make as many.
            self.objective.losses(self.weights, self.objective.validation(slice(1)))

    def _clip_gradients(self) -> float:
        """Scale gradients down to the norm `clip`; returns their norm before, computed in fp32."""
        norm = processes.gradient_norm(self.parameters, self.accelerator) / self.scaler.get_scale()
        if self.config.clip:
            # With a loss scale, both sides of the comparison are unscaled and the factor is the same.
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        return float(norm)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        # With a loss scaler a gradient that overflows is skipped and the scale lowered.
        bad = [("loss", loss)] if not np.isfinite(loss) else []
        bad += [("gradient norm", norm)] if not np.isfinite(norm) and not self.scaler.is_enabled() else []
        if bad:
            name, value = bad[0]
            found = checkpoints.latest(self.out / "checkpoints")
            raise RunFailed(
                f"the {name} of step {step} is {value}; the step was not taken and the last checkpoint is "
                f"{found.name if found else 'none'}. Remedy: a lower --lr, a longer --warmup, a smaller --clip; with "
                f"float16 moments --eps 1e-4"
            )

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """The mean loss over all that is predicted of the validation set, and the metrics of a task.

        With the weights that the model computes with.
        """
        self.weights.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        predictions: list[Any] = []
        for micro_batch in self._validation_batches():
            with multiplying(self.products):
                loss, predicted = self.objective.validated(self.weights, micro_batch)
            count = micro_batch.predicted()[0]
            total += torch.tensor([float(loss) * count, count]).to(total)
            predictions += predicted
        self.weights.train()
        losses, count = self.accelerator.reduce(total, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        found = {"validation_loss": losses / count}
        if self.config.task is None:
            return found
        return {**found, "metrics": self.objective.metrics(gather_object(predictions))}

    def _keep_in_tiles(self) -> None:
        """Before the model is sharded; tiles of one row are whole in any number of processes."""
        config = self.config
        tile = (1, 128) if config.fsdp else 128
        try:
            collage.to_fp8_(self.weights, config.strategy, forward=config.forward, tile=tile, cast=False)
        except ValueError as error:
            said = f"model must be one that strategy {config.strategy} can keep, got {config.model}: {error}"
            raise UserError(said) from error

    # ---- small questions -----------------------------------------------------------------------------------------

    def _due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps, and in the last one, is due; 0 = only then."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _any_process(self, flag: bool) -> bool:
        if self.processes == 1:
            return flag
        flags = self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum")
        return bool(flags)

    def _title(self) -> str:
        model = self.record["model"]
        return (
            f"{self.record['name']}: {model['name']}, {model['parameters']:,} parameters in {model['dtype']}, "
            f"{self.record['bytes_per_param']:g} bytes each"
        )

    def _start_text(self) -> str:
        source, errors = self.record["source"], self.record["conversion"]
        converted = ", ".join(f"{role} {conversion_text(error)}" for role, error in errors.items())
        return (
            f"continues from step {source['step']} of {source['run'] or 'a run'} ({source['strategy']}), "
            f"{source['checkpoint']}; converted to {self.config.strategy}: {converted}"
        )

    def _fine_tuning(self) -> FineTuning | None:
        """The model and the examples of a run that fine-tunes; None of one that trains on text."""
        if self.config.task is None:
            return None
        from collage.train.classification import prepare  # needs an extra of its own

        return prepare(self.config)

    # ---- another run's checkpoint --------------------------------------------------------------------------------

    def _prepared_text(self, resume: bool) -> Corpus:
        if resume and (self.config.from_checkpoint is not None or (self.out / "tokenizer.json").is_file()):
            # The source's folder may be gone by now, or a published tokenizer out of reach, and the run has its own.
            return prepare_corpus(self.config, continuation.tokenizer_json(self.config, self.out))
        return (
            prepare_corpus(self.config)
            if self.config.from_checkpoint is None
            else continuation.continued_text(self.config)
        )

    def _continue(self) -> dict[str, Any]:
        """Put the checkpoint that the settings name into model and optimizer; returns what run.json says of it."""
        start = continuation.start(self.config, self.weights, self.optimizer)
        if start.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(start.scaler)
        return {"init_sha256": start.sha256, "source": start.source, "conversion": start.conversion}

    def _record_start(self, display: Display) -> None:
        """Record the validation loss before the first step: where all that branch from one checkpoint start."""
        loss = self._validate()["validation_loss"]
        self.metrics.append({"step": 0, "tokens": 0, "validation_loss": loss})
        display.say_validation(0, loss)

    # ---- files ---------------------------------------------------------------------------------------------------

    def _resume(self, checkpoint: Path | None, text: Corpus) -> None:
        run = runfiles.read_run(self.out)
        self.record |= {"command": run["command"], "corpus": continuation.with_tokenizer(text.info, run).to_json()}
        self._check_same_start(run)
        if checkpoint is not None:
            load = sharded.load if self.sharded else checkpoints.load
            progress = load(checkpoint, self.config, self.weights, self.optimizer)
            self.step, self.earlier_s = progress.step, progress.wall_time_s
            self.scaler.load_state_dict(progress.scaler)
            if isinstance(self.objective.training, Stream):
                self.objective.training.load(progress.data)

    def _check_same_start(self, run: dict[str, Any]) -> None:
        """Raise `UserError` unless the run in `out` began with this text, these batches and these weights."""
        steps = run["config"]["steps"]
        weights = (run["init_sha256"], self.record["init_sha256"])
        facts = {"text": (run["corpus"]["sha256"], self.record["corpus"]["sha256"])}
        if self.config.from_checkpoint is not None:
            facts["values in the checkpoint"] = weights  # before the batches, whose order follows from them
        facts["batches"] = (run["batches_sha256"], self.objective.sha256(steps, self.order_seed))
        facts["initial weights"] = weights
        for name, (theirs, ours) in facts.items():
            if theirs != ours:
                raise UserError(
                    f"a resumed run must have the {name} it was started with, sha256 {theirs[:12]}, got {ours[:12]}; "
                    f"resume with the same data and the same versions (the standard library's sources change with "
                    f"Python's; the run had {run['versions']})"
                )

    def _metrics(self, text: Corpus) -> tuple[runfiles.Metrics, runfiles.Metrics]:
        if not self.accelerator.is_main_process:
            return runfiles.Metrics(None), runfiles.Metrics(None, keep=False)
        runfiles.write_json(self.out / "run.json", self.record)
        if text.tokenizer_json is not None:
            runfiles.write_text(self.out / "tokenizer.json", text.tokenizer_json)
        audits = runfiles.Metrics(self.out / runfiles.AUDIT_FILE, self.step, keep=False)
        return runfiles.Metrics(self.out / "metrics.jsonl", self.step), audits

    def _save(self) -> None:
        """Save; of a sharded model only begin to. All processes come here together."""
        self.metrics.sync()
        self.audits.sync()
        progress = checkpoints.Progress(self.step, self._wall_time(), self.scaler.state_dict(), self._place())
        folder, keep = self.out / "checkpoints", self.config.keep_checkpoints
        with self._saving():
            if self.saves is not None:
                self.saves.start(progress, self.config, self.weights, self.optimizer)
            elif self.accelerator.is_main_process:
                checkpoints.save(folder, progress, self.config, self.weights, self.optimizer, keep)
        self.accelerator.wait_for_everyone()

    def _place(self) -> dict[str, Any]:
        """Where a streamed text was read up to; each process has read its own share. Empty for any other text."""
        stream = self.objective.training
        return merged(gather_object([stream.state()])) if isinstance(stream, Stream) else {}

    def _wait_for_save(self) -> None:
        with self._saving():
            if self.saves is not None:
                self.saves.wait()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"the last checkpoint until step {self.step} can't be written to {self.out / 'checkpoints'}: {error}; "
                f"those before it are whole. Make room, then go on with: collage train --out {self.out} --resume"
            ) from error

    def _wall_time(self) -> float:
        return self.earlier_s + time.perf_counter() - self.started

    def _finish(self, status: str, final: dict[str, Any] | None = None) -> dict[str, Any]:
        if self.saves is not None and status == "failed":
            # What has failed is said already; of a save that goes well nothing shall be lost.
            with suppress(OSError):
                self.saves.wait()
        self.record |= {
            "status": status,
            "state_bytes": runfiles.state_bytes(self.optimizer),
            "wall_time_s": self._wall_time(),
            "peak_memory_bytes": runfiles.peak_memory(self.device),
            "final": final,
        }
        self.record = runfiles.plain(self.record)
        if self.accelerator.is_main_process:
            runfiles.write_json(self.out / "run.json", self.record)
        return self.record


_AUDIT_KEYS = ("edq", "update_norm", *runfiles.AUDITED)
_NEVER = sys.maxsize
_SIZES_EVERY, _SIZES_MEMORY = 5, 1 << 22
"""Every so many audits the sizes of the updates are recorded, from copies of so many bytes: of a model of a million
parameters on one CPU core that takes .3 s, which with the default settings is every 50 steps."""


def _reached(folder: Path, accelerator: Accelerator) -> Path | None:
    """The checkpoint from which all processes go on; what saves that were cut off have left is removed."""
    found = [None]
    if accelerator.is_main_process:
        checkpoints.remove_abandoned(folder)
        found = [checkpoints.latest(folder)]
    return broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]


def _earlier_start(out: Path) -> dict[str, Any]:
    """What run.json says of the checkpoint that a run to be resumed continues from."""
    run = runfiles.read_run(out)
    return {key: run[key] for key in ("init_sha256", "source", "conversion")}


def _device(config: TrainConfig, accelerator: Accelerator) -> torch.device:
    if config.device is None or accelerator.num_processes > 1:
        return accelerator.device
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device must be one that torch can use here, got {config.device!r}: {error}") from error


def _micro_batch(config: TrainConfig, processes: int) -> int:
    """Sequences per forward pass in each process."""
    if config.batch_size % processes:
        raise UserError(
            f"batch_size must be a multiple of the number of processes ({processes}), got {config.batch_size}"
        )
    share = config.batch_size // processes
    micro = share if config.micro_batch is None else config.micro_batch
    if share % micro:
        raise UserError(f"micro_batch must divide each process's {share} of {config.batch_size} sequences, got {micro}")
    return micro


def _keep_gradients_in_float32(config: TrainConfig, parameters: list[Tensor], processes: int) -> None:
    if processes > 1 and config.model_dtype != torch.float32:
        raise UserError(
            f"grad_dtype float32 needs a single process, since DDP and FSDP2 keep gradients in the weights' dtype, got "
            f"{processes}; use reduce_dtype float32"
        )
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise UserError(
            f"grad_dtype float32 needs a torch with Tensor.grad_dtype, got {torch.__version__}; use grad_dtype model"
        )
    for p in parameters:
        p.grad_dtype = torch.float32


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

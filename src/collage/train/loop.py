"""One training run, from its settings to its files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

import collage
from collage.train import checkpoints, processes, runfiles
from collage.train.config import RunFailed, TrainConfig
from collage.train.display import Display, run_title, start_text
from collage.train.objectives import Batch, dropout_bits
from collage.train.products import multiplying
from collage.train.runfolder import RunFolder
from collage.train.runsetup import RunSetup
from collage.train.schedule import learning_rate
from collage.train.signals import StopSignals
from collage.train.stream import Stream

_AUDIT_KEYS = ("edq", "update_norm", *runfiles.AUDITED)
_NEVER = sys.maxsize
_SIZES_EVERY, _SIZES_MEMORY = 5, 1 << 22
"""Every so many audits the sizes of the updates are recorded, from copies of so many bytes: of a model of a million
parameters on one CPU core that takes .3 s, which with the default settings is every 50 steps."""


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
        setup = RunSetup(config, out, resume, corpus)
        return _Loop(setup, RunFolder(setup, out, resume, command)).run()


class _Loop:
    """The steps of a run; `run` goes through them."""

    def __init__(self, setup: RunSetup, folder: RunFolder) -> None:
        self.config, self.setup, self.folder = setup.config, setup, folder
        self.objective, self.optimizer = setup.objective, setup.optimizer
        self.step, self.order_seed = folder.start, folder.order_seed
        self.audit = collage.audit(setup.optimizer, every=_NEVER)
        # A shard's updates don't stand for the others'.
        self.sizes = (
            None if setup.sharded else collage.audit(setup.optimizer, _NEVER, details=True, memory=_SIZES_MEMORY)
        )

    def run(self) -> dict[str, Any]:
        """Make the steps that are left; returns the content of run.json."""
        config, record = self.config, self.folder.record
        display = Display(record["name"], config.steps, self.step, enabled=self.setup.accelerator.is_main_process)
        display.say(f"{run_title(record)}, in {self.folder.out}")
        if self.setup.info.tokenizer_note:
            display.warn(self.setup.info.tokenizer_note)
        if self.setup.in_float8 is not None:
            display.say(f"{self.setup.in_float8} are multiplied in float8 here, the others' factors in bfloat16")
        if config.from_checkpoint is not None:
            display.say(start_text(record))
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
                        self.folder.save(self.step)
                    if stopping:
                        self.folder.wait_for_save(self.step)
                        display.say(
                            f"stopped after step {self.step} of {config.steps}; the checkpoint is saved. "
                            f"Go on with: collage train --out {self.folder.out} --resume"
                        )
                        return self.folder.finish("interrupted")
                self.folder.wait_for_save(self.step)
            final = runfiles.final_figures(self.folder.metrics.records, config.steps)
            if config.task is not None:
                final |= {"perplexity": None, "metrics": self.folder.metrics.records[-1]["metrics"]}
            return self.folder.finish("finished", final)
        except KeyboardInterrupt:
            self.folder.finish("interrupted")
            raise
        except BaseException as error:
            self.folder.finish("failed")
            if self.setup.processes > 1 and processes.peer_died(error):
                raise RunFailed(
                    f"another of the {self.setup.processes} processes has died in step {self.step + 1} or the save "
                    "before it; its own output says why. Go on from the last checkpoint, with any number of processes: "
                    f"collage train --out {self.folder.out} --resume"
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

        losses = self._accumulate_gradients(self.objective.batch(step, self.order_seed, self.setup.share))
        loss = sum(losses)
        norm = self._clip_gradients()
        self._check_finite(step, loss, norm)

        audited = len(self.audit.steps)
        # The optimizer's own count goes on from the checkpoint that a run continues from.
        self.audit.every = 1 if self._due(config.audit_every, step) else _NEVER
        if self.sizes is not None:
            self.sizes.every = 1 if self._due(_SIZES_EVERY * config.audit_every, step) else _NEVER
        self.setup.scaler.step(self.optimizer)
        self.setup.scaler.update()
        self.optimizer.zero_grad()
        self.step = step
        seconds = time.perf_counter() - started

        before, tokens = (self.objective.tokens(number, self.order_seed) for number in (step - 1, step))
        record = {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": (tokens - before) / seconds,
        }
        if len(losses) > 1:
            record |= dict(zip(self.objective.terms, losses, strict=True))
        if len(self.audit.steps) > audited:
            report = self.audit.report()
            record |= {key: value for key, value in report["total"].items() if key in _AUDIT_KEYS}
            sizes = None
            if self.sizes is not None and self.sizes.every == 1:
                sizes = self.sizes.report()["total"].get(runfiles.HISTOGRAM)
            self.folder.audits.append(runfiles.audit_record(step, report, sizes))
        if self._due(config.eval_every, step):
            record |= self._validate()
        if not (self._due(config.log_every, step) or "edq_ratio" in record or "validation_loss" in record):
            return None
        self.folder.metrics.append(record)
        return record

    def _accumulate_gradients(self, batch: Batch) -> list[float]:
        """Backward over this process's share of the batch; for each term of the loss the mean over all processes.

        Each micro-batch's gradient is weighted by its share of what the whole batch predicts before it is added to
        `p.grad`, in the dtype that `grad_dtype` names.
        """
        micro_batches = batch.split(self.setup.micro_batch)
        total = torch.zeros(len(self.objective.terms), device=self.setup.device)
        for index, (micro_batch, weights) in enumerate(zip(micro_batches, self._weights(micro_batches), strict=True)):
            last = index == len(micro_batches) - 1
            sync = nullcontext() if last else self.setup.accelerator.no_sync(self.setup.model)
            with sync, multiplying(self.setup.products), self._dropout(index):
                means = self.objective.losses(self.setup.model, micro_batch)
                losses = torch.stack([mean * weight for mean, weight in zip(means, weights, strict=True)])
                self.setup.accelerator.backward(self.setup.scaler.scale(losses.sum()))
            total += losses.detach()
        return self.setup.accelerator.reduce(total, "mean").tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def _weights(self, micro_batches: list[Batch]) -> list[list[float]]:
        """Of each micro-batch, for each term, its share of what the batch predicts; times the averaged processes."""
        counts = torch.tensor([micro_batch.predicted() for micro_batch in micro_batches], dtype=torch.float64)
        total = counts.sum(0).to(self.setup.device)
        if self.setup.processes > 1:
            total = self.setup.accelerator.reduce(total, "sum")
        assert isinstance(total, Tensor)
        return (counts * self.setup.processes / total.cpu().clamp(min=1.0)).tolist()

    def _dropout(self, micro_batch: int) -> AbstractContextManager[None]:
        """Within it dropout is a function of the seed, the step, the process and the micro-batch."""
        if not self.setup.dropout:
            return nullcontext()
        return dropout_bits(self.setup.device, self.order_seed, self.step, self.setup.rank, micro_batch)

    def _validation_batches(self) -> Iterator[Batch]:
        """This process's share of the validation set."""
        own = slice(self.setup.rank, None, self.setup.processes)
        shares = self.objective.validation(own).split(self.setup.micro_batch)
        yield from shares
        largest = -(-self.objective.validation_size // self.setup.processes)
        for _ in range(len(shares), -(-largest // self.setup.micro_batch) if self.setup.sharded else 0):
            # In a forward pass all processes exchange their shards, so that each must make as many.
            self.objective.losses(self.setup.weights, self.objective.validation(slice(1)))

    def _clip_gradients(self) -> float:
        """Scale gradients down to the norm `clip`; returns their norm before, computed in fp32."""
        norm = processes.gradient_norm(self.setup.parameters, self.setup.accelerator) / self.setup.scaler.get_scale()
        if self.config.clip:
            # With a loss scale, both sides of the comparison are unscaled and the factor is the same.
            torch.nn.utils.clip_grads_with_norm_(self.setup.parameters, self.config.clip, norm)
        return float(norm)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        # With a loss scaler a gradient that overflows is skipped and the scale lowered.
        bad = [("loss", loss)] if not np.isfinite(loss) else []
        bad += [("gradient norm", norm)] if not np.isfinite(norm) and not self.setup.scaler.is_enabled() else []
        if bad:
            name, value = bad[0]
            found = checkpoints.latest(self.folder.out / "checkpoints")
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
        self.setup.weights.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.setup.device)
        predictions: list[Any] = []
        for micro_batch in self._validation_batches():
            with multiplying(self.setup.products):
                loss, predicted = self.objective.validated(self.setup.weights, micro_batch)
            count = micro_batch.predicted()[0]
            total += torch.tensor([float(loss) * count, count]).to(total)
            predictions += predicted
        self.setup.weights.train()
        losses, count = self.setup.accelerator.reduce(total, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        found = {"validation_loss": losses / count}
        if self.config.task is None:
            return found
        return {**found, "metrics": self.objective.metrics(gather_object(predictions))}

    def _record_start(self, display: Display) -> None:
        """Record the validation loss before the first step: where all that branch from one checkpoint start."""
        loss = self._validate()["validation_loss"]
        self.folder.metrics.append({"step": 0, "tokens": 0, "validation_loss": loss})
        display.say_validation(0, loss)

    def _due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps, and in the last one, is due; 0 = only then."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def _any_process(self, flag: bool) -> bool:
        if self.setup.processes == 1:
            return flag
        flags = self.setup.accelerator.reduce(torch.tensor(float(flag), device=self.setup.device), "sum")
        return bool(flags)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

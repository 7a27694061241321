"""A run in its folder: from where it goes on, what it records and saves, how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from collage.train import checkpoints, continuation, runfiles, sharded
from collage.train.config import RunFailed, UserError
from collage.train.runsetup import RunSetup
from collage.train.stream import Stream, merged


class RunFolder:
    """The folder of a run, and the clock of its wall time, which starts when this is made.

    Making it puts into model, optimizer and loss scaler what the run goes on from: its own last checkpoint, or that of
    another run.

    Args:
        setup: what the run trains with.
        out: the folder.
        resume: whether the run that stands there goes on.
        command: how the run was started; one that goes on keeps what it has.

    Attributes:
        start: the steps that were done before; 0 of a new run.
        order_seed: what the order of the batches is drawn from.
        record: the content of run.json.
        metrics, audits: the records of steps.

    Raises:
        UserError: a checkpoint that can't be used, or one of another text or other weights.
    """

    def __init__(self, setup: RunSetup, out: Path, resume: bool, command: str) -> None:
        config = setup.config
        self.setup, self.out = setup, out
        self.start, self._earlier_s, self.order_seed = 0, 0.0, config.seed
        folder = out / "checkpoints"
        self._saves = sharded.Saves(folder, config.keep_checkpoints) if setup.sharded else None
        reached = _reached(folder, setup.accelerator) if resume else None
        facts = {"command": command, "corpus": setup.info.to_json(), "init_sha256": setup.fresh_sha256}
        facts |= {"products": setup.products, "objective": setup.objective.facts()}
        facts |= {"processes": setup.processes, "sharded": setup.sharded}
        if setup.in_float8 is not None:
            facts["products_in_float8"] = setup.in_float8
        if config.from_checkpoint is not None:
            facts |= self._continue() if reached is None else _earlier_start(out)
            self.order_seed = continuation.order_seed(facts["init_sha256"], config.seed)
        facts["batches_sha256"] = setup.objective.sha256(config.steps, self.order_seed)
        self.record = runfiles.describe(config, setup.weights, setup.device, facts)
        if resume:
            self._resume(reached)
        self.metrics, self.audits = self._metrics()
        self._started = time.perf_counter()

    # ---- where it starts -----------------------------------------------------------------------------------------

    def _continue(self) -> dict[str, Any]:
        """Put the checkpoint that the settings name into model and optimizer; returns what run.json says of it."""
        setup = self.setup
        start = continuation.start(setup.config, setup.weights, setup.optimizer)
        if start.scaler and setup.scaler.is_enabled():
            setup.scaler.load_state_dict(start.scaler)
        return {"init_sha256": start.sha256, "source": start.source, "conversion": start.conversion}

    def _resume(self, checkpoint: Path | None) -> None:
        setup, run = self.setup, runfiles.read_run(self.out)
        self.record |= {"command": run["command"], "corpus": continuation.with_tokenizer(setup.info, run).to_json()}
        self._check_same_start(run)
        if checkpoint is not None:
            load = sharded.load if setup.sharded else checkpoints.load
            progress = load(checkpoint, setup.config, setup.weights, setup.optimizer)
            self.start, self._earlier_s = progress.step, progress.wall_time_s
            setup.scaler.load_state_dict(progress.scaler)
            if isinstance(setup.objective.training, Stream):
                setup.objective.training.load(progress.data)

    def _check_same_start(self, run: dict[str, Any]) -> None:
        """Raise `UserError` unless the run in `out` began with this text, these batches and these weights."""
        steps = run["config"]["steps"]
        weights = (run["init_sha256"], self.record["init_sha256"])
        facts = {"text": (run["corpus"]["sha256"], self.record["corpus"]["sha256"])}
        if self.setup.config.from_checkpoint is not None:
            facts["values in the checkpoint"] = weights  # before the batches, whose order follows from them
        facts["batches"] = (run["batches_sha256"], self.setup.objective.sha256(steps, self.order_seed))
        facts["initial weights"] = weights
        for name, (theirs, ours) in facts.items():
            if theirs != ours:
                raise UserError(
                    f"a resumed run must have the {name} it was started with, sha256 {theirs[:12]}, got {ours[:12]}; "
                    f"resume with the same data and the same versions (the standard library's sources change with "
                    f"Python's; the run had {run['versions']})"
                )

    def _metrics(self) -> tuple[runfiles.Metrics, runfiles.Metrics]:
        if not self.setup.accelerator.is_main_process:
            return runfiles.Metrics(None), runfiles.Metrics(None, keep=False)
        runfiles.write_json(self.out / "run.json", self.record)
        if self.setup.tokenizer_json is not None:
            runfiles.write_text(self.out / "tokenizer.json", self.setup.tokenizer_json)
        audits = runfiles.Metrics(self.out / runfiles.AUDIT_FILE, self.start, keep=False)
        return runfiles.Metrics(self.out / "metrics.jsonl", self.start), audits

    # ---- while it runs -------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Save after a step; of a sharded model only begin to. All processes come here together.

        Raises:
            RunFailed: the files can't be written.
        """
        setup = self.setup
        self.metrics.sync()
        self.audits.sync()
        progress = checkpoints.Progress(step, self._wall_time(), setup.scaler.state_dict(), self._place())
        folder, keep = self.out / "checkpoints", setup.config.keep_checkpoints
        with self._saving(step):
            if self._saves is not None:
                self._saves.start(progress, setup.config, setup.weights, setup.optimizer)
            elif setup.accelerator.is_main_process:
                checkpoints.save(folder, progress, setup.config, setup.weights, setup.optimizer, keep)
        setup.accelerator.wait_for_everyone()

    def wait_for_save(self, step: int) -> None:
        """Return when the last save until this step is whole.

        Raises:
            RunFailed: it can't be written.
        """
        with self._saving(step):
            if self._saves is not None:
                self._saves.wait()

    def _place(self) -> dict[str, Any]:
        """Where a streamed text was read up to; each process has read its own share. Empty for any other text."""
        stream = self.setup.objective.training
        return merged(gather_object([stream.state()])) if isinstance(stream, Stream) else {}

    @contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"the last checkpoint until step {step} can't be written to {self.out / 'checkpoints'}: {error}; "
                f"those before it are whole. Make room, then go on with: collage train --out {self.out} --resume"
            ) from error

    def _wall_time(self) -> float:
        return self._earlier_s + time.perf_counter() - self._started

    def finish(self, status: str, final: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write how the run ended and return its run.json.

        Args:
            status: "finished", "interrupted" or "failed".
            final: the final figures of a run that has finished.
        """
        if self._saves is not None and status == "failed":
            # What has failed is said already; of a save that goes well nothing shall be lost.
            with suppress(OSError):
                self._saves.wait()
        self.record |= {
            "status": status,
            "state_bytes": runfiles.state_bytes(self.setup.optimizer),
            "wall_time_s": self._wall_time(),
            "peak_memory_bytes": runfiles.peak_memory(self.setup.device),
            "final": final,
        }
        self.record = runfiles.plain(self.record)
        if self.setup.accelerator.is_main_process:
            runfiles.write_json(self.out / "run.json", self.record)
        return self.record


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

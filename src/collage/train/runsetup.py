"""What a run trains with, made from its settings: processes, text, model and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import collage
from collage.train import continuation, processes, runfiles
from collage.train.config import TrainConfig, UserError
from collage.train.data import Corpus, load_corpus, prepare_corpus
from collage.train.models import MODELS, attention_for, build_model, parameter_groups
from collage.train.objectives import objective_for
from collage.train.products import in_float8, products

if TYPE_CHECKING:
    from collage.train.classification import FineTuning


class RunSetup:
    """What a run trains with, as fresh as at its first step.

    Args:
        config: the settings.
        out: the run's folder, where a run that goes on has its tokenizer.
        resume: whether the run goes on.
        corpus: a folder with a prepared corpus, in place of what `config` names.

    Attributes:
        accelerator, device, processes, rank, sharded: where, and beside how many others.
        micro_batch: sequences per forward pass in this process.
        share: this process's part of a batch.
        products: how matrices are multiplied (`products.products`).
        in_float8: how many weights are multiplied in float8 (`products.in_float8`).
        info, tokenizer_json: of the text.
        objective: what is learned of the text, and its batches.
        weights: the model as transformers has it; `model` is what is called, wrapped where processes add up gradients.
        fresh_sha256: hash of its weights in float32, before anything was done to them.
        dropout: its rate; 0 where there is none.
        optimizer, parameters, scaler: what steps, what it steps, and the loss scaler.

    Raises:
        UserError: settings, text or files that can't be used.
    """

    def __init__(self, config: TrainConfig, out: Path, resume: bool, corpus: Path | None) -> None:
        self.config = config

        # ---- machine
        self.accelerator = processes.start_processes(config)
        self.device = _device(config, self.accelerator)
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.sharded = config.fsdp and self.processes > 1
        self.micro_batch = _micro_batch(config, self.processes)
        self.products = products(self.device, config.model_dtype)

        # ---- text
        tuning = _fine_tuning(config)
        if tuning is None:
            text = load_corpus(corpus) if corpus else _prepared_text(config, out, resume)
            self.objective = objective_for(config, text)
        else:
            text, self.objective = tuning.text, tuning.objective
        self.info, self.tokenizer_json = text.info, text.tokenizer_json
        each = config.batch_size // self.processes
        # In one piece, as one process with micro-batches of that size has them.
        self.share = slice(self.rank * each, (self.rank + 1) * each)

        # ---- model and optimizer
        self.weights, self.dropout = self._fresh_model(tuning)
        self.fresh_sha256 = runfiles.weights_sha256(self.weights)
        self._place_weights()
        self.in_float8 = in_float8(self.weights)
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
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.model_dtype == torch.float16)
        # Accelerate's optimizer wrapper is left out: it would stand between the loss scaler and the optimizer.
        self.model: nn.Module = self.weights
        if not self.sharded:
            self.model = processes.replicate(self.weights, self.accelerator, config.reduce_dtype)

    def _fresh_model(self, tuning: FineTuning | None) -> tuple[Any, float]:
        """The model in float32, on the CPU, and its dropout."""
        config, attention = self.config, attention_for(self.device.type, self.config.seq_len)
        if tuning is not None:
            # The dropout is the checkpoint's own, whatever that is.
            return tuning.model(config.seed, attention, config.dropout), 1.0
        model = build_model(
            config.model,
            vocab_size=self.info.vocab_size,
            seq_len=config.seq_len,
            seed=config.seed,
            attention=attention,
            dropout=config.dropout,
        )
        return model, MODELS[config.model].family.dropout if config.dropout is None else config.dropout

    def _place_weights(self) -> None:
        """Brings the fresh weights to the device, or a share of them, in the dtype or the tiles that they train in."""
        config = self.config
        if collage.strategies()[config.strategy].param.borne:
            _keep_in_tiles(config, self.weights)
        if self.sharded:
            processes.shard(self.weights, self.device, self.processes, config.reduce_dtype)
        else:
            self.weights.to(self.device)
        if config.model_dtype != torch.float32:
            collage.to_low_precision(self.weights, config.model_dtype)


# ---- machine ---------------------------------------------------------------------------------------------------


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


# ---- text ------------------------------------------------------------------------------------------------------


def _fine_tuning(config: TrainConfig) -> FineTuning | None:
    """The model and the examples of a run that fine-tunes; None of one that trains on text."""
    if config.task is None:
        return None
    from collage.train.classification import prepare  # needs an extra of its own

    return prepare(config)


def _prepared_text(config: TrainConfig, out: Path, resume: bool) -> Corpus:
    if resume and (config.from_checkpoint is not None or (out / "tokenizer.json").is_file()):
        # The source's folder may be gone by now, or a published tokenizer out of reach, and the run has its own.
        return prepare_corpus(config, continuation.tokenizer_json(config, out))
    return prepare_corpus(config) if config.from_checkpoint is None else continuation.continued_text(config)


# ---- model and optimizer ---------------------------------------------------------------------------------------


def _keep_in_tiles(config: TrainConfig, weights: nn.Module) -> None:
    """Before the model is sharded; tiles of one row are whole in any number of processes."""
    tile = (1, 128) if config.fsdp else 128
    try:
        collage.to_fp8_(weights, config.strategy, forward=config.forward, tile=tile, cast=False)
    except ValueError as error:
        said = f"model must be one that strategy {config.strategy} can keep, got {config.model}: {error}"
        raise UserError(said) from error


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

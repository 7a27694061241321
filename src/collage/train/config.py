"""Every setting of a training run, in one frozen record.

A field's metadata holds the text and the panel of its command-line option, so that the record, the options and
`run.json` can't drift apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

import collage
from collage.train.models import MODELS

RECIPE, MODEL, OPTIMIZER, SCHEDULE, BATCH = "Recipe", "Model and precision", "Optimizer", "Steps and schedule", "Batch"
TASK, DATA, MEASURE, RUN, START = "Task", "Text", "Measuring", "Run", "Continuing from a checkpoint"

DTYPES = ("bfloat16", "float16")
ARITHMETICS = ("fp32", "working")
SCHEDULES = ("cosine", "linear", "constant")
GRAD_DTYPES = ("model", "float32")
REDUCE_DTYPES = ("model", "float32")
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
OWN_TASK = "classification"
TASK_SETTINGS = ("task", "pretrained", "text_columns", "label_column")
"""Settings of fine-tuning alone."""
SOURCES = (
    "A text file, JSON Lines (.jsonl, .jsonl.gz, .jsonl.zst), Parquet, a folder with files of one kind; a dataset of "
    "the Hugging Face hub: wikipedia, wikitext, c4, openwebtext, hf:REPOSITORY, hf:REPOSITORY@REVISION:CONFIG:SPLIT"
)
BYTE_VOCABULARY = 257
"""The byte tokenizer's vocabulary: 256 bytes and the end-of-document token."""


@dataclass(frozen=True)
class Published:
    """A vocabulary of the Hugging Face hub, and what to train on the text where that is out of reach."""

    repository: str
    kind: str
    vocab_size: int


PRETRAINED = {
    "gpt2": Published("openai-community/gpt2", "bpe", 50_257),
    "bert": Published("google-bert/bert-base-uncased", "wordpiece", 30_522),
    "roberta": Published("FacebookAI/roberta-base", "bpe", 50_265),
    "llama": Published("huggyllama/llama-7b", "bpe", 32_000),
}
TOKENIZERS = ("bytes", "bpe", "wordpiece", *PRETRAINED)


class UserError(ValueError):
    """Something the user can mend. The message says what, got, allowed and remedy; the command line prints it alone."""


class RunFailed(RuntimeError):  # noqa: N818 - not a defect of the program
    """A run that can't go on, such as one whose loss is no longer finite."""


def _setting(default: Any, panel: str, text: str) -> Any:
    return field(default=default, metadata={"panel": panel, "help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the defaults are those of `collage compare` without options.

    Raises:
        UserError: a setting, or two settings together, can't be trained with.
    """

    recipe: str | None = _setting(
        None,
        RECIPE,
        "A whole configuration by name: every setting below that isn't given is the recipe's. `collage recipes` shows "
        "them. --steps without --warmup keeps the warm-up's share of the steps, --lr without --min-lr the ratio of the "
        "two.",
    )

    model: str = _setting("gpt-1m", MODEL, f"Architecture, with fresh weights: {', '.join(MODELS)}.")
    strategy: str = _setting(
        "plus",
        MODEL,
        f"How parameters and optimizer states are stored: {', '.join(collage.strategies())}. 'light' adds a low part "
        "to each weight, 'plus' to v as well, 'exact' makes weights float32, 'compact' keeps moments in 8 bits.",
    )
    dtype: str = _setting(
        "bfloat16",
        MODEL,
        "The low-precision format: bfloat16, or float16 with dynamic loss scaling. float16 has no room for a small v: "
        "take strategy fp16, compact, or one with fp32 moments, or give --eps 1e-4.",
    )
    arithmetic: str = _setting(
        "fp32", MODEL, "What the optimizer computes in: fp32, or working (each operation rounded to the format)."
    )
    forward: str = _setting(
        "value",
        MODEL,
        "What the model reads of weights in tiles (fp8 and its kin): value (hi + lo), or hi alone. fp8 reads hi, and "
        "rounds activations to float8 for the products with it.",
    )
    backend: str | None = _setting(
        None, MODEL, "Which implementation does the optimizer step; unset: the fastest one for the device."
    )
    dropout: float | None = _setting(
        None,
        MODEL,
        "Probability of dropout, drawn from seed and step. Unset: 0 for GPT and LLaMA, 0.1 for BERT and RoBERTa.",
    )

    lr: float = _setting(1e-3, OPTIMIZER, "Learning rate at the end of the warm-up.")
    betas: tuple[float, float] = _setting(
        (0.9, 0.999), OPTIMIZER, "Decay of the two moments. From .98 upwards, the second moment needs 'plus'."
    )
    eps: float = _setting(1e-8, OPTIMIZER, "Added to the denominator of the update.")
    weight_decay: float = _setting(0.1, OPTIMIZER, "Decoupled weight decay; biases and norm gains are left out.")
    clip: float = _setting(1.0, OPTIMIZER, "Largest norm of the gradient, computed in fp32; 0 = no clipping.")

    steps: int = _setting(300, SCHEDULE, "Optimizer steps.")
    schedule: str = _setting("cosine", SCHEDULE, "Path from --lr to --min-lr: cosine, linear or constant.")
    warmup: int | None = _setting(
        None, SCHEDULE, "Steps over which the learning rate rises to --lr; unset: a fifteenth of --steps."
    )
    min_lr: float | None = _setting(
        None, SCHEDULE, "Learning rate at the last step (cosine and linear); unset: a twentieth of --lr."
    )

    batch_size: int = _setting(
        16, BATCH, "Sequences per optimizer step, over all processes: their number doesn't change it."
    )
    seq_len: int = _setting(128, BATCH, "Tokens per sequence.")
    micro_batch: int | None = _setting(
        None, BATCH, "Sequences per forward pass; less than the batch accumulates gradients. Unset: all at once."
    )
    grad_dtype: str = _setting(
        "model", BATCH, "What gradients are kept and accumulated in: model (the weights' format) or float32."
    )

    reduce_dtype: str = _setting(
        "model",
        BATCH,
        "What gradients are added up in over several processes: model (the weights' format, half the bytes sent) or "
        "float32 (rounded once, after the sum). With one process it has no effect.",
    )

    task: str | None = _setting(
        None,
        TASK,
        f"A task of GLUE, {', '.join(GLUE)}, or {OWN_TASK} for examples of your own. Unset: {OWN_TASK} with --data.",
    )
    pretrained: str | None = _setting(
        None,
        TASK,
        "The model to fine-tune: a run or a checkpoint of `collage train`, whose weights are taken with all that its "
        "strategy kept of them, or a folder with a checkpoint of transformers and its tokenizer.",
    )
    text_columns: str | None = _setting(
        None,
        TASK,
        f"Where {OWN_TASK} has a sentence, or two separated by a comma. Unset: sentence1,sentence2, sentence or text.",
    )
    label_column: str = _setting("label", TASK, f"Where {OWN_TASK} has the labels: words or whole numbers.")

    data: str | None = _setting(
        None,
        DATA,
        f"{SOURCES}, or a corpus that `collage data` built. Unset: the Python standard library's own sources.",
    )
    text_column: str = _setting("text", DATA, "Where JSON Lines, Parquet and datasets of the hub have the text.")
    stream: bool = _setting(
        False,
        DATA,
        "Read and tokenize the text while training, and keep none of it: for text larger than disk or memory. "
        "--resume goes on at the exact sample.",
    )
    corpus_bytes: int | None = _setting(
        None,
        DATA,
        "Take whole documents up to this many bytes. Unset: 5,000,000 of the standard library, all of --data.",
    )
    tokenizer: str = _setting(
        "bytes",
        DATA,
        "bytes; bpe (byte-level BPE) or wordpiece (BERT's, lower-case), trained on the train split; a published one, "
        f"{', '.join(PRETRAINED)}, from the Hugging Face hub or its local cache; or a tokenizer.json.",
    )
    vocab_size: int | None = _setting(
        None, DATA, "Tokens of a vocabulary trained on the text (unset: 4,096). bytes has 257."
    )

    eval_every: int = _setting(100, MEASURE, "Steps between validations; the last step always has one. 0 = only there.")
    eval_batches: int = _setting(8, MEASURE, "Batches in the validation set: the same ones each time.")
    log_every: int = _setting(1, MEASURE, "Steps between records in metrics.jsonl.")
    audit_every: int = _setting(
        10, MEASURE, "Steps between audits of lost updates; the last step always has one. 0 = only there."
    )

    seed: int = _setting(0, RUN, "Fixes initial weights, order of the batches, and stochastic rounding.")
    checkpoint_every: int = _setting(
        100, RUN, "Steps between checkpoints; the last step always has one. 0 = only there."
    )
    keep_checkpoints: int = _setting(2, RUN, "How many of the newest checkpoints are kept.")
    device: str | None = _setting(None, RUN, "cpu, cuda, cuda:1 ...; unset: a GPU if there is one.")
    threads: int | None = _setting(None, RUN, "CPU threads; unset: as many as torch takes.")

    fsdp: bool = _setting(
        False,
        RUN,
        "Shard weights, gradients and optimizer states (FSDP2), so that each process holds a part of every parameter: "
        "torchrun --nproc-per-node 8 -m collage train --fsdp ... Without it each has the whole model (DDP). With one "
        "process it has no effect. Any number of processes can resume a checkpoint, with --fsdp or --no-fsdp.",
    )

    from_checkpoint: str | None = _setting(
        None,
        START,
        "Start from this checkpoint, converted to the strategy with its moments and step count: a folder "
        "RUN/checkpoints/step-000300 that `collage train` wrote with any strategy, or RUN for its newest one. Model "
        "and tokenizer are the source run's; its text, --seq-len, batch and optimizer settings are the defaults. The "
        "other defaults become those of a continuation at a low learning rate: --steps 250, --lr a tenth of the source "
        "run's, --min-lr a tenth of --lr, --schedule cosine, --warmup 0. The seed fixes order of the batches (never "
        "the source run's) and stochastic rounding; the weights are the same for every seed.",
    )

    def __post_init__(self) -> None:
        from collage.train.checks import check_types, check_values  # which need this module

        check_types(self)
        object.__setattr__(self, "betas", tuple(self.betas))
        check_values(self)

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of the model's weights: `dtype`, or the strategy's own (fp32 trains a float32 model)."""
        return collage.strategies()[self.strategy].param_dtype(getattr(torch, self.dtype))

    @property
    def warmup_steps(self) -> int:
        """`warmup`, or what it stands for where it is unset."""
        return self.steps // 15 if self.warmup is None else self.warmup

    @property
    def final_lr(self) -> float:
        """`min_lr`, or what it stands for where it is unset."""
        return self.lr / 20 if self.min_lr is None else self.min_lr

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`; settings left out keep their defaults.

        Raises:
            UserError: a key is no setting, or a value isn't allowed.
        """
        unknown_settings(settings)
        return cls(**settings)


OBSERVING = ("log_every", "eval_every", "audit_every")
EXECUTING = ("checkpoint_every", "keep_checkpoints", "device", "threads", "backend", "fsdp")
_FILLED = {"warmup": "warmup_steps", "min_lr": "final_lr"}


def resumed(stored: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The settings a run goes on with: those it was started with, which count, and `given`.

    What is observed and where it is computed may change, but not whether weights in tiles are sharded. More steps are
    allowed under a constant learning rate only: the other schedules depend on the number of steps from the first one
    on.

    Raises:
        UserError: `given` contradicts the run's own settings; the message names each.
    """
    unknown_settings(given)
    free = {*OBSERVING, *EXECUTING}
    if collage.strategies()[stored.strategy].param.borne:
        free.discard("fsdp")  # which decides how high tiles are
    wanted = replace(stored, **given)
    if stored.schedule == "constant" and wanted.steps >= stored.steps:
        free.add("steps")
    changed = [name for name in given if name not in free and _contradicts(name, wanted, stored)]
    if changed:
        listed = "; ".join(f"{option(n)} {getattr(wanted, n)} (the run has {getattr(stored, n)})" for n in changed)
        raise UserError(
            f"a resumed run keeps the settings it was started with, got {listed}; allowed to change: "
            f"{', '.join(map(option, sorted(free - {'steps'})))}, and --steps upwards with --schedule constant. "
            f"Leave the options out, or start another run in another --out"
        )
    # An unset warm-up would grow with the steps, and the steps already made have used the one it stood for.
    warmup = stored.warmup if wanted.steps == stored.steps else stored.warmup_steps
    return replace(stored, **{name: given[name] for name in given if name in free}, warmup=warmup)


def _contradicts(name: str, wanted: TrainConfig, stored: TrainConfig) -> bool:
    """Whether a setting differs in effect; a warm-up or last learning rate left unset contradicts none."""
    if name == "from_checkpoint":
        return not _same_checkpoint(wanted.from_checkpoint, stored.from_checkpoint)
    if name == "data":
        from collage.train.hub import same_data  # which needs this module

        return not same_data(wanted.data, stored.data)
    if name not in _FILLED:
        return getattr(wanted, name) != getattr(stored, name)
    return getattr(wanted, name) not in (None, getattr(stored, _FILLED[name]))


def _same_checkpoint(wanted: str | None, stored: str | None) -> bool:
    """Whether both name one checkpoint; its run's folder stands for it, though the run may have come further since."""
    if wanted is None or stored is None:
        return wanted == stored
    kept = Path(stored).resolve()
    return Path(wanted).resolve() in (kept, kept.parent.parent)


def setting_names() -> list[str]:
    """The names of all settings, in order."""
    return [f.name for f in fields(TrainConfig)]


def unknown_settings(names: Iterable[str]) -> None:
    """Raise `UserError` if one of `names` is no setting, with the nearest name as a remedy."""
    unknown = [name for name in names if name not in setting_names()]
    if unknown:
        near = difflib.get_close_matches(unknown[0], setting_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown settings: {', '.join(unknown)}{hint} Allowed: {', '.join(setting_names())}")


def option(name: str) -> str:
    """The command-line option of the setting `name`."""
    # "from" is no name that Python takes.
    return "--from" if name in ("from_checkpoint", "pretrained") else "--" + name.replace("_", "-")

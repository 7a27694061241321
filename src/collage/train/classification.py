"""Fine-tuning: a sequence classifier on a pre-trained model, as an objective of the loop.

The model is a checkpoint of `collage train`, with the whole value of each weight that its strategy kept, or one of
transformers. The head is transformers' own with fresh weights, a function of the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import collage
from collage.train import continuation
from collage.train.config import BYTE_VOCABULARY, TrainConfig, UserError
from collage.train.data import Corpus, CorpusInfo, Windows
from collage.train.glue import Example, Examples, measure, read_examples
from collage.train.models import fresh_weights
from collage.train.objectives import Batch, Objective, device_of
from collage.train.tokens import read_tokenizer, special

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- the model that is fine-tuned ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretrained:
    """A model to fine-tune.

    Attributes:
        path: its folder.
        tokenizer: as transformers has it, with a padding token.
        weights: in float32, of a checkpoint of `collage train`; None: transformers reads them.
    """

    path: Path
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor] | None

    def model(self, labels: int, seed: int, attention: str, dropout: float | None) -> PreTrainedModel:
        """The classifier in float32 for `labels` classes, 0 for a score; its head a function of the seed.

        Raises:
            UserError: transformers can't make a classifier of it.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the head's weights are missing, as they must be
        try:
            config = AutoConfig.from_pretrained(self.path, num_labels=labels or 1)
            config.pad_token_id = self.tokenizer.pad_token_id
            if dropout is not None:
                for name in (
                    "hidden_dropout_prob",
                    "attention_probs_dropout_prob",
                    "hidden_dropout",
                    "attention_dropout",
                ):
                    if hasattr(config, name):
                        setattr(config, name, dropout)
            options: dict[str, Any] = {"config": config, "dtype": torch.float32, "attn_implementation": attention}
            # A head for other classes, from another task, is left behind.
            options["ignore_mismatched_sizes"] = True
            where: Any = self.path if self.weights is None else None
            with torch.device("meta"):
                kind = type(AutoModelForSequenceClassification.from_config(config))
            if self.weights is not None:
                options["state_dict"] = self.weights
            with fresh_weights(seed):
                model = kind.from_pretrained(where, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--from must be a model that transformers can classify with, got {self.path}: {error}"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        return model.train()


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")


def read_pretrained(path: Path) -> Pretrained:
    """The model in the folder `path`: a run or a checkpoint of `collage train`, or a checkpoint of transformers.

    Raises:
        UserError: there is none, or it has no tokenizer.
    """
    if _is_of_collage(path):
        source = continuation.read(continuation.find(path))
        groups = source.saved.optimizer["param_groups"]
        names = [name for group in groups for name in group["param_names"]]
        full = collage.convert.to_fp32(source.saved.weights, source.saved.optimizer, names=names)
        text = continuation.tokenizer_json(source.config, *source.folders)
        return Pretrained(source.path, _wrapped(byte_tokenizer() if text is None else read_tokenizer(text)), full.model)
    # Without these files transformers would make an empty tokenizer.
    if not (path / "config.json").is_file() or not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            "--from must be a folder that `collage train` wrote, a run or a checkpoint, or a checkpoint of "
            f"transformers with its tokenizer, got {path}, which has the "
            f"files of neither (config.json, and one of {', '.join(_TOKENIZER_FILES)})"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--from must be a checkpoint of transformers with its tokenizer, got {path}: {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Pretrained(path, tokenizer, None)


def _is_of_collage(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / "trainer.json").is_file() or (path / "checkpoints").is_dir()


def byte_tokenizer() -> Tokenizer:
    """The byte tokenizer of `collage train` as one of the library tokenizers: the same numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from collage.train.models import END_OF_DOCUMENT

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens([END_OF_DOCUMENT])
    assert made.token_to_id(END_OF_DOCUMENT) == BYTE_VOCABULARY - 1
    return made


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer of `collage train` for transformers, which joins sentences as the model's family does.

    BERT: [CLS] a [SEP] b [SEP]; RoBERTa: <s> a </s></s> b </s>; decoders: a, the end of a document, b.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    names = special(tokenizer)
    pad = names.pad or names.end
    inputs = ["input_ids", "attention_mask"]
    if names.mask is None:
        one, two, used = "$A", f"$A {names.end} $B", [names.end]
    elif names.cls == "[CLS]":
        one, two, used = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ["[CLS]", "[SEP]"]
        inputs.append("token_type_ids")
    else:
        one, two, used = "<s> $A </s>", "<s> $A </s> </s> $B </s>", ["<s>", "</s>"]
    tokens = [(name, tokenizer.token_to_id(name)) for name in used]
    tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=tokens)  # pyright: ignore
    tokenizer.encode_special_tokens = True  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, model_input_names=inputs)


# ---- the objective ---------------------------------------------------------------------------------------------


class Encoded(Windows):
    """Encoded examples, visited as windows of text are: an epoch sees each once."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        firsts = [example.text[0] for example in examples]
        seconds = [example.text[1] for example in examples] if len(examples[0].text) > 1 else None
        # Text that names a special token doesn't become one.
        made = tokenizer(firsts, seconds, truncation=True, max_length=longest, split_special_tokens=True)
        self.inputs = {name: [np.asarray(row) for row in made[name]] for name in made if name != "attention_mask"}
        self.lengths = np.array([len(row) for row in self.inputs["input_ids"]])
        self.labels = np.array([example.label for example in examples])
        self.marks = [example.mark for example in examples]
        self.count = len(examples)
        self._tokens, self._seq_len = np.concatenate(self.inputs["input_ids"]), longest

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers themselves: examples differ in length."""
        return numbers


class Classification(Objective):
    """The class of a sentence or a pair, or its score.

    Args:
        config: the settings.
        examples: the data set.
        tokenizer: the model's.
    """

    terms = ("classification_loss",)

    def __init__(self, config: TrainConfig, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers import DataCollatorWithPadding

        self._size, self._config, self._examples = config.batch_size, config, examples
        self._pad, self._totals = DataCollatorWithPadding(tokenizer), dict[int, np.ndarray]()
        self.training: Encoded = Encoded(examples.train, tokenizer, config.seq_len)
        self.held_out: Encoded = Encoded(examples.validation, tokenizer, config.seq_len)

    def batch(self, step: int, seed: int, share: slice) -> Batch:
        """The examples of optimizer step `step` at the places `share` of the batch."""
        return self._padded(self.training, self.training.batch(step, self._size, seed)[share])

    def validation(self, share: slice) -> Batch:
        """The places `share` of all that is validated on."""
        return self._padded(self.held_out, np.arange(self.held_out.count)[share])

    @property
    def validation_size(self) -> int:
        """Examples to validate on."""
        return self.held_out.count

    def _padded(self, source: Encoded, numbers: np.ndarray) -> Batch:
        rows = [{name: each[n].tolist() for name, each in source.inputs.items()} for n in numbers]
        labels = torch.from_numpy(source.labels[numbers])
        labels = labels.long() if self._examples.labels else labels.float()
        marks = tuple(source.marks[n] for n in numbers)
        return Batch(dict(self._pad(rows)) if rows else {}, labels, marks=marks)

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The mean cross-entropy, or of scores the mean squared error."""
        return [self._loss(self._logits(model, batch), batch)]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        device = device_of(model)
        # Micro-batches of a padded batch keep its length: what is beyond their own longest is masked.
        return model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()}).logits.float()

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels.to(logits.device)
        return cross_entropy(logits, labels) if self._examples.labels else mse_loss(logits.squeeze(-1), labels)

    def validated(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Any]]:
        """The loss of a batch, and of each example (mark, prediction, label)."""
        logits = self._logits(model, batch)
        predicted = logits.argmax(-1) if self._examples.labels else logits.squeeze(-1)
        rows = zip(batch.marks, predicted.tolist(), batch.labels.tolist(), strict=True)
        return self._loss(logits, batch), list(rows)

    def metrics(self, predictions: list[Any]) -> dict[str, float]:
        """The task's figures; MNLI's mismatched set has them for itself."""
        found: dict[str, float] = {}
        for mark in dict.fromkeys(self.held_out.marks):
            chosen = [(predicted, label) for own, predicted, label in predictions if own == mark]
            figures = measure(self._examples.metrics, [p for p, _ in chosen], [label for _, label in chosen])
            found |= {f"{name}{mark}": value for name, value in figures.items()}
        return found

    def tokens(self, step: int, seed: int) -> int:
        """Tokens trained on up to `step`, without padding."""
        if step and seed not in self._totals:
            visited = np.concatenate(list(self.training._visits(0, self._config.steps * self._size, seed)))
            sums = self.training.lengths[visited].reshape(-1, self._size).sum(1).cumsum()
            self._totals[seed] = sums
        return int(self._totals[seed][step - 1]) if step else 0

    def sha256(self, steps: int, seed: int) -> str:
        """A hash of all that the batches of a run follow from."""
        own = self._examples.sha256()
        return hashlib.sha256(f"{own} {self.training.sha256(steps, self._size, seed)}".encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What run.json says about the objective."""
        return {"name": "classification" if self._examples.labels else "regression", "task": self._config.task} | {
            "labels": list(self._examples.labels),
            "metrics": list(self._examples.metrics),
            "rows_left_out": self._examples.left_out,
        }


@dataclass(frozen=True)
class FineTuning:
    """All that a run of fine-tuning is made of, but for the settings."""

    examples: Examples
    pretrained: Pretrained
    objective: Classification
    text: Corpus

    def model(self, seed: int, attention: str, dropout: float | None) -> PreTrainedModel:
        """The classifier, see `Pretrained.model`."""
        return self.pretrained.model(len(self.examples.labels), seed, attention, dropout)


def prepare(config: TrainConfig) -> FineTuning:
    """Read the model and the examples that `config` names.

    Raises:
        UserError: one of them is missing or doesn't fit.
    """
    pretrained, examples = read_pretrained(Path(str(config.pretrained))), read_examples(config)
    objective = Classification(config, examples, pretrained.tokenizer)
    tokens = objective.training, objective.held_out
    info = CorpusInfo(
        examples.name,
        examples.sha256(),
        len(examples.train) + len(examples.validation),
        int(tokens[0].lengths.sum()),
        int(tokens[1].lengths.sum()),
        type(pretrained.tokenizer).__name__,
        len(pretrained.tokenizer),
    )
    backend: Any = getattr(pretrained.tokenizer, "backend_tokenizer", None)
    text = None if backend is None else backend.to_str()
    return FineTuning(examples, pretrained, objective, Corpus(info, np.empty(0), np.empty(0), text))

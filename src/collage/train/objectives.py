"""What models are trained to predict: the next token, or masked tokens, with or without the next sentence.

An objective makes the batches of a run and gives their loss. Every batch is a function of the settings, the seed and
the step; what is drawn for a sample, of these and its place in the batch, so that neither the number of processes nor
the size of the micro-batches changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from collage.train.config import TrainConfig, UserError
from collage.train.data import Corpus, Tokens, Windows, keyed
from collage.train.models import CAUSAL, MASKED, MASKED_PAIRS, MODELS
from collage.train.stream import Stream, StreamedTokens, windows
from collage.train.tokens import Special, number, read_tokenizer, special

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

IGNORED = -100
"""The label of a position where nothing is predicted."""

MASKED_SHARE = 0.15
"""Of the tokens of a sequence; of these 80 % become the mask token and 10 % a random one (BERT, section 3.1)."""

UNRELATED_SHARE = 0.5
"""Of the pairs whose second half is another document's (BERT, section 3.1)."""

_MASKS, _PAIRS, _DROPOUT, _VALIDATION = 1, 2, 3, 0


# ---- batches ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Sequences and what is to be predicted of them.

    Attributes:
        inputs: what the model takes, each int64 [sequences, positions].
        labels: int64 [sequences, positions], `IGNORED` where nothing is predicted; of a classifier [sequences].
        follows: int64 [sequences], 0 where the second half follows the first and 1 where it doesn't; or None.
        marks: of each sequence the validation set it belongs to, where a task has several; or none.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    follows: Tensor | None = None
    marks: tuple[str, ...] = ()

    def split(self, size: int) -> list[Batch]:
        """Parts of `size` sequences; of no sequences none."""
        starts = range(0, len(self.labels), size)
        return [self._part(slice(start, start + size)) for start in starts]

    def _part(self, part: slice) -> Batch:
        inputs = {name: tensor[part] for name, tensor in self.inputs.items()}
        follows = None if self.follows is None else self.follows[part]
        return Batch(inputs, self.labels[part], follows, self.marks[part])

    def predicted(self) -> list[int]:
        """How much is predicted, for each term of the loss: tokens, and pairs where there are some."""
        tokens = int((self.labels != IGNORED).sum())
        return [tokens] if self.follows is None else [tokens, len(self.follows)]


class Objective:
    """The next token at every position (causal language modelling).

    Args:
        config: the settings.
        text: the tokens.

    Raises:
        UserError: a split is shorter than a sequence.
    """

    terms: ClassVar[tuple[str, ...]] = ("causal_loss",)
    """The names of what the loss is the sum of; the first one is what is validated."""

    def __init__(self, config: TrainConfig, text: Corpus) -> None:
        self._size, self._taken = config.batch_size, config.eval_batches * config.batch_size
        self._positions = config.seq_len
        self.training = self._samples(text.train, config.seq_len, "train")
        held_out = self._samples(text.validation, config.seq_len, "validation")
        assert isinstance(held_out, Windows)  # of a stream, too, what is validated on lies in memory
        self.held_out = held_out

    def _samples(self, tokens: Tokens | StreamedTokens, seq_len: int, split: str) -> Windows | Stream:
        return windows(tokens, seq_len, split)

    def batch(self, step: int, seed: int, share: slice) -> Batch:
        """The sequences of optimizer step `step`, from 1, that stand at the places `share` of the batch."""
        return self._make(self.training, self.training.batch(step, self._size, seed, share), (seed, step), share)

    def validation(self, share: slice) -> Batch:
        """The places `share` of the validation set: the same sequences, and the same masks, each time."""
        return self._make(self.held_out, self.held_out.spread(self._taken), (_VALIDATION,), share)

    @property
    def validation_size(self) -> int:
        """Sequences of the validation set."""
        return min(self._taken, self.held_out.count)

    def _make(self, source: Windows | Stream, samples: np.ndarray, keys: tuple[int, ...], share: slice) -> Batch:
        sequences = torch.from_numpy(samples[share])
        return Batch({"input_ids": sequences[:, :-1]}, sequences[:, 1:])

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """For each term the mean over what a batch predicts, 0 where that is nothing; in fp32 from the logits on."""
        device = device_of(model)
        output = model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()}, use_cache=False)
        return [cross_entropy(output.logits.float().flatten(0, 1), batch.labels.flatten().to(device))]

    def validated(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Any]]:
        """The first of the losses, and what `metrics` takes of the batch."""
        return self.losses(model, batch)[0], []

    def metrics(self, predictions: list[Any]) -> dict[str, float]:
        """Figures of the validation set beside the loss, of what `validated` gave for all of it; here none."""
        return {}

    def tokens(self, step: int, seed: int) -> int:
        """Tokens trained on up to `step`."""
        return step * self._size * self._positions

    def sha256(self, steps: int, seed: int) -> str:
        """A hash of all that the batches of a run follow from."""
        return self.training.sha256(steps, self._size, seed)

    def facts(self) -> dict[str, Any]:
        """What run.json says about the objective."""
        return {"name": CAUSAL}


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


class MaskedTokens(Objective):
    """Masked tokens of text that is packed across documents, other ones at each visit (RoBERTa's dynamic masking).

    A sequence is the token of its beginning, text with the separator after each document, and a separator.
    transformers' collator draws the masks, with a generator for each sample.
    """

    terms = ("masked_loss",)
    around = 2
    """Special tokens of a sequence."""

    def __init__(self, config: TrainConfig, text: Corpus) -> None:
        self._tokenizer, self._special = _tokenizer_with_mask(config, text)
        names = (self._special.cls, self._special.sep, self._special.pad)
        self._cls, self._sep, self._pad = (number(self._tokenizer, name) for name in names)
        self._collator = _collator(self._tokenizer, self._special)
        super().__init__(config, text)

    def _samples(self, tokens: Tokens | StreamedTokens, seq_len: int, split: str) -> Windows | Stream:
        # A window has one token more than its length, which belongs to the next one.
        return windows(tokens, seq_len - self.around, split)

    def _make(self, source: Windows | Stream, samples: np.ndarray, keys: tuple[int, ...], share: slice) -> Batch:
        inner = torch.from_numpy(samples[share][:, :-1])
        ends = [torch.full((len(inner), 1), token) for token in (self._cls, self._sep)]
        return self._masked(torch.cat([ends[0], inner, ends[1]], dim=1), keyed(len(samples), _MASKS, *keys)[share])

    def _masked(self, sequences: Tensor, sample_keys: np.ndarray) -> Batch:
        """Mask each sequence with the random numbers of its own key."""
        fixed = (sequences == self._cls) | (sequences == self._sep) | (sequences == self._pad)
        inputs, labels = torch.empty_like(sequences), torch.empty_like(sequences)
        for row, key in enumerate(sample_keys):
            self._collator.generator = torch.Generator().manual_seed(int(key >> np.uint64(1)))
            inputs[row], labels[row] = self._collator.torch_mask_tokens(
                sequences[row : row + 1].clone(), special_tokens_mask=fixed[row : row + 1]
            )
        return Batch({"input_ids": inputs}, labels)

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """As for any objective."""
        return [_masked_loss(self._output(model, batch).logits, batch)]

    def _output(self, model: nn.Module, batch: Batch) -> Any:
        device = device_of(model)
        return model(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})

    def sha256(self, steps: int, seed: int) -> str:
        """A hash of all that the batches of a run follow from."""
        return hashlib.sha256(f"{json.dumps(self.facts())} {super().sha256(steps, seed)}".encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What run.json says about the objective."""
        return {"name": MASKED, "masked_share": MASKED_SHARE}


def _masked_loss(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch.labels.flatten()
    places = (labels != IGNORED).nonzero().flatten()  # on the CPU, where labels are: the device need not be waited for
    if not len(places):
        return logits.sum() * 0.0
    chosen = logits.flatten(0, 1).index_select(0, places.to(logits.device))
    return cross_entropy(chosen.float(), labels[places].to(logits.device))


def _tokenizer_with_mask(config: TrainConfig, text: Corpus) -> tuple[Tokenizer, Special]:
    found = None if text.tokenizer_json is None else read_tokenizer(text.tokenizer_json)
    names = None if found is None else special(found)
    if found is None or names is None or not all((names.cls, names.sep, names.mask, names.pad)):
        wanted = ", ".join(MODELS[config.model].family.special_tokens)
        raise UserError(
            f"{config.model} needs a tokenizer with special tokens for beginning, separator, mask and padding (such as "
            f"{wanted}), got {text.info.tokenizer}, which lacks some; take one trained for it, or its published one"
        )
    return found, names


def _collator(tokenizer: Tokenizer, names: Special) -> Any:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=names.mask, pad_token=names.pad)
    return DataCollatorForLanguageModeling(wrapped, mlm_probability=MASKED_SHARE)


# ---- pairs -----------------------------------------------------------------------------------------------------


class Pieces(Windows):
    """A split cut into stretches of text that don't cross the end of a document, as long as may be.

    Args:
        tokens: the split.
        end: the token that ends each document.
        longest: tokens of a stretch; what is left of a document is shorter.
        split: its name.

    Raises:
        UserError: the split has fewer than two documents of two tokens.
    """

    def __init__(self, tokens: Tokens, end: int, longest: int, split: str) -> None:
        ends = _places(tokens, end)
        starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
        kept = ends - starts >= 2
        if kept.sum() < 2:
            raise UserError(
                f"the {split} split must have at least 2 documents of 2 tokens for pairs of sentences, got "
                f"{int(kept.sum())}; give more text"
            )
        self._starts, self._lengths = starts[kept], (ends - starts)[kept]
        # A last stretch of one token can't be halved.
        pieces = self._lengths // longest + (self._lengths % longest >= 2)
        self._before = np.concatenate([[0], np.cumsum(pieces)])
        self.count = int(self._before[-1])
        self.documents = len(self._starts)
        self._tokens, self._seq_len = tokens, longest

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The stretches of these numbers: an int64 array of (start, length, document)."""
        documents = np.searchsorted(self._before, numbers, side="right") - 1
        offsets = (numbers - self._before[documents]) * self._seq_len
        lengths = np.minimum(self._lengths[documents] - offsets, self._seq_len)
        return np.stack([self._starts[documents] + offsets, lengths, documents], axis=1)

    def text(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from `start` on."""
        return self._tokens[start : start + length].astype(np.int64)

    def elsewhere(self, document: int, length: int, which: int, where: int) -> np.ndarray:
        """A stretch of another document, of `length` tokens or all that document's; by two random numbers."""
        other = which % (self.documents - 1)
        other += other >= document
        length = min(length, int(self._lengths[other]))
        start = where % (int(self._lengths[other]) - length + 1)
        return self.text(int(self._starts[other]) + start, length)


def _places(tokens: Tokens, value: int, at_once: int = 2**24) -> np.ndarray:
    """Where `value` stands in `tokens`, read a part at a time since they may be mapped from a large file."""
    parts = range(0, len(tokens), at_once)
    return np.concatenate([np.flatnonzero(tokens[start : start + at_once] == value) + start for start in parts])


class MaskedPairs(MaskedTokens):
    """Masked tokens of two stretches of text, and whether the second one follows the first (BERT).

    A stretch of one document is cut in two at a random place; in half of the samples the second part is replaced by one
    of another document, of the same length or that document's whole. Shorter samples are padded.
    """

    terms = ("masked_loss", "next_sentence_loss")
    around = 3

    def _samples(self, tokens: Tokens | StreamedTokens, seq_len: int, split: str) -> Windows:
        if isinstance(tokens, StreamedTokens):
            raise UserError(
                "pairs of sentences need text that can be looked up, got a stream; leave --stream out (with "
                "`collage data` first, if the text is large)"
            )
        end = number(self._tokenizer, self._special.end)
        return Pieces(tokens, end, seq_len - self.around, split)

    def _make(self, source: Windows | Stream, samples: np.ndarray, keys: tuple[int, ...], share: slice) -> Batch:
        assert isinstance(source, Pieces)
        draws = keyed(len(samples), _PAIRS, *keys)[share]
        pairs = [self._pair(source, sample, int(key)) for sample, key in zip(samples[share], draws, strict=True)]
        shape = (len(pairs), self._positions)
        sequences, kinds = torch.full(shape, self._pad), torch.zeros(shape, dtype=torch.int64)
        real = torch.zeros(shape, dtype=torch.int64)
        for row, (first, second, _) in enumerate(pairs):
            joined = [self._cls, *first, self._sep, *second, self._sep]
            sequences[row, : len(joined)] = torch.tensor(joined)
            kinds[row, len(first) + 2 : len(joined)] = 1
            real[row, : len(joined)] = 1
        masked = self._masked(sequences, keyed(len(samples), _MASKS, *keys)[share])
        inputs = {**masked.inputs, "token_type_ids": kinds, "attention_mask": real}
        return Batch(inputs, masked.labels, torch.tensor([unrelated for *_, unrelated in pairs], dtype=torch.int64))

    def _pair(self, source: Pieces, sample: Sequence[int], key: int) -> tuple[np.ndarray, np.ndarray, int]:
        start, length, document = map(int, sample)
        where, whether, *other = map(int, keyed(4, key))
        cut = 1 + where % (length - 1)
        first = source.text(start, cut)
        if whether < UNRELATED_SHARE * 2**64:
            return first, source.elsewhere(document, length - cut, *other), 1
        return first, source.text(start + cut, length - cut), 0

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """As for any objective."""
        output = self._output(model, batch)
        assert batch.follows is not None
        logits = output.seq_relationship_logits.float()
        return [_masked_loss(output.prediction_logits, batch), cross_entropy(logits, batch.follows.to(logits.device))]

    def facts(self) -> dict[str, Any]:
        """What run.json says about the objective."""
        return {"name": MASKED_PAIRS, "masked_share": MASKED_SHARE, "unrelated_share": UNRELATED_SHARE}


OBJECTIVES = {CAUSAL: Objective, MASKED: MaskedTokens, MASKED_PAIRS: MaskedPairs}


def objective_for(config: TrainConfig, text: Corpus) -> Objective:
    """The objective that the model of `config` is pre-trained with, on the tokens of `text`.

    Raises:
        UserError: the text is too short, or its tokenizer lacks special tokens that the objective needs.
    """
    return OBJECTIVES[MODELS[config.model].family.objective](config, text)


# ---- dropout ---------------------------------------------------------------------------------------------------


@contextmanager
def dropout_bits(device: torch.device, *keys: int) -> Iterator[None]:
    """Within it torch's generators of the CPU and of `device` start from `keys`; afterwards they are as before."""
    seed = int(keyed(1, _DROPOUT, *keys)[0] >> np.uint64(1))
    accelerator = device.type not in ("cpu", "meta")
    with torch.random.fork_rng(devices=[device] if accelerator else [], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if accelerator:
            torch.get_device_module(device).manual_seed(seed)
        yield

"""Text in, batches of tokens out; every batch is a function of the settings, the seed and the step alone.

Documents are numbered in a fixed order (files by name, paragraphs by position). A hash of the number decides which
split a document belongs to, so that editing one document never moves another across. Each split is its documents with
an end-of-document token after each, cut into windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from collage.train.config import TrainConfig, UserError
from collage.train.text import read_documents
from collage.train.tokens import choose, pack

VALIDATION_SHARE = 0.05
_SPLIT_SEED = 20240507
_HASHED_AT_ONCE = 2**20


# ---- a fixed hash ----------------------------------------------------------------------------------------------


def mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64: a bijection whose values look random.

    It stands in for a library's generator because those may change their streams between versions.
    """
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keyed(count: int, *keys: int) -> np.ndarray:
    """`count` uint64 numbers that look random, a function of `keys` (each below 2^64)."""
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix(state ^ np.uint64(key))
    return mix(np.arange(count, dtype=np.uint64) + state)


def validation_documents(count: int) -> np.ndarray:
    """Which of `count` documents are validated on: a boolean array, at least one of each kind (count >= 2)."""
    keys = keyed(count, _SPLIT_SEED)
    chosen = keys < np.uint64(int(VALIDATION_SHARE * 2**64))
    chosen[np.argmin(keys)] = True
    chosen[np.argmax(keys)] = False
    return chosen


@lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits `count` windows, as a read-only array."""
    visits = np.argsort(keyed(count, seed, epoch), kind="stable")
    visits.flags.writeable = False
    return visits


# ---- the corpus ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusInfo:
    """What run.json says about a corpus.

    sha256 is over the text, whatever the tokenizer; `tokenizer_note` says if that isn't the one asked for.
    """

    name: str
    sha256: str
    documents: int
    train_tokens: int
    validation_tokens: int
    tokenizer: str
    vocab_size: int
    tokenizer_note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: two arrays of token numbers, and the tokenizer's own JSON where it has one."""

    info: CorpusInfo
    train: np.ndarray
    validation: np.ndarray
    tokenizer_json: str | None = None

    def save(self, folder: Path) -> None:
        """Write the corpus to a folder that `load_corpus` and many runs can share."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "train.npy", self.train)
        np.save(folder / "validation.npy", self.validation)
        if self.tokenizer_json is not None:
            (folder / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        (folder / "corpus.json").write_text(json.dumps(self.info.to_json(), indent=2) + "\n", encoding="utf-8")


def load_corpus(folder: Path) -> Corpus:
    """A saved corpus, its tokens mapped from the files.

    Raises:
        UserError: the folder holds no prepared corpus.
    """
    try:
        info = CorpusInfo(**json.loads((folder / "corpus.json").read_text(encoding="utf-8")))
        train, validation = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "validation"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"corpus must be a folder with a prepared corpus, got {folder}: {error}") from error
    tokenizer = folder / "tokenizer.json"
    return Corpus(info, train, validation, tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else None)


def prepare_corpus(config: TrainConfig, tokenizer_json: str | None = None) -> Corpus:
    """Read, split and tokenize the text that `config` names.

    Args:
        config: the settings.
        tokenizer_json: a run's tokenizer, to use in place of another.

    Raises:
        UserError: the text is missing, not text, or too small for the settings.
    """
    name, documents = read_documents(config.data, config.corpus_bytes)
    held_out = validation_documents(len(documents))
    train = [text for text, out in zip(documents, held_out, strict=True) if not out]
    validation = [text for text, out in zip(documents, held_out, strict=True) if out]
    chosen = choose(config, train, tokenizer_json)
    arrays = [pack(chosen.tokenizer, split) for split in (train, validation)]
    info = CorpusInfo(
        name,
        _sha256(documents),
        len(documents),
        arrays[0].size,
        arrays[1].size,
        chosen.name,
        chosen.vocab_size,
        chosen.note,
    )
    return Corpus(info, arrays[0], arrays[1], chosen.tokenizer.to_str() if chosen.tokenizer else None)


def _sha256(documents: list[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


# ---- windows and batches ---------------------------------------------------------------------------------------


class Windows:
    """A split cut into windows of seq_len + 1 tokens; neighbours share one, so that each token is predicted once.

    Raises:
        UserError: the split is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, split: str) -> None:
        self.count = (len(tokens) - 1) // seq_len
        if self.count < 1:
            raise UserError(
                f"the {split} split must have at least seq_len + 1 = {seq_len + 1} tokens, got {len(tokens)}; "
                f"give more text or lower seq_len"
            )
        self._tokens, self._seq_len = tokens, seq_len

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The windows of these numbers: an int64 array [len(numbers), seq_len + 1]."""
        starts = numbers[:, None] * self._seq_len + np.arange(self._seq_len + 1)[None, :]
        return self._tokens[starts].astype(np.int64)

    def batch(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """The batch of optimizer step `step`, counted from 1; epochs follow one another without a gap."""
        return self.take(np.concatenate(list(self._visits((step - 1) * batch_size, step * batch_size, seed))))

    def _visits(self, first: int, end: int, seed: int) -> Iterator[np.ndarray]:
        """The numbers of the windows visited from place `first` to before `end`, an array for each epoch."""
        for epoch in range(first // self.count, -(-end // self.count)):
            start = epoch * self.count
            yield order(self.count, seed, epoch)[max(first - start, 0) : end - start]

    def sha256(self, steps: int, batch_size: int, seed: int) -> str:
        """A hash of all the batches of a run: of the tokens, the windows' length, and which windows each step sees."""
        digest = hashlib.sha256(json.dumps([self._seq_len, batch_size, steps]).encode())
        for start in range(0, len(self._tokens), _HASHED_AT_ONCE):
            digest.update(self._tokens[start : start + _HASHED_AT_ONCE].astype("<u4").tobytes())
        for numbers in self._visits(0, steps * batch_size, seed):
            digest.update(numbers.astype("<u8").tobytes())
        return digest.hexdigest()

    def spread(self, most: int) -> np.ndarray:
        """At most `most` windows, evenly spread over the split: always the same ones."""
        taken = min(most, self.count)
        return self.take(np.arange(taken) * self.count // taken)

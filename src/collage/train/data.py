"""Text in, batches of tokens out; every batch is a function of the settings, the seed and the step alone.

Documents are numbered in a fixed order (files by name, documents by position). A hash of the number decides which
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

from collage.train import corpusfiles
from collage.train.config import TrainConfig, UserError, option
from collage.train.corpusfiles import SPLITS, ShardedTokens, is_corpus, update_hash
from collage.train.hub import pinned
from collage.train.recipes import recipe
from collage.train.sources import Source, open_source, too_few
from collage.train.tokens import Chosen, choose, end_token, pack

VALIDATION_SHARE = 0.05
TOKENIZER_BYTES = 100_000_000
"""A vocabulary is trained on the first documents of the train split, up to so many bytes."""

_SPLIT_SEED = 20240507
_HASHED_AT_ONCE = 2**20
_ALL = slice(None)

Tokens = np.ndarray | ShardedTokens
"""A split's tokens: `len`, `size` and slices."""


# ---- a fixed hash ----------------------------------------------------------------------------------------------


def mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64: a bijection whose values look random.

    It stands in for a library's generator because those may change their streams between versions.
    """
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keyed(count: int, *keys: int, first: int = 0) -> np.ndarray:
    """Random numbers (uint64) of the places `first` to before `first + count` in the sequence that `keys` name."""
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix(state ^ np.uint64(key))
    return mix(np.arange(first, first + count, dtype=np.uint64) + state)


def held_out(count: int, first: int = 0, *keys: int) -> np.ndarray:
    """Which of `count` documents, numbered from `first` on, are validated on by their numbers alone: booleans."""
    return keyed(count, _SPLIT_SEED, *keys, first=first) < np.uint64(int(VALIDATION_SHARE * 2**64))


def validation_documents(count: int) -> np.ndarray:
    """Which of `count` documents are validated on: a boolean array, at least one of each kind (count >= 2)."""
    chosen, keys = held_out(count), keyed(count, _SPLIT_SEED)
    chosen[np.argmin(keys)] = True
    chosen[np.argmax(keys)] = False
    return chosen


@lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits `count` windows, as a read-only array."""
    visits = np.argsort(keyed(count, seed, epoch), kind="stable")
    visits.flags.writeable = False
    return visits


# ---- from documents to tokens ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitBatch:
    """Consecutive documents.

    Attributes:
        documents: their texts.
        held_out: which of them are validated on.
        read: how much of the source's size was read up to the last one's end.
    """

    documents: list[str]
    held_out: np.ndarray
    read: int

    def of(self, split: str) -> list[str]:
        """The documents of a split."""
        wanted = split == "validation"
        return [text for text, out in zip(self.documents, self.held_out, strict=True) if out == wanted]

    def tokens(self, chosen: Chosen) -> dict[str, np.ndarray]:
        """The tokens of each split, the end token after each document."""
        return {split: packed(chosen, self.of(split)) for split in SPLITS}


def packed(chosen: Chosen, documents: list[str]) -> np.ndarray:
    """The tokens of documents, of which there may be none; the end token after each."""
    return pack(chosen.tokenizer, documents) if documents else np.empty(0, np.uint16)


def split_batches(source: Source) -> Iterator[SplitBatch]:
    """All documents of a source, in batches.

    Raises:
        UserError: they can't be read, or there are fewer than two.
    """
    first = 0
    for documents, read in source.batches():
        # The first batch has all documents, or so many that the rule for few changes nothing.
        out = held_out(len(documents), first) if first else validation_documents(len(documents))
        first += len(documents)
        if first < 2:
            raise too_few(source, first)
        yield SplitBatch(documents, out, read)
    if not first:
        raise too_few(source, 0)


def choose_tokenizer(
    config: TrainConfig, batches: Iterator[SplitBatch], tokenizer_json: str | None, most: int = TOKENIZER_BYTES
) -> Chosen:
    """The tokenizer that `config` names, or the one in `tokenizer_json`; of `batches` the train split is trained on.

    Raises:
        UserError: it can't be had.
    """
    needs_none = config.tokenizer == "bytes" or tokenizer_json is not None
    sample = [] if needs_none else list(_up_to(most, (text for batch in batches for text in batch.of("train"))))
    return choose(config, sample, tokenizer_json)


def _up_to(most: int, documents: Iterator[str]) -> Iterator[str]:
    size = 0
    for text in documents:
        size += len(text.encode())
        yield text
        if size >= most:
            return


# ---- the corpus ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusInfo:
    """What run.json says about a corpus.

    sha256 is over the text, whatever the tokenizer; of a stream, whose text nobody has read yet, over what is known of
    it, and documents and train_tokens are None. `tokenizer_note` says if the tokenizer isn't the one asked for.
    """

    name: str
    sha256: str
    documents: int | None
    train_tokens: int | None
    validation_tokens: int
    tokenizer: str
    vocab_size: int
    tokenizer_note: str | None = None
    end_token: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: the tokens of the two splits, and the tokenizer's own JSON where it has one.

    In each split the token `info.end_token` ends every document.
    """

    info: CorpusInfo
    train: Any  # Tokens, or `stream.StreamedTokens`
    validation: Tokens
    tokenizer_json: str | None = None

    def save(self, folder: Path) -> None:
        """Write the corpus to a folder that `load_corpus` and many runs can share."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "train.npy", self.train)
        np.save(folder / "validation.npy", self.validation[:])
        if self.tokenizer_json is not None:
            (folder / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        (folder / "corpus.json").write_text(json.dumps(self.info.to_json(), indent=2) + "\n", encoding="utf-8")


def load_corpus(folder: Path) -> Corpus:
    """A corpus that `collage data` built or `Corpus.save` wrote, its tokens mapped from the files.

    Raises:
        UserError: the folder holds no prepared corpus, or not all of it.
    """
    arrays = (folder / "train.npy").is_file()
    index = corpusfiles.read_json(folder / "corpus.json") if arrays else corpusfiles.read_index(folder)
    file = folder / "tokenizer.json"
    try:
        if arrays:
            info = CorpusInfo(**index)
            train, validation = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS)
        else:
            info = CorpusInfo(**index["info"])
            train, validation = (corpusfiles.map_split(folder, index, split) for split in SPLITS)
        tokenizer_json = file.read_text(encoding="utf-8") if file.exists() else None
        if not arrays and index["tokenizer_sha256"] != text_sha256(tokenizer_json):
            raise UserError(f"{file} must be the corpus's own, got another one; restore it, or build the corpus again")
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"corpus must be a folder with a prepared corpus, got {folder}: {error!r}") from error
    return Corpus(info, train, validation, tokenizer_json)


def text_sha256(text: str | None) -> str | None:
    """The SHA-256 of a text's UTF-8 bytes; None of none."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def prepare_corpus(config: TrainConfig, tokenizer_json: str | None = None) -> Corpus:
    """The tokens of the text that `config` names: mapped from a prepared corpus, a stream, or made here, in memory.

    Args:
        config: the settings.
        tokenizer_json: a run's tokenizer, to use in place of another.

    Raises:
        UserError: the text is missing, not text, too small for the settings, or tokenized in another way.
    """
    if is_corpus(config.data):
        return _prepared(config, tokenizer_json)
    if config.stream:
        from collage.train.stream import open_stream  # which needs this module

        return open_stream(config, tokenizer_json)
    source = open_source(config.data, config.text_column, config.corpus_bytes)
    chosen = choose_tokenizer(config, split_batches(source), tokenizer_json)
    pieces: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    digest, documents = hashlib.sha256(), 0
    for batch in split_batches(source):
        update_hash(digest, batch.documents)
        documents += len(batch.documents)
        for split, tokens in batch.tokens(chosen).items():
            pieces[split].append(tokens)
    train, validation = (np.concatenate(pieces[split]) for split in SPLITS)
    info = corpus_info(chosen, source.name, digest.hexdigest(), documents, train.size, validation.size)
    return Corpus(info, train, validation, chosen.tokenizer.to_str() if chosen.tokenizer else None)


def corpus_info(
    chosen: Chosen, name: str, sha256: str, documents: int | None, train_tokens: int | None, validation_tokens: int
) -> CorpusInfo:
    """What run.json says about the text `name` in the tokens of `chosen`."""
    counts = (documents, train_tokens, validation_tokens)
    return CorpusInfo(name, sha256, *counts, chosen.name, chosen.vocab_size, chosen.note, end_token(chosen.tokenizer))


# ---- a prepared corpus as --data -------------------------------------------------------------------------------


def with_data(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a new run with what follows from their data.

    That is the present revision of a dataset of the hub, which then stays, or the tokenizer of a prepared corpus.

    Raises:
        UserError: the data can't be reached or used, or the settings name another tokenizer than the corpus has.
    """
    if settings.get("task") is not None:
        return settings  # examples, not text
    data, name = settings.get("data"), settings.get("recipe")
    if data is None and name is not None and settings.get("from_checkpoint") is None:
        data = recipe(name).data
    if not isinstance(data, str):
        return settings
    if not is_corpus(data):
        return {**settings, "data": pinned(data)}
    info = load_corpus(Path(data)).info
    own = {"tokenizer": info.tokenizer, "vocab_size": info.vocab_size}
    _refuse_others({name: settings[name] for name in own if settings.get(name) is not None}, own, data)
    # The recipe's size of a vocabulary is not this one's.
    return {**settings, "tokenizer": info.tokenizer} | ({} if name is None else {"vocab_size": info.vocab_size})


def _refuse_others(given: dict[str, Any], own: dict[str, Any], data: str) -> None:
    changed = [f"{option(name)} {value} (it has {own[name]})" for name, value in given.items() if value != own[name]]
    if changed:
        raise UserError(
            f"a prepared corpus keeps the tokenizer it was built with, got {', '.join(changed)} for {data}; leave the "
            "option out, or build another corpus with `collage data`"
        )


def _prepared(config: TrainConfig, tokenizer_json: str | None) -> Corpus:
    for name in ("corpus_bytes", "stream"):
        if getattr(config, name):
            raise UserError(f"{option(name)} is for text, got it with the prepared corpus {config.data}; leave it out")
    corpus = load_corpus(Path(str(config.data)))
    own = {"tokenizer": corpus.info.tokenizer, "vocab_size": corpus.info.vocab_size}
    given = {"tokenizer": config.tokenizer} | ({"vocab_size": config.vocab_size} if config.vocab_size else {})
    _refuse_others(given, own, str(config.data))
    if tokenizer_json is not None and tokenizer_json != corpus.tokenizer_json:
        raise UserError(
            f"the prepared corpus {config.data} must have the run's own tokenizer, got another {config.tokenizer}; "
            "give the text itself, or a corpus built with `collage data --tokenizer` and the run's tokenizer.json"
        )
    return corpus


# ---- windows and batches ---------------------------------------------------------------------------------------


class Windows:
    """A split cut into windows of seq_len + 1 tokens; neighbours share one, so that each token is predicted once.

    Raises:
        UserError: the split is shorter than one window.
    """

    def __init__(self, tokens: Tokens, seq_len: int, split: str) -> None:
        self.count = (len(tokens) - 1) // seq_len
        if self.count < 1:
            raise UserError(
                f"the {split} split must have at least seq_len + 1 = {seq_len + 1} tokens, got {len(tokens)}; "
                f"give more text or lower seq_len"
            )
        self._tokens, self._seq_len = tokens, seq_len

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The windows of these numbers: an int64 array [len(numbers), seq_len + 1]."""
        starts = (numbers * self._seq_len).tolist()
        return np.stack([self._tokens[start : start + self._seq_len + 1] for start in starts]).astype(np.int64)

    def batch(self, step: int, batch_size: int, seed: int, share: slice = _ALL) -> np.ndarray:
        """The batch of optimizer step `step`, counted from 1; epochs follow one another without a gap.

        A stream, which has the same method, needs to know which `share` of the sequences will be looked at.
        """
        return self.take(np.concatenate(list(self._visits((step - 1) * batch_size, step * batch_size, seed))))

    def _visits(self, first: int, end: int, seed: int) -> Iterator[np.ndarray]:
        """The numbers of the windows visited from place `first` to before `end`, an array for each epoch."""
        for epoch in range(first // self.count, -(-end // self.count)):
            start = epoch * self.count
            yield order(self.count, seed, epoch)[max(first - start, 0) : end - start]

    def sha256(self, steps: int, batch_size: int, seed: int) -> str:
        """A hash of all the batches of a run: of the tokens, the windows' length, and which windows each step sees."""
        digest = hashlib.sha256(json.dumps([self._seq_len, batch_size, steps]).encode())
        if isinstance(self._tokens, ShardedTokens):
            digest.update(self._tokens.sha256.encode())  # known since they were written
        else:
            for start in range(0, len(self._tokens), _HASHED_AT_ONCE):
                digest.update(self._tokens[start : start + _HASHED_AT_ONCE].astype("<u4").tobytes())
        for numbers in self._visits(0, steps * batch_size, seed):
            digest.update(numbers.astype("<u8").tobytes())
        return digest.hexdigest()

    def spread(self, most: int) -> np.ndarray:
        """At most `most` windows, evenly spread over the split: always the same ones."""
        taken = min(most, self.count)
        return self.take(np.arange(taken) * self.count // taken)

"""Text read and tokenized while training: batches that follow from the settings, the seed and the step alone.

The files of a source are dealt to lanes, as many as divide the batch and have a file each. Each lane gives a batch the
same number of sequences, which stand together. A process reads only the lanes of its own share of the batch, and the
number of processes changes no batch, because the lanes don't depend on it. A lane visits its files in an order of its
own in each epoch, fills a block with their documents, cuts the block into windows of seq_len + 1 tokens and visits
these in an order of their own; what is left of a block begins the next one.

Where a lane stands is the place of its block's first document, the tokens left before it, and the number of windows
taken: a run that goes on reads the block again and has the very windows that were to come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from collage.train.config import TrainConfig, UserError
from collage.train.data import (
    Corpus,
    SplitBatch,
    Windows,
    choose_tokenizer,
    corpus_info,
    held_out,
    keyed,
    packed,
    text_sha256,
)
from collage.train.prefetch import Prefetched
from collage.train.sources import BATCH_CHARACTERS, Part, Source, open_source
from collage.train.tokens import Chosen

MOST_LANES = 64
BLOCK_CHARACTERS = 2**23
"""Characters in the blocks of all lanes together: what windows are drawn from."""

TOKENIZER_BYTES = 20_000_000
"""A vocabulary is trained on the stream's first documents, up to so many bytes."""

BATCHES_AHEAD = 4
_FLAGS_AT_ONCE = 1024
_SPLIT_AT_ONCE = 256

Place = tuple[int, int, int]
"""An epoch, a place in the lane's order of its files, and a number of documents in that file."""


def open_stream(config: TrainConfig, tokenizer_json: str | None = None) -> Corpus:
    """The text that `config` names, to be read while training; its validation split is read here.

    That is the first held-out documents, as many as the validation set needs.

    Raises:
        UserError: the text can't be read, or has no document to validate on.
    """
    source = open_source(config.data, config.text_column, None, streaming=True)
    chosen = choose_tokenizer(config, _in_order(source), tokenizer_json, TOKENIZER_BYTES)
    needed = config.eval_batches * config.batch_size * config.seq_len + 1
    validation = _first_held_out(source, chosen, needed)
    info = corpus_info(chosen, source.name, source.identity, None, None, validation.size)
    tokenizer_json = chosen.tokenizer.to_str() if chosen.tokenizer else None
    return Corpus(info, StreamedTokens(source, chosen, text_sha256(tokenizer_json)), validation, tokenizer_json)


def _split(part: Part, number: int, skip: int = 0) -> Iterator[tuple[str, bool]]:
    """The documents of a file from number `skip` on, each with whether it is validated on.

    The first file's are split as a prepared corpus is; the first document of each file is trained on.
    """
    documents = islice(part.read(), skip, None)
    while chunk := list(islice(documents, _FLAGS_AT_ONCE)):
        out = held_out(len(chunk), skip, *([number] if number else []))
        out[0] &= skip > 0
        yield from zip((text for text, _ in chunk), out.tolist(), strict=True)
        skip += len(chunk)


def _in_order(source: Source) -> Iterator[SplitBatch]:
    """All documents of a source, file by file."""
    for number, part in enumerate(source.parts):
        documents = _split(part, number)
        while batch := list(islice(documents, _SPLIT_AT_ONCE)):
            yield SplitBatch([text for text, _ in batch], np.array([out for _, out in batch]), 0)


def _first_held_out(source: Source, chosen: Chosen, needed: int) -> np.ndarray:
    pieces, size = [np.empty(0, np.uint16)], 0
    for batch in _in_order(source):
        pieces.append(packed(chosen, batch.of("validation")))
        size += len(pieces[-1])
        if size >= needed:
            break
    if not size:
        raise UserError(
            f"a stream must have documents to validate on, got none held out in {source.name}: one in twenty is, by a "
            "hash of its number; give more text, or leave --stream out"
        )
    return np.concatenate(pieces)[:needed]


# ---- lanes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where a lane stands: the place of its block's first document, the tokens before it, and windows taken of it."""

    epoch: int = 0
    file: int = 0
    document: int = 0
    carry: tuple[int, ...] = ()
    window: int = 0

    @property
    def place(self) -> Place:
        """The place of the block's first document."""
        return self.epoch, self.file, self.document


class Lane:
    """The windows of some of a source's files, endlessly.

    Args:
        parts: the files, by their numbers in the source.
        chosen: the tokenizer.
        seq_len: a window has one token more, which it shares with the next one.
        characters: of a block, or a document more.
        keys: what the order of files and windows follows from.
        position: where to begin.
    """

    def __init__(
        self,
        parts: dict[int, Part],
        chosen: Chosen,
        seq_len: int,
        characters: int,
        keys: tuple[int, ...],
        position: Position,
    ) -> None:
        self._parts, self._chosen, self._seq_len, self._characters = list(parts.items()), chosen, seq_len, characters
        self._keys = keys
        self._documents = self._read(position.place)
        self._fill(position)

    @property
    def position(self) -> Position:
        """Where the lane stands."""
        return replace(self._start, window=self._taken)

    def next(self) -> np.ndarray:
        """The next window: int64 [seq_len + 1]."""
        while self._taken >= len(self._order):
            rest = self._tokens[len(self._order) * self._seq_len :]
            self._fill(Position(*self._next_place, carry=tuple(rest.tolist())))
        start = int(self._order[self._taken]) * self._seq_len
        self._taken += 1
        return self._tokens[start : start + self._seq_len + 1]

    def _fill(self, start: Position) -> None:
        """Make the block that begins at `start`, where the documents have been read up to."""
        self._next_place = start.place
        pieces = [np.array(start.carry, dtype=np.int64)]
        texts = self._block()
        while some := _some(texts):
            pieces.append(packed(self._chosen, some).astype(np.int64))
        self._tokens = np.concatenate(pieces)
        self._order = _visits(max(0, (len(self._tokens) - 1) // self._seq_len), *self._keys, *start.place)
        self._start, self._taken = start, start.window

    def _block(self) -> Iterator[str]:
        """The next documents, up to the end of the epoch or as many characters as a block has."""
        size = 0
        for text, place in self._documents:
            self._next_place = place
            if text is None:
                return
            yield text
            size += len(text)
            if size >= self._characters:
                return

    def _read(self, place: Place) -> Iterator[tuple[str | None, Place]]:
        """The documents to train on from a place on, each with the place after it, and None at an epoch's end."""
        epoch, first, skip = place
        while True:
            found = (first, skip) != (0, 0)
            visits = _visits(len(self._parts), *self._keys, epoch)
            for file in range(first, len(visits)):
                number, part = self._parts[visits[file]]
                for document, (text, out) in enumerate(_split(part, number, skip), start=skip + 1):
                    if not out:
                        found = True
                        yield text, (epoch, file, document)
                skip = 0
            if not found:
                listed = ", ".join(part.name for _, part in self._parts[:3])
                raise UserError(f"a stream's files must have documents to train on, got none in {listed}")
            epoch, first = epoch + 1, 0
            yield None, (epoch, 0, 0)


def _some(texts: Iterator[str]) -> list[str]:
    """The next texts, up to about a million characters: what is tokenized at once bounds the memory for it."""
    taken: list[str] = []
    size = 0
    for text in texts:
        taken.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            break
    return taken


def _visits(count: int, *keys: int) -> np.ndarray:
    """An order of the numbers below `count` that follows from `keys`."""
    return np.argsort(keyed(count, *keys), kind="stable")


def lane_count(batch_size: int, files: int) -> int:
    """The largest divisor of the batch that is no more than the files, or `MOST_LANES`."""
    return max(n for n in range(1, min(batch_size, files, MOST_LANES) + 1) if batch_size % n == 0)


# ---- the stream ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamedTokens:
    """A train split that is read while training.

    Attributes:
        source: where from.
        chosen: its tokenizer.
        tokenizer_sha256: of the tokenizer's JSON; None for bytes.
    """

    source: Source
    chosen: Chosen
    tokenizer_sha256: str | None


class Stream:
    """Windows of `seq_len` + 1 tokens of a text that is read as they are asked for, by a thread that is ahead.

    It takes the place of `data.Windows`, but goes forward only: from the first step, or from the state given to `load`.
    """

    def __init__(self, tokens: StreamedTokens, seq_len: int) -> None:
        self._tokens, self._seq_len = tokens, seq_len
        self._step = 0
        self._positions: dict[int, Position] = {}
        self._ahead: Prefetched[tuple[np.ndarray, dict[int, Position]]] | None = None

    def batch(self, step: int, batch_size: int, seed: int, share: slice = slice(None)) -> np.ndarray:
        """The batch of optimizer step `step`: int64 [batch_size, seq_len + 1].

        Args:
            step: the one after the last.
            batch_size: the same in all steps.
            seed: the same in all steps.
            share: which sequences are wanted; others are 0 unless their lane is read anyway.

        Raises:
            ValueError: the step isn't the next one.
            UserError: the text can't be read.
        """
        if step != self._step + 1:
            raise ValueError(f"a stream's next step is {self._step + 1}, got {step}")
        if self._ahead is None:
            self._ahead = Prefetched(self._batches(batch_size, seed, share, dict(self._positions)), BATCHES_AHEAD)
        batch, self._positions = next(self._ahead)
        self._step = step
        return batch

    def _batches(
        self, size: int, seed: int, share: slice, positions: dict[int, Position]
    ) -> Iterator[tuple[np.ndarray, dict[int, Position]]]:
        count = lane_count(size, len(self._tokens.source.parts))
        each = size // count
        wanted = sorted({row // each for row in range(size)[share]})
        if positions and not positions.keys() >= set(wanted):
            raise ValueError(f"the state of a stream must have the lanes {wanted}, got {sorted(positions)}")
        lanes = {lane: self._lane(lane, count, seed, positions.get(lane, Position())) for lane in wanted}
        while True:
            batch = np.zeros((size, self._seq_len + 1), dtype=np.int64)
            for number, lane in lanes.items():
                batch[number * each : (number + 1) * each] = [lane.next() for _ in range(each)]
            yield batch, {number: lane.position for number, lane in lanes.items()}

    def _lane(self, number: int, count: int, seed: int, position: Position) -> Lane:
        parts = dict(list(enumerate(self._tokens.source.parts))[number::count])
        characters = max(1, BLOCK_CHARACTERS // count)
        return Lane(parts, self._tokens.chosen, self._seq_len, characters, (seed, number), position)

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on after the last batch that was handed out, as JSON: of the lanes read here."""
        lanes = {str(number): asdict(position) for number, position in self._positions.items()}
        return {"step": self._step, "lanes": lanes}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state; of several processes' ones, from `merged`."""
        self.close()
        lanes = {int(number): dict(lane) for number, lane in state["lanes"].items()}
        self._positions = {n: Position(**{**lane, "carry": tuple(lane["carry"])}) for n, lane in lanes.items()}
        self._step = state["step"]

    def sha256(self, steps: int, batch_size: int, seed: int) -> str:
        """A hash of all that the batches follow from, but for the text itself, which is yet to be read."""
        tokens = self._tokens
        facts = [tokens.source.identity, tokens.chosen.name, tokens.tokenizer_sha256]
        return hashlib.sha256(json.dumps([*facts, self._seq_len, batch_size, steps, seed]).encode()).hexdigest()

    def close(self) -> None:
        """End the thread that reads ahead; the stream stands where its last batch left it."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole stream from those of all processes, each of which reads some lanes."""
    return {**states[0], "lanes": {number: lane for state in states for number, lane in state["lanes"].items()}}


def windows(tokens: Any, seq_len: int, split: str) -> Windows | Stream:
    """A split cut into windows, whether it lies in memory or files or is read while training.

    Raises:
        UserError: the split is shorter than one window.
    """
    return Stream(tokens, seq_len) if isinstance(tokens, StreamedTokens) else Windows(tokens, seq_len, split)

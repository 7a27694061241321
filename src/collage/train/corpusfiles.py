"""A corpus on disk: token numbers in shards that are mapped into memory, and an index.

corpus.json                  what the corpus is, and every file's size and hash; written last
tokenizer.json               its tokenizer; none for bytes
shard-00000/train.bin        the train split's tokens, little-endian uint16 or uint32
shard-00000/train.ends       where its documents end, little-endian uint64 counts of tokens within the file
shard-00000/validation.bin, validation.ends    the same of the validation split
shard-00000/shard.json       the shard's entry in the index

A shard is written aside, as .shard-00000, and renamed: a folder that bears its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collage.train.config import UserError
from collage.train.runfiles import write_json

FORMAT = 2
INDEX, SETTINGS, TOKENIZER = "corpus.json", "building.json", "tokenizer.json"
SPLITS = ("train", "validation")
_HASHED_AT_ONCE = 2**24


class ShardedTokens:
    """Arrays of tokens one behind another, read as one array: `len` and slices.

    Args:
        arrays: the tokens, usually mapped from files.
        sha256: a hash of them all.
    """

    def __init__(self, arrays: Sequence[np.ndarray], sha256: str) -> None:
        self.sha256 = sha256
        self._arrays = [array for array in arrays if len(array)]
        self._ends = np.cumsum([len(array) for array in self._arrays])
        self.size = int(self._ends[-1]) if self._arrays else 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, taken: slice) -> np.ndarray:
        start, stop, step = taken.indices(self.size)
        if step != 1:
            raise ValueError(f"the step of a slice of tokens must be 1, got {step}")
        pieces: list[np.ndarray] = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            array, end = self._arrays[shard], int(self._ends[shard])
            first = start - (end - len(array))
            pieces.append(array[first : first + min(stop, end) - start])
            start, shard = min(stop, end), shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, np.uint16)


# ---- writing ---------------------------------------------------------------------------------------------------


class ShardWriter:
    """One shard in the making; nothing bears its final name before `finish`.

    Args:
        folder: of the corpus.
        number: the shard's.
        dtype: of a token: uint16 or uint32.
    """

    def __init__(self, folder: Path, number: int, dtype: np.dtype[Any]) -> None:
        self.documents = self.text_bytes = self.tokens = 0
        self._target = folder / f"shard-{number:05d}"
        self._aside = folder / f".{self._target.name}"
        self._dtype = dtype.newbyteorder("<")
        self._text = hashlib.sha256()
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        self._files = {name: _HashedFile(self._aside / name) for split in SPLITS for name in _names(split)}
        self._counts: dict[str, int] = dict.fromkeys(SPLITS, 0)

    def add(self, documents: list[str], tokens: dict[str, np.ndarray], end: int) -> None:
        """Append consecutive documents, and of each split the tokens, in which the token `end` ends a document."""
        update_hash(self._text, documents)
        self.documents += len(documents)
        self.text_bytes += sum(len(text.encode()) for text in documents)
        for split, array in tokens.items():
            data, ends = (self._files[name] for name in _names(split))
            data.write(array.astype(self._dtype, copy=False))
            ends.write((np.flatnonzero(array == end) + 1 + self._counts[split]).astype("<u8"))
            self._counts[split] += len(array)
            self.tokens += len(array)

    def finish(self) -> None:
        """Bring the shard to the disk and give it its name."""
        files = {name: file.close() for name, file in self._files.items()}
        entry = {
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "text_sha256": self._text.hexdigest(),
            **{f"{split}_tokens": count for split, count in self._counts.items()},
            "files": files,
        }
        write_json(self._aside / "shard.json", entry)
        sync(self._aside)
        self._aside.rename(self._target)
        sync(self._target.parent)

    def abandon(self) -> None:
        """Close and remove what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._aside, ignore_errors=True)


def _names(split: str) -> tuple[str, str]:
    return f"{split}.bin", f"{split}.ends"


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._size = path.open("wb"), hashlib.sha256(), 0

    def write(self, array: np.ndarray) -> None:
        raw = array.tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self._size += len(raw)

    def close(self) -> dict[str, Any]:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def sync(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def update_hash(digest: Any, documents: list[str]) -> None:
    """Add documents to a hash of the text: each one's length in bytes and its UTF-8 bytes."""
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)


def finished_shards(folder: Path) -> list[dict[str, Any]]:
    """The entries of the whole shards, in order."""
    entries: list[dict[str, Any]] = []
    while (file := folder / f"shard-{len(entries):05d}" / "shard.json").is_file():
        entries.append(read_json(file))
    return entries


# ---- reading ---------------------------------------------------------------------------------------------------


def is_corpus(data: str | None) -> bool:
    """Whether `data` is the folder of a corpus that `collage data` builds, finished or not."""
    return data is not None and any((Path(data) / name).is_file() for name in (INDEX, SETTINGS))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a corpus. Raises UserError if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} of a prepared corpus can't be read: {error}; build the corpus again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} of a prepared corpus must hold a JSON object, got a {type(value).__name__}")
    return value


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a corpus.

    Raises:
        UserError: the folder holds no finished corpus of this format.
    """
    if not (folder / INDEX).is_file():
        if not is_corpus(str(folder)):
            raise UserError(f"data must be a folder that `collage data` built, got {folder}, which holds no {INDEX}")
        raise UserError(
            f"the corpus in {folder} must be whole, got one whose making was cut off; go on with the `collage data` "
            "that began it"
        )
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise UserError(
            f"{folder} must be a prepared corpus of format {FORMAT}, got {index.get('format')!r}; build it again"
        )
    return index


def map_split(folder: Path, index: dict[str, Any], split: str) -> ShardedTokens:
    """The tokens of a split, mapped from the files; their sizes are checked, their content isn't.

    Raises:
        UserError: a file is missing or of another size.
    """
    dtype, digest = np.dtype(index["dtype"]).newbyteorder("<"), hashlib.sha256()
    arrays = []
    for number, entry in enumerate(index["shards"]):
        data, ends = (folder / f"shard-{number:05d}" / name for name in _names(split))
        for path in (data, ends):
            _check_size(path, entry["files"][path.name]["bytes"])
        count = entry[f"{split}_tokens"]
        arrays.append(np.memmap(data, dtype, "r", shape=(count,)) if count else np.empty(0, dtype))
        digest.update(bytes.fromhex(entry["files"][data.name]["sha256"]))
    return ShardedTokens(arrays, digest.hexdigest())


def _check_size(path: Path, wanted: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != wanted:
        raise UserError(
            f"{path} must have {wanted:,} bytes, got {'no file' if found is None else f'{found:,}'}; restore the "
            "corpus, or build it again"
        )


def damaged_files(folder: Path, index: dict[str, Any]) -> list[str]:
    """The files of a corpus whose content isn't what was built, by the index's hashes. Reads everything."""
    found = []
    for number, entry in enumerate(index["shards"]):
        for name, facts in entry["files"].items():
            path = folder / f"shard-{number:05d}" / name
            if not path.is_file() or _file_sha256(path) != facts["sha256"]:
                found.append(f"{path.parent.name}/{name}")
    return found


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()

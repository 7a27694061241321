"""Sources of text: what `--data` names, as files with documents in a fixed order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from collage.train import hub
from collage.train.config import UserError
from collage.train.text import (
    DOCUMENT_CHARACTERS,
    Documents,
    kind,
    reader,
    standard_library,
    visible_files,
    whole_files,
)

STANDARD_LIBRARY_BYTES = 5_000_000
BATCH_CHARACTERS = 2**20
SPLIT_KNOWN = 10
"""From so many documents on, a document's split depends on its number alone (`data.validation_documents`)."""


@dataclass(frozen=True)
class Part:
    """A file of a source.

    Attributes:
        name: what it is called in the source.
        size: in bytes or rows, one unit for all parts; 0 where it isn't known.
        read: a fresh reader of its documents; each comes with how much of the size was read up to its end.
    """

    name: str
    size: int
    read: Callable[[], Documents]


@dataclass(frozen=True)
class Source:
    """Text to train on; opening it reads no document.

    Attributes:
        name: for people and run.json.
        parts: its files, in order.
        limit: whole documents are taken up to this many UTF-8 bytes; None: all.
    """

    name: str
    parts: Sequence[Part]
    limit: int | None = None

    @property
    def size(self) -> int | None:
        """The sum of the parts' sizes; None where it isn't known."""
        return sum(part.size for part in self.parts) or None

    @property
    def identity(self) -> str:
        """A hash of the name, the parts' names and sizes: what is known of a text before it is read."""
        facts = [self.name, self.limit, [[part.name, part.size] for part in self.parts]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def documents(self) -> Documents:
        """All documents, with how much of the size was read; at most `limit` bytes."""
        before = taken = 0
        for part in self.parts:
            for text, read in part.read():
                taken += len(text.encode())
                if self.limit is not None and taken > self.limit:
                    return
                yield text, before + read
            before += part.size

    def batches(self) -> Iterator[tuple[list[str], int]]:
        """All documents in lists of about a million characters, with how much of the size was read.

        The first list has at least `SPLIT_KNOWN` documents, if there are so many.
        """
        batch: list[str] = []
        size = read = 0
        least = SPLIT_KNOWN
        for text, read in self.documents():
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS and len(batch) >= least:
                yield batch, read
                batch, size, least = [], 0, 1
        if batch:
            yield batch, read


def open_source(data: str | None, column: str, limit: int | None, *, streaming: bool = False) -> Source:
    """The source that `data` names.

    Args:
        data: a text file (documents are groups of paragraphs), a JSON Lines or Parquet file, a folder of files of one
            of these kinds (a text file is one document there), a dataset's name (`hub.HubName`), or None for the
            standard library's sources.
        column: where JSON Lines, Parquet and datasets have the text.
        limit: take whole documents up to this many UTF-8 bytes; None: all, but 5,000,000 of the standard library.
        streaming: read a dataset from the hub as it comes, and don't keep it.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if data is None:
        paths = standard_library()
        limit = STANDARD_LIBRARY_BYTES if limit is None else limit
        return Source("standard library", [_folder_part("standard library", paths)], limit)
    name = hub.hub_name(data)
    if name is not None:
        return Source(str(name), _hub_parts(name, column, streaming=streaming), limit)
    path = Path(data)
    if not path.exists():
        raise UserError(
            f"data must be a text, JSON Lines or Parquet file, a folder of them, or a dataset "
            f"({', '.join(sorted(hub.ALIASES))} or hf:REPOSITORY), got {data}, which doesn't exist"
        )
    parts = _folder(path, column) if path.is_dir() else [_file(path, Path(path.name), column)]
    return Source(path.name, parts, limit)


def too_few(source: Source, count: int) -> UserError:
    """The error of a source with fewer than two documents."""
    bound = "" if source.limit is None else f" within corpus_bytes = {source.limit}"
    return UserError(
        f"data must give at least 2 documents (one to validate on), got {count} from {source.name}{bound}; "
        f"a text file's documents end at blank lines after {DOCUMENT_CHARACTERS:,} characters, a folder's are its files"
    )


def _folder(root: Path, column: str) -> list[Part]:
    files = visible_files(root)
    if not files:
        raise UserError(f"data must be a file or a folder with files in it, got the empty folder {root}")
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(kind(path), []).append(path)
    if len(kinds) > 1:
        listed = ", ".join(f"{len(paths)} {name} ({paths[0].relative_to(root)})" for name, paths in kinds.items())
        raise UserError(f"a folder of data must hold files of one kind, got {listed} in {root}; move the others away")
    if "text" in kinds:
        return [_folder_part(root.name, files)]
    return [_file(path, path.relative_to(root), column) for path in files]


def _folder_part(name: str, paths: list[Path]) -> Part:
    return Part(name, sum(path.stat().st_size for path in paths), lambda: whole_files(paths))


def _file(path: Path, name: Path, column: str) -> Part:
    return Part(name.as_posix(), path.stat().st_size, reader(path, column))


def _hub_parts(name: hub.HubName, column: str, *, streaming: bool) -> list[Part]:
    dataset = hub.load(name, streaming=streaming)
    if not streaming:
        return [Part(str(name), dataset.num_rows, lambda: hub.rows(name, dataset, column))]
    files = enumerate(hub.parts(dataset))
    return [Part(f"{name} {index}", 0, _hub_reader(name, file, column)) for index, file in files]


def _hub_reader(name: hub.HubName, file: object, column: str) -> Callable[[], Documents]:
    return lambda: hub.rows(name, file, column)

"""Documents: the text that a training run reads, from files, in a fixed order."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from collage.train.config import UserError

STANDARD_LIBRARY_BYTES = 5_000_000
DOCUMENT_CHARACTERS = 2_000

# Left out of the standard library: installed packages, tests, and files written by programs (tables, help topics).
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_SKIPPED_FOLDERS |= {"pydoc_data", "lib2to3", "_bundled", "lib-dynload"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "__phello__")


def read_documents(data: str | None, limit: int | None) -> tuple[str, list[str]]:
    """The name of a source of text and its documents, in a fixed order.

    Args:
        data: a text file (documents are groups of paragraphs), a folder (documents are its files), or None for the
            standard library's sources.
        limit: take whole documents up to this many UTF-8 bytes; None: all, but 5,000,000 of the standard library.

    Raises:
        UserError: nothing there, not text, or too little for two documents.
    """
    if data is None:
        name, path = "standard library", Path(sysconfig.get_paths()["stdlib"])
        documents = _read_files(_standard_library(path))
        limit = STANDARD_LIBRARY_BYTES if limit is None else limit
    else:
        path = Path(data)
        if not path.exists():
            raise UserError(f"data must be a text file or a folder, got {data}, which doesn't exist")
        name, documents = path.name, _read_files(_folder(path)) if path.is_dir() else _paragraphs(_read(path))
    taken = list(_up_to(documents, limit))
    if len(taken) < 2:
        bound = "" if limit is None else f" within corpus_bytes = {limit}"
        raise UserError(
            f"data must give at least 2 documents (one to validate on), got {len(taken)} from {path}{bound}; "
            f"a file's documents end at blank lines after {DOCUMENT_CHARACTERS:,} characters, a folder's are its files"
        )
    return name, taken


def _standard_library(root: Path) -> list[Path]:
    paths = [p for p in _walk(root) if p.suffix == ".py" and not p.name.startswith(_SKIPPED_PREFIXES)]
    return sorted(paths, key=lambda p: p.relative_to(root).as_posix())


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS]
        yield from (Path(folder) / f for f in files)


def _folder(root: Path) -> list[Path]:
    files = [p for p in root.rglob("*") if p.is_file()]
    visible = [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if not visible:
        raise UserError(f"data must be a text file or a folder with text files in it, got the empty folder {root}")
    return sorted(visible, key=lambda p: p.relative_to(root).as_posix())


def _read_files(paths: list[Path]) -> Iterator[str]:
    return (text for text in map(_read, paths) if text.strip())


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data must be UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start} in {path}; "
            f"convert the file or keep it out of the folder"
        ) from error
    except OSError as error:
        raise UserError(f"data must be readable, got {path}: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"data must be text, got a zero byte in {path}; keep binary files out")
    return text


def _paragraphs(text: str) -> Iterator[str]:
    """Groups of lines that end at the first blank line after 2,000 characters, or at any line after 8,000."""
    group: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        group.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS * (4 if line.strip() else 1):
            yield "".join(group)
            group, size = [], 0
    if "".join(group).strip():
        yield "".join(group)


def _up_to(documents: Iterator[str], limit: int | None) -> Iterator[str]:
    size = 0
    for text in documents:
        size += len(text.encode())
        if limit is not None and size > limit:
            return
        yield text

"""Documents of local files: each reader yields (text, how many of the file's bytes were read up to its end)."""

from __future__ import annotations

import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from collage.train.config import UserError
from collage.train.extras import need

DOCUMENT_CHARACTERS = 2_000
PARQUET_ROWS = 1_000
_READ_AT_ONCE = 2**18

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)

Documents = Iterator[tuple[str, int]]

# Left out of the standard library: installed packages, tests, and files written by programs (tables, help topics).
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_SKIPPED_FOLDERS |= {"pydoc_data", "lib2to3", "_bundled", "lib-dynload"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "__phello__")


# ---- which files -----------------------------------------------------------------------------------------------


def standard_library() -> list[Path]:
    """The sources of Python's standard library, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in _walk(root) if p.suffix == ".py" and not p.name.startswith(_SKIPPED_PREFIXES)]
    return sorted(paths, key=lambda p: p.relative_to(root).as_posix())


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS]
        yield from (Path(folder) / f for f in files)


def visible_files(root: Path) -> list[Path]:
    """The files in a folder and its subfolders by name, without those that a dot hides."""
    files = [p for p in root.rglob("*") if p.is_file()]
    visible = [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    return sorted(visible, key=lambda p: p.relative_to(root).as_posix())


def kind(path: Path) -> str:
    """What a file is read as, by its name: "JSON Lines", "Parquet" or "text"."""
    if path.name.endswith(JSON_LINES):
        return "JSON Lines"
    return "Parquet" if path.name.endswith(PARQUET) else "text"


def reader(path: Path, column: str) -> Callable[[], Documents]:
    """What reads the documents of a JSON Lines or Parquet file, or the groups of paragraphs of a text file."""
    readers: dict[str, Callable[[], Documents]] = {
        "JSON Lines": lambda: json_lines(path, column),
        "Parquet": lambda: parquet_rows(path, column),
        "text": lambda: paragraphs(path),
    }
    return readers[kind(path)]


# ---- text ------------------------------------------------------------------------------------------------------


def whole_files(paths: list[Path]) -> Documents:
    """Each file a document; blank ones are left out."""
    read = 0
    for path in paths:
        with _readable(path):
            raw = path.read_bytes()
        read += len(raw)
        text = _decoded(raw, path, 0)
        if text.strip():
            yield text, read


def paragraphs(path: Path) -> Documents:
    """Groups of lines that end at the first blank line after 2,000 characters, or at any line after 8,000."""
    group: list[str] = []
    size = read = 0
    for line, read in _lines(path):
        group.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS * (4 if line.strip() else 1):
            yield "".join(group), read
            group, size = [], 0
    if "".join(group).strip():
        yield "".join(group), read


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    read = 0
    with _readable(path), path.open("rb") as file:
        while raw := b"".join(file.readlines(_READ_AT_ONCE)):
            text = _decoded(raw, path, read)
            read += len(raw)
            # Python's text has more line ends than a file's; no UTF-8 sequence has a byte of a newline within.
            yield from ((line, read) for line in text.splitlines(keepends=True))


def _decoded(raw: bytes, path: Path, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data must be UTF-8 text, got byte {raw[error.start]:#04x} at {offset + error.start} in {path}; "
            f"convert the file or keep it out of the folder"
        ) from error
    if "\0" in text:
        raise UserError(f"data must be text, got a zero byte in {path}; keep binary files out")
    return text


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"data must be readable, got {path}: {error.strerror or error}") from error


# ---- JSON Lines and Parquet ------------------------------------------------------------------------------------


def json_lines(path: Path, column: str) -> Documents:
    """The text in `column` of each line's object; blank ones are left out. Packed files are unpacked on the way."""
    with _readable(path), path.open("rb") as file:
        lines = iter(_unpacked(path, file))
        for number in range(1, 2**63):
            where = f"line {number} of {path}"
            try:
                line = next(lines, None)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"data must be a whole file, got damage at {where}: {error}; get it again") from error
            if line is None:
                return
            if line.strip():
                text = _field(_object(line, where), column, where)
                if text.strip():
                    yield text, file.tell()


def _unpacked(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    if path.suffix == ".gz":
        import gzip

        yield from gzip.GzipFile(fileobj=file)
    elif path.suffix == ".zst":
        need("data")
        import zstandard

        try:
            yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
    else:
        yield from file


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"data must have a JSON object on each line, got {where}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"data must have a JSON object on each line, got a {type(value).__name__} on {where}")
    return value


def _field(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise missing_column(column, list(row), where)
    return checked_text(row[column], column, where)


def missing_column(column: str, columns: list[str], where: str) -> UserError:
    """The error of a text column that isn't there."""
    return UserError(
        f"text_column must be a column of the data, got {column!r}, which {where} lacks; it has "
        f"{', '.join(columns) or 'none'}: name the one with the text with --text-column"
    )


def checked_text(value: object, column: str, where: str) -> str:
    """`value` if it is text that UTF-8 can write; a UserError otherwise."""
    if not isinstance(value, str):
        raise UserError(f"column {column!r} must hold text, got a {type(value).__name__} in {where}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"column {column!r} must hold valid text, got half a character in {where}: {error}") from error
    return value


def parquet_rows(path: Path, column: str) -> Documents:
    """The text in `column` of each row; blank ones are left out."""
    need("data")
    import pyarrow
    import pyarrow.parquet

    row = 0
    with _readable(path):
        try:
            size = path.stat().st_size
            with pyarrow.parquet.ParquetFile(path) as file:
                if column not in file.schema_arrow.names:
                    raise missing_column(column, file.schema_arrow.names, str(path))
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        text = checked_text(value, column, f"row {row} of {path}")
                        if text.strip():
                            yield text, size * row // file.metadata.num_rows
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"data must be a whole Parquet file, got {path}: {error}; get it again") from error

from __future__ import annotations

from pathlib import Path

import pytest

from collage.train.config import UserError
from collage.train.data import split_batches
from collage.train.sources import open_source


def read_documents(data: str | None, limit: int | None) -> tuple[str, list[str]]:
    source = open_source(data, "text", limit)
    return source.name, [text for batch in split_batches(source) for text in batch.documents]


def test_the_standard_library_is_read_in_a_fixed_order_without_tests_and_tables() -> None:
    name, documents = read_documents(None, 400_000)
    assert name == "standard library"
    assert documents == read_documents(None, 400_000)[1]
    assert 300_000 < sum(len(text.encode()) for text in documents) <= 400_000
    assert len(documents) > 10
    assert all("import unittest\n\nclass" not in text[:300] for text in documents)


def test_a_folders_documents_are_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", "blank.txt"):
        (tmp_path / name).write_text("\n" if name == "blank.txt" else f"text of {name}", encoding="utf-8")
    assert read_documents(str(tmp_path), None)[1] == ["text of a.txt", "text of b.txt", "text of sub/c.txt"]


def test_a_files_documents_end_at_blank_lines_and_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "play.txt"
    file.write_text("".join(f"line {i} {'x' * 90}\n" + "\n" * (i % 7 == 6) for i in range(300)), encoding="utf-8")
    documents = read_documents(str(file), None)[1]
    assert "".join(documents) == file.read_text(encoding="utf-8")
    assert all(text.endswith("\n\n") and 2000 <= len(text) < 3000 for text in documents[:-1])


def test_a_file_without_blank_lines_is_cut_at_lines(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text("a line of text\n" * 2000, encoding="utf-8")
    documents = read_documents(str(file), None)[1]
    assert len(documents) == 4
    assert all(text.endswith("\n") for text in documents)


def test_the_limit_takes_whole_documents(text: Path) -> None:
    everything = read_documents(str(text), None)[1]
    size = sum(len(each.encode()) for each in everything[:3])
    assert read_documents(str(text), size)[1] == everything[:3]
    assert read_documents(str(text), size - 1)[1] == everything[:2]


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "one.txt").write_text("one document", encoding="utf-8")
    (tmp_path / "nothing.txt").write_text("", encoding="utf-8")
    for name, message in [
        ("missing", "doesn't exist"),
        ("empty", "empty folder"),
        ("latin.txt", "UTF-8 text, got byte 0xfc at 2"),
        ("zero.txt", "zero byte"),
        ("one.txt", "at least 2 documents .* got 1"),
        ("nothing.txt", "at least 2 documents .* got 0"),
    ]:
        with pytest.raises(UserError, match=message):
            read_documents(str(tmp_path / name), None)

"""Documents from each kind of source."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from collage.train import hub, sources
from collage.train.config import TrainConfig, UserError, resumed
from collage.train.data import prepare_corpus
from collage.train.sources import open_source

TEXTS = [f"document {i}: carry, ulp and sum\n" + "the low part\n" * (i % 5) for i in range(30)]


def documents(data: Path | str, column: str = "text", *, streaming: bool = False) -> list[str]:
    return [text for text, _ in open_source(str(data), column, None, streaming=streaming).documents()]


def lines(texts: list[str], column: str = "text") -> bytes:
    return b"".join(json.dumps({column: text, "id": i}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: Path, texts: list[Any], column: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), path, row_group_size=7)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": lambda raw: raw,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": lambda raw: zstandard.compress(raw[:100]) + zstandard.compress(raw[100:]),
}


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_json_lines_are_documents_however_packed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PACKED[name](lines(TEXTS)))
    assert documents(tmp_path / name) == TEXTS


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    source = open_source(str(tmp_path / "a.parquet"), "text", None)
    read = list(source.documents())
    assert [text for text, _ in read] == TEXTS
    assert read[-1][1] == source.size


def test_a_folders_files_of_one_kind_are_read_by_name(tmp_path: Path) -> None:
    for kind, write in [("p", write_parquet), ("j", lambda path, texts: path.write_bytes(lines(texts)))]:
        suffix = {"p": "parquet", "j": "jsonl"}[kind]
        (tmp_path / kind).mkdir()
        write(tmp_path / kind / f"2.{suffix}", TEXTS[10:])
        write(tmp_path / kind / f"1.{suffix}", TEXTS[:10])
        assert documents(tmp_path / kind) == TEXTS
        assert len(open_source(str(tmp_path / kind), "text", None).parts) == 2


def test_the_kind_of_file_changes_neither_hash_nor_split_nor_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS, "body"))
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    one, other = (
        prepare_corpus(TrainConfig(data=str(tmp_path / n), text_column="body")) for n in ("a.jsonl", "a.parquet")
    )
    assert one.info.sha256 == other.info.sha256
    assert one.train.tolist() == other.train.tolist()
    assert one.validation.tolist() == other.validation.tolist()


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "", " \n", "b"]) + b"\n")
    write_parquet(tmp_path / "a.parquet", ["a", "", " \n", "b"])
    assert documents(tmp_path / "a.jsonl") == documents(tmp_path / "a.parquet") == ["a", "b"]


def test_batches_hold_all_documents_in_order_and_the_first_has_enough_for_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 1)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    batches = [texts for texts, _ in open_source(str(tmp_path / "a.jsonl"), "text", None).batches()]
    assert [len(batch) for batch in batches] == [10] + [1] * 20
    assert [text for batch in batches for text in batch] == TEXTS
    whole = prepare_corpus(TrainConfig(data=str(tmp_path / "a.jsonl")))
    monkeypatch.undo()
    assert prepare_corpus(TrainConfig(data=str(tmp_path / "a.jsonl"))).validation.tolist() == whole.validation.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"JSON object on each line, got line 2 of .*a.jsonl"),
        ("a.jsonl", b"[1]\n", "got a list on line 1"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "--text-column"),
        ("a.jsonl", b'{"text": null}\n', "must hold text, got a NoneType in line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a character in line 1"),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-20], "got damage at line"),
        ("a.jsonl.gz", b"text", "got damage at line 1"),
        ("a.jsonl.zst", b"text", "got damage at line 1"),
        ("a.parquet", b"text", "whole Parquet file"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents(tmp_path / name)


def test_other_columns_and_values_of_parquet_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    with pytest.raises(UserError, match=r"it has body, id: name the one with the text with --text-column"):
        documents(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", ["a", None])
    with pytest.raises(UserError, match="must hold text, got a NoneType in row 2"):
        documents(tmp_path / "b.parquet")


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(UserError, match=r"one kind, got 1 text \(README.md\), 1 JSON Lines \(a.jsonl\)"):
        documents(tmp_path)


# ---- datasets --------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in a local folder: the library loads it as one of the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    write_parquet(folder / "data/train-00000-of-00002.parquet", TEXTS[:12])
    write_parquet(folder / "data/train-00001-of-00002.parquet", TEXTS[12:])
    write_parquet(folder / "data/test-00000-of-00001.parquet", ["held", "out"])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_by_the_library_datasets(dataset: Path, streaming: bool) -> None:
    assert documents(f"hf:{dataset}", streaming=streaming) == TEXTS
    assert documents(f"hf:{dataset}::test", streaming=streaming) == ["held", "out"]
    source = open_source(f"hf:{dataset}", "text", None, streaming=streaming)
    assert [len(list(part.read())) for part in source.parts] == ([12, 18] if streaming else [30])
    with pytest.raises(UserError, match="--text-column"):
        documents(f"hf:{dataset}", "body", streaming=streaming)
    with pytest.raises(UserError, match=r"can't be loaded from hf:.*:no-such"):
        documents(f"hf:{dataset}:no-such", streaming=streaming)


def test_json_lines_of_a_dataset_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.jsonl").write_bytes(lines(TEXTS))
    assert documents(f"hf:{tmp_path / 'd'}", streaming=True) == TEXTS


def test_the_short_names_stand_for_datasets_of_the_hub() -> None:
    assert {alias: str(hub.hub_name(alias)) for alias in hub.ALIASES} == hub.ALIASES
    assert hub.hub_name("wikipedia") == hub.HubName("wikimedia/wikipedia", None, "20231101.en", "train")
    assert hub.hub_name("hf:a/b@v1:en:test") == hub.HubName("a/b", "v1", "en", "test")
    assert str(hub.hub_name("hf:a/b::test")) == "hf:a/b::test"
    assert hub.hub_name("folder/file.txt") is None
    with pytest.raises(UserError, match="which is neither"):
        hub.hub_name("hf:no/such/folder")


def test_wikitexts_lines_are_joined_to_articles() -> None:
    rows = ["", " = A = \n", " text of a\n", " = = Part = = \n", " more\n", " = B = \n", " text of b\n"]
    joined = list(hub.articles((line, row) for row, line in enumerate(rows, start=1)))
    assert joined == [("", 1), ("".join(rows[1:5]), 5), ("".join(rows[5:]), 7)]


class Hub:
    """Stands for the hub's client: it answers every question, or none."""

    answer: str | None = None

    def dataset_info(self, name: str, *, revision: str | None, timeout: float) -> Hub:
        if self.answer is None:
            raise ConnectionError("Name or service not known")
        return self

    @property
    def sha(self) -> str | None:
        return self.answer


def test_an_unreachable_hub_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("the library tries for half a minute"))
    for ask in (hub.pinned, documents):
        with pytest.raises(
            UserError, match=r"allenai/c4 must be reachable, got ConnectionError: Name .* HF_HUB_OFFLINE=1"
        ):
            ask("c4")


def test_a_new_run_pins_the_revision_and_is_resumed_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "answer", "1234abcd")
    assert hub.pinned("c4") == "hf:allenai/c4@1234abcd:en"
    assert hub.pinned("hf:a/b@v1") == "hf:a/b@v1"
    assert hub.pinned("folder") == "folder"
    stored = TrainConfig(data="hf:allenai/c4@1234abcd:en")
    assert resumed(stored, {"data": "c4"}) == resumed(stored, {"data": stored.data}) == stored
    for other in ("wikipedia", "hf:allenai/c4@5678:en"):
        with pytest.raises(UserError, match="keeps the settings"):
            resumed(stored, {"data": other})


def test_a_dataset_that_is_a_program_names_the_hubs_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "answer", "1234abcd")
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match="--data hf:Skylion007/openwebtext@refs/convert/parquet"):
        documents("openwebtext")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collage.train import extras

    monkeypatch.setitem(extras.EXTRAS, "data", ("no_such_package",))
    write_parquet(tmp_path / "a.parquet", TEXTS)
    for data in (f"hf:{tmp_path}", tmp_path / "a.parquet", "wikitext"):
        with pytest.raises(UserError, match=r"pip install 'torch-collage\[data\]'"):
            documents(data)

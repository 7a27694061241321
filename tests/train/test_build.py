"""Corpora on disk: what is built, cut off and gone on with, mapped, damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from collage.train import build as building
from collage.train import corpusfiles, runfiles, sources
from collage.train.build import build, check
from collage.train.config import TrainConfig, UserError
from collage.train.corpusfiles import ShardedTokens, ShardWriter
from collage.train.data import Windows, load_corpus, prepare_corpus, with_data
from collage.train.objectives import objective_for

SHARD_BYTES = 900


@pytest.fixture
def config(text: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Thirty documents of about 300 bytes, a few in a batch, a few batches in a shard."""
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 300)
    return TrainConfig(data=str(text), tokenizer="bpe", vocab_size=270)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is built ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_built_corpus_has_the_tokens_and_the_hash_of_the_text_itself(
    config: TrainConfig, tmp_path: Path, tokenizer: str
) -> None:
    config = replace(config, tokenizer=tokenizer, vocab_size=270 if tokenizer == "bpe" else None)
    index = build(config, tmp_path / "corpus", shard_bytes=SHARD_BYTES)
    built, whole = load_corpus(tmp_path / "corpus"), prepare_corpus(config)
    assert len(index["shards"]) > 5
    assert built.info == whole.info
    assert built.tokenizer_json == whole.tokenizer_json
    assert built.train[:].tolist() == whole.train.tolist()
    assert built.validation[:].tolist() == whole.validation[:].tolist()
    assert check(tmp_path / "corpus") == index


def test_the_ends_are_where_the_documents_end(config: TrainConfig, tmp_path: Path) -> None:
    index = build(config, tmp_path / "corpus", shard_bytes=SHARD_BYTES)
    end, documents = index["info"]["end_token"], 0
    for number, entry in enumerate(index["shards"]):
        for split in ("train", "validation"):
            folder = tmp_path / f"corpus/shard-{number:05d}"
            tokens, ends = np.fromfile(folder / f"{split}.bin", "<u2"), np.fromfile(folder / f"{split}.ends", "<u8")
            assert (np.flatnonzero(tokens == end) + 1).tolist() == ends.tolist()
            assert len(tokens) == entry[f"{split}_tokens"]
            documents += len(ends)
    assert documents == index["info"]["documents"] == 30


def test_a_large_vocabulary_has_tokens_of_32_bits(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path, 0, np.dtype(np.uint32))
    shard.add(["a"], {"train": np.array([70_000, 1], np.uint32), "validation": np.empty(0, np.uint16)}, 1)
    shard.finish()
    entries = corpusfiles.finished_shards(tmp_path)
    mapped = corpusfiles.map_split(tmp_path, {"dtype": "uint32", "shards": entries}, "train")
    assert mapped[:].tolist() == [70_000, 1]


def test_shards_are_read_as_one_array() -> None:
    whole = np.arange(40, dtype=np.uint16)
    tokens = ShardedTokens([whole[:7], whole[7:7], whole[7:30], whole[30:]], "hash")
    assert (len(tokens), tokens.size) == (40, 40)
    for start in range(41):
        for stop in range(start, 42):
            assert tokens[start:stop].tolist() == whole[start:stop].tolist()
    assert tokens[-3:].tolist() == [37, 38, 39]
    with pytest.raises(ValueError, match="step"):
        tokens[::2]
    one, other = (Windows(array, 4, "train") for array in (whole, tokens))
    assert np.array_equal(one.batch(3, 5, seed=1), other.batch(3, 5, seed=1))


# ---- cut off ---------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """The process is gone: nothing that would clean up after it runs."""


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the writes to the disk; the one at which the count is 0 is never made."""
    left = [-1]

    def counted(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def write(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise PowerCut
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, write)

    def gone(shard: ShardWriter) -> None:
        for file in shard._files.values():
            file._file.close()

    monkeypatch.setattr(ShardWriter, "abandon", gone)
    monkeypatch.setattr(runfiles.os, "fsync", lambda descriptor: None)  # the time it takes
    counted(corpusfiles._HashedFile, "write")
    counted(corpusfiles._HashedFile, "close")
    counted(corpusfiles, "sync")
    counted(Path, "rename")
    counted(Path, "replace")
    counted(Path, "mkdir")
    counted(shutil, "rmtree")
    counted(Path, "unlink")
    return left


def test_a_build_cut_off_between_any_two_writes_goes_on_to_the_same_bytes(
    config: TrainConfig, tmp_path: Path, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 1500)
    cuts[0] = 10**6
    assert len(build(config, tmp_path / "whole", shard_bytes=4000)["shards"]) > 1
    writes, expected = 10**6 - cuts[0], tree(tmp_path / "whole")
    assert writes > 50
    for cut in range(writes):
        out = tmp_path / "cut"
        cuts[0] = cut
        with pytest.raises(PowerCut):
            build(config, out, shard_bytes=4000)
        cuts[0] = -1
        build(config, out, shard_bytes=4000)
        assert tree(out) == expected, f"cut at write {cut} of {writes}"
        shutil.rmtree(out)


def test_finished_shards_are_kept_and_not_tokenized_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "corpus"
    build(config, out, shard_bytes=SHARD_BYTES)
    expected = tree(out)
    kept = sorted(out.glob("shard-*"))
    for folder in kept[3:]:
        shutil.rmtree(folder)
    (out / "corpus.json").unlink()
    facts = {"settings": json.loads(expected["corpus.json"])["settings"], "chosen": {"name": "bpe", "note": None}}
    (out / "building.json").write_text(json.dumps(facts))
    made: list[int] = []
    real = ShardWriter.__init__
    monkeypatch.setattr(
        ShardWriter, "__init__", lambda self, f, number, d: (made.append(number), real(self, f, number, d))[1]
    )
    build(config, out, shard_bytes=SHARD_BYTES)
    assert made == list(range(3, len(kept)))
    assert tree(out) == expected


def test_a_build_that_is_asked_to_stop_keeps_what_is_finished_and_leaves_nothing_half_done(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(building.StopSignals):
        def __enter__(self) -> Asked:
            super().__enter__()
            self.requested = True
            return self

    out = tmp_path / "corpus"
    monkeypatch.setattr(building, "StopSignals", Asked)
    with pytest.raises(building.Interrupted):
        build(config, out, shard_bytes=SHARD_BYTES)
    assert sorted(path.name for path in out.iterdir()) == ["building.json", "shard-00000", "tokenizer.json"]
    with pytest.raises(UserError, match="cut off; go on with the `collage data`"):
        prepare_corpus(replace(config, data=str(out)))
    monkeypatch.undo()
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 300)
    build(config, out, shard_bytes=SHARD_BYTES)
    build(config, tmp_path / "whole", shard_bytes=SHARD_BYTES)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_build_is_gone_on_with_only_if_text_and_settings_are_the_same(
    config: TrainConfig, text: Path, tmp_path: Path, cuts: list[int]
) -> None:
    out = tmp_path / "corpus"
    cuts[0] = 40
    with pytest.raises(PowerCut):
        build(config, out, shard_bytes=SHARD_BYTES)
    with pytest.raises(UserError, match=r"--vocab-size 280 \(it has 270\)"):
        build(replace(config, vocab_size=280), out, shard_bytes=SHARD_BYTES)
    (text / "00.txt").write_text("changed", encoding="utf-8")
    with pytest.raises(UserError, match="another one at shard 0"):
        build(config, out, shard_bytes=SHARD_BYTES)


def test_a_folder_with_something_else_is_refused(config: TrainConfig, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="new or empty folder"):
        build(config, text)
    with pytest.raises(UserError, match="--out must be a folder"):
        build(config, text / "00.txt")
    build(config, tmp_path / "corpus")
    with pytest.raises(UserError, match="a prepared corpus"):
        build(replace(config, data=str(tmp_path / "corpus")), tmp_path / "other")


# ---- used ------------------------------------------------------------------------------------------------------


def test_a_prepared_corpus_brings_its_own_tokenizer_and_others_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    out = str(tmp_path / "corpus")
    build(config, Path(out), shard_bytes=SHARD_BYTES)
    assert with_data({"data": out, "lr": 0.1}) == {"data": out, "lr": 0.1, "tokenizer": "bpe"}
    assert prepare_corpus(TrainConfig(data=out, tokenizer="bpe")).info.vocab_size == 270
    for other in ({"tokenizer": "bytes"}, {"vocab_size": 300}):
        with pytest.raises(UserError, match="keeps the tokenizer it was built with"):
            with_data({"data": out, **other})
    with pytest.raises(UserError, match="keeps the tokenizer"):
        prepare_corpus(TrainConfig(data=out))
    for setting in ({"corpus_bytes": 1000}, {"stream": True}):
        with pytest.raises(UserError, match="is for text"):
            prepare_corpus(TrainConfig(data=out, tokenizer="bpe", **setting))
    with pytest.raises(UserError, match="must have the run's own tokenizer"):
        prepare_corpus(TrainConfig(data=out, tokenizer="bpe"), "{}")


@pytest.mark.parametrize(
    ("model", "tokenizer"), [("gpt-tiny", "bpe"), ("roberta-tiny", "bpe"), ("bert-tiny", "wordpiece")]
)
def test_every_objective_has_the_batches_of_the_text_itself(
    config: TrainConfig, tmp_path: Path, model: str, tokenizer: str
) -> None:
    config = replace(config, model=model, tokenizer=tokenizer, vocab_size=300, seq_len=16, batch_size=4, eval_batches=1)
    build(config, tmp_path / "corpus", shard_bytes=SHARD_BYTES)
    mapped = replace(config, data=str(tmp_path / "corpus"), vocab_size=None)
    one, other = (objective_for(each, prepare_corpus(each)) for each in (config, mapped))
    for step in (1, 2, 50):
        first, second = (each.batch(step, 7, slice(None)) for each in (one, other))
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])


def test_damage_is_found_by_size_at_once_and_by_hash_when_asked(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    build(config, out, shard_bytes=SHARD_BYTES)
    victim = out / "shard-00001/train.bin"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"shard-00001/train.bin must have .* bytes, got"):
        load_corpus(out)
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    load_corpus(out)
    with pytest.raises(UserError, match=r"got damage in shard-00001/train.bin;"):
        check(out)
    victim.unlink()
    with pytest.raises(UserError, match="got no file"):
        load_corpus(out)
    victim.write_bytes(whole)
    check(out)
    tokenizer = out / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(UserError, match="must be the corpus's own"):
        load_corpus(out)


def test_the_hash_of_the_batches_follows_the_content_of_a_prepared_corpus(config: TrainConfig, tmp_path: Path) -> None:
    hashes = []
    for name, shard_bytes, limit in [("a", 900, None), ("b", 900, None), ("c", 900, 5000)]:
        build(replace(config, corpus_bytes=limit), tmp_path / name, shard_bytes=shard_bytes)
        hashes.append(Windows(load_corpus(tmp_path / name).train, 16, "train").sha256(3, 4, seed=0))
    assert hashes[0] == hashes[1] != hashes[2]

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collage.train import data
from collage.train.config import TrainConfig, UserError
from collage.train.data import (
    Windows,
    load_corpus,
    mix,
    order,
    prepare_corpus,
    validation_documents,
)
from collage.train.tokens import END_OF_DOCUMENT

WINDOWS = Windows(np.arange(1001, dtype=np.uint16), seq_len=10, split="train")


# ---- the split ----


def test_mix_is_splitmix64() -> None:
    # The first outputs of the published generator from state 0, whose increment is mix's own constant.
    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(value) for value in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_a_documents_split_depends_on_its_number_alone() -> None:
    many, few = validation_documents(2000), validation_documents(500)
    assert 60 <= many.sum() <= 140
    assert np.array_equal(many[:500], few)


@pytest.mark.parametrize("count", range(2, 40))
def test_both_splits_have_a_document(count: int) -> None:
    assert 1 <= validation_documents(count).sum() < count


# ---- tokens ----


def test_bytes_are_tokens_and_documents_end_with_256(tiny: TrainConfig, text: Path) -> None:
    corpus = prepare_corpus(tiny)
    documents = {split: bytes_of(tokens) for split, tokens in (("t", corpus.train), ("v", corpus.validation))}
    files = [path.read_bytes() for path in sorted(text.iterdir())]
    assert Counter(documents["t"] + documents["v"]) == Counter(files)
    assert set(documents["t"]).isdisjoint(documents["v"])
    assert corpus.info.vocab_size == 257
    assert corpus.info.train_tokens == corpus.train.size


def bytes_of(tokens: np.ndarray) -> list[bytes]:
    assert tokens[-1] == 256
    ends = np.flatnonzero(tokens == 256)
    starts = [0, *(ends[:-1] + 1)]
    return [tokens[a:b].astype(np.uint8).tobytes() for a, b in zip(starts, ends, strict=True)]


def test_bpe_decodes_to_the_text_and_learns_from_the_train_split_alone(tiny: TrainConfig, text: Path) -> None:
    from tokenizers import Tokenizer

    held_out = np.flatnonzero(validation_documents(30))
    config = replace(tiny, tokenizer="bpe", vocab_size=270)
    before = prepare_corpus(config)
    for number in held_out:
        (text / f"{number:02d}.txt").write_text("zyzzyva " * 200, encoding="utf-8")
    after = prepare_corpus(config)
    assert before.tokenizer_json == after.tokenizer_json
    assert before.tokenizer_json is not None
    assert before.info.vocab_size == 270
    bpe = Tokenizer.from_str(before.tokenizer_json)
    decoded = bpe.decode(before.train.tolist(), skip_special_tokens=False).split(END_OF_DOCUMENT)
    expected = [(text / f"{n:02d}.txt").read_text(encoding="utf-8") for n in range(30) if n not in held_out]
    assert decoded[:-1] == expected


def test_the_sha256_follows_the_text_and_not_the_tokenizer(tiny: TrainConfig, text: Path) -> None:
    first = prepare_corpus(tiny).info
    assert prepare_corpus(replace(tiny, tokenizer="bpe")).info.sha256 == first.sha256
    (text / "00.txt").write_text("changed", encoding="utf-8")
    assert prepare_corpus(tiny).info.sha256 != first.sha256


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_saved_corpus_is_loaded_as_it_was_and_mapped(tiny: TrainConfig, tmp_path: Path, tokenizer: str) -> None:
    corpus = prepare_corpus(replace(tiny, tokenizer=tokenizer))
    corpus.save(tmp_path / "corpus")
    loaded = load_corpus(tmp_path / "corpus")
    assert loaded.info == corpus.info
    assert loaded.tokenizer_json == corpus.tokenizer_json
    assert isinstance(loaded.train, np.memmap)
    assert np.array_equal(loaded.train, corpus.train)
    assert np.array_equal(loaded.validation, corpus.validation)


def test_a_folder_that_holds_no_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text(json.dumps({"name": "x"}), encoding="utf-8")
    with pytest.raises(UserError, match="prepared corpus"):
        load_corpus(tmp_path)


# ---- windows and batches ----


def test_windows_share_one_token_so_that_each_is_predicted_once() -> None:
    windows = WINDOWS.take(np.arange(WINDOWS.count))
    assert windows.shape == (100, 11)
    assert windows.dtype == np.int64
    assert np.array_equal(windows[:, 1:].ravel(), np.arange(1, 1001))
    assert np.array_equal(windows[:, :-1].ravel(), np.arange(1000))


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order() -> None:
    batches = [WINDOWS.batch(step, 10, seed=3) for step in range(1, 21)]
    first, second = (np.concatenate(part)[:, 0] // 10 for part in (batches[:10], batches[10:]))
    assert np.array_equal(np.sort(first), np.arange(100))
    assert np.array_equal(np.sort(second), np.arange(100))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(100))


def test_a_batch_over_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    whole = np.concatenate([order(100, 5, 0), order(100, 5, 1)])
    batch = WINDOWS.batch(4, 30, seed=5)
    assert np.array_equal(batch[:, 0] // 10, whole[90:120])


def test_batches_follow_from_seed_and_step_alone() -> None:
    later = WINDOWS.batch(7, 8, seed=0)
    np.random.seed(1)
    WINDOWS.batch(3, 8, seed=0)
    assert np.array_equal(WINDOWS.batch(7, 8, seed=0), later)
    assert not np.array_equal(WINDOWS.batch(7, 8, seed=1), later)


def test_a_batch_larger_than_the_text_repeats_it() -> None:
    windows = Windows(np.arange(21, dtype=np.uint16), seq_len=10, split="train")
    assert Counter(windows.batch(1, 6, seed=0)[:, 0].tolist()) == {0: 3, 10: 3}


def test_the_validation_set_is_spread_over_the_split() -> None:
    assert np.array_equal(WINDOWS.spread(4)[:, 0], [0, 250, 500, 750])
    assert len(WINDOWS.spread(1000)) == 100


def test_a_split_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"validation split must have at least seq_len \+ 1 = 11 tokens, got 10"):
        Windows(np.arange(10, dtype=np.uint16), seq_len=10, split="validation")


def test_the_hash_of_the_batches_changes_with_all_that_changes_a_batch() -> None:
    other = np.arange(1001, dtype=np.uint16)
    other[500] += 1
    base = WINDOWS.sha256(30, 4, seed=0)
    changed = [
        WINDOWS.sha256(31, 4, seed=0),
        WINDOWS.sha256(30, 5, seed=0),
        WINDOWS.sha256(30, 4, seed=1),
        Windows(np.arange(1001, dtype=np.uint16), 9, "train").sha256(30, 4, seed=0),
        Windows(other, 10, "train").sha256(30, 4, seed=0),
    ]
    assert len({base, *changed}) == 6


def test_the_hash_of_the_batches_is_that_of_their_tokens_however_these_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = WINDOWS.sha256(30, 4, seed=0)
    np.save(tmp_path / "tokens.npy", np.arange(1001, dtype=np.uint32))
    mapped = Windows(np.load(tmp_path / "tokens.npy", mmap_mode="r"), 10, "train")
    monkeypatch.setattr(data, "_HASHED_AT_ONCE", 7)
    assert mapped.sha256(30, 4, seed=0) == base


@pytest.mark.parametrize("batch_size", [1, 7, 100, 250])
def test_the_hash_covers_the_very_windows_that_the_steps_see(batch_size: int) -> None:
    seen = np.concatenate([WINDOWS.batch(step, batch_size, seed=2)[:, 0] // 10 for step in range(1, 6)])
    assert np.array_equal(np.concatenate(list(WINDOWS._visits(0, 5 * batch_size, seed=2))), seen)

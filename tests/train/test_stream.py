"""Text read while training: what it yields, and that a run cut off sees what it would have seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collage.train import sources, stream
from collage.train.config import TrainConfig, UserError
from collage.train.data import prepare_corpus
from collage.train.objectives import objective_for
from collage.train.stream import Stream, lane_count, merged

FILES, EACH, STEPS, BATCH, LENGTH = 5, 40, 30, 4, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_CHARACTERS", 1200)
    monkeypatch.setattr(stream, "BATCH_CHARACTERS", 100)


def document(file: int, number: int) -> str:
    return f"{file:02d}/{number:03d} " + "abcdefgh"[: number % 8] * (number % 5)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Files of short documents of unequal length, each with its number in it."""
    folder = tmp_path / "files"
    folder.mkdir()
    for file in range(FILES):
        rows = [{"text": document(file, number)} for number in range(EACH)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(data=str(folder), stream=True, batch_size=BATCH, seq_len=LENGTH, eval_batches=1)


@pytest.fixture
def opened() -> Iterator[list[Stream]]:
    streams: list[Stream] = []
    yield streams
    for each in streams:
        each.close()


def fresh(config: TrainConfig, opened: list[Stream]) -> Stream:
    opened.append(Stream(prepare_corpus(config).train, LENGTH))
    return opened[-1]


def batches(source: Stream, first: int, last: int, share: slice = slice(None), seed: int = 3) -> list[np.ndarray]:
    return [source.batch(step, BATCH, seed, share) for step in range(first, last + 1)]


def saved(state: dict[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(state))


def read_back(windows: np.ndarray) -> list[str]:
    """The documents in consecutive windows of one lane, the last one perhaps cut."""
    tokens = np.concatenate([windows[0][:1], *(window[1:] for window in windows)])
    return bytes(np.where(tokens == 256, 10, tokens).astype(np.uint8)).decode().split("\n")


# ---- exactness -------------------------------------------------------------------------------------------------


def test_a_stream_cut_after_any_step_goes_on_with_the_very_samples(config: TrainConfig, opened: list[Stream]) -> None:
    whole = batches(fresh(config, opened), 1, STEPS)
    for cut in range(STEPS):
        first = fresh(config, opened)
        before = batches(first, 1, cut)
        second = fresh(config, opened)
        second.load(saved(first.state()))
        after = batches(second, cut + 1, min(cut + 4, STEPS))
        for step, batch in enumerate(before + after):
            assert np.array_equal(batch, whole[step]), f"cut after {cut}, step {step + 1}"
        first.close()
        second.close()


def test_a_stream_of_a_trained_vocabulary_goes_on_too(config: TrainConfig, opened: list[Stream]) -> None:
    config = replace(config, tokenizer="bpe", vocab_size=300)
    text = prepare_corpus(config)
    opened += [Stream(text.train, LENGTH), Stream(prepare_corpus(config, text.tokenizer_json).train, LENGTH)]
    one, two = opened
    batches(one, 1, 7)
    state = saved(one.state())
    two.load(state)
    assert all(map(np.array_equal, batches(one, 8, 12), batches(two, 8, 12)))


@pytest.mark.parametrize("readers", [2, 4])
def test_the_number_of_processes_changes_no_batch_and_each_reads_its_own_lanes(
    config: TrainConfig, opened: list[Stream], readers: int
) -> None:
    whole = batches(fresh(config, opened), 1, STEPS)
    each = BATCH // readers
    shares = [slice(rank * each, (rank + 1) * each) for rank in range(readers)]
    parts = [fresh(config, opened) for _ in shares]
    for step in range(1, 11):
        rows = [part.batch(step, BATCH, 3, share)[share] for part, share in zip(parts, shares, strict=True)]
        assert np.array_equal(np.concatenate(rows), whole[step - 1])
    states = [part.state() for part in parts]
    assert [sorted(state["lanes"]) for state in states] == [
        [str(lane) for lane in range(rank * each, (rank + 1) * each)] for rank in range(readers)
    ]

    # What several have saved one goes on with, and the other way round.
    one = fresh(config, opened)
    one.load(saved(merged(states)))
    assert all(map(np.array_equal, batches(one, 11, 15), whole[10:15]))
    again = [fresh(config, opened) for _ in shares]
    for part in again:
        part.load(saved(one.state()))
    rows = [part.batch(16, BATCH, 3, share)[share] for part, share in zip(again, shares, strict=True)]
    assert np.array_equal(np.concatenate(rows), whole[15])
    if readers > 1:
        lone = fresh(config, opened)
        lone.load(saved(states[0]))
        with pytest.raises(ValueError, match="must have the lanes"):
            lone.batch(11, BATCH, 3)


def test_one_file_makes_one_lane_that_all_processes_share(tmp_path: Path, opened: list[Stream]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document(0, n)}) + "\n" for n in range(100)))
    config = TrainConfig(data=str(tmp_path / "a.jsonl"), stream=True, batch_size=BATCH, seq_len=LENGTH, eval_batches=1)
    whole = batches(fresh(config, opened), 1, 8)
    second = batches(fresh(config, opened), 1, 8, slice(2, 4))
    assert all(np.array_equal(a[2:], b[2:]) for a, b in zip(whole, second, strict=True))


# ---- what is in it ---------------------------------------------------------------------------------------------


def test_an_epoch_has_every_document_to_train_on_once_and_none_to_validate_on(
    config: TrainConfig, opened: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In one lane, with its windows in the order of the text.
    monkeypatch.setattr(stream, "_visits", lambda count, *keys: np.arange(count))
    config = replace(config, batch_size=1)
    text = prepare_corpus(config)
    opened.append(Stream(text.train, LENGTH))
    windows = np.concatenate([opened[0].batch(step, 1, 0) for step in range(1, 200)])
    found = read_back(windows)
    held = {document(f, n) for f in range(FILES) for n in range(EACH)} - set(found)
    everything = [document(f, n) for f in range(FILES) for n in range(EACH) if document(f, n) not in held]
    assert 2 <= len(held) <= 25
    assert found[: len(everything)] == everything
    again = found[len(everything) : -1]
    assert again == everything[: len(again)]
    assert again
    validated = bytes(np.where(text.validation == 256, 10, text.validation).astype(np.uint8)).decode().split("\n")
    assert set(validated[:-1]) <= held
    assert validated[:-1]


def test_windows_of_a_block_are_shuffled_and_another_seed_has_another_order(
    config: TrainConfig, opened: list[Stream]
) -> None:
    one, other = (np.stack(batches(fresh(config, opened), 1, STEPS, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, np.stack(batches(fresh(config, opened), 1, STEPS, seed=0)))


def test_a_single_file_is_split_as_a_prepared_corpus_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document(0, n)}) + "\n" for n in range(200)))
    config = TrainConfig(data=str(tmp_path / "a.jsonl"), stream=True, eval_batches=100)
    streamed, prepared = prepare_corpus(config), prepare_corpus(replace(config, stream=False))
    assert np.array_equal(streamed.validation[:], prepared.validation[:])


def test_the_validation_set_is_no_larger_than_it_needs_be(config: TrainConfig) -> None:
    assert prepare_corpus(config).validation.size == BATCH * LENGTH + 1


def test_lanes_divide_the_batch_and_have_a_file_each() -> None:
    assert [lane_count(16, files) for files in (1, 2, 3, 7, 8, 100)] == [1, 2, 2, 4, 8, 16]
    assert lane_count(1024, 10_000) == 64
    assert lane_count(6, 4) == 3


def test_the_hash_of_a_stream_changes_with_what_its_batches_follow_from(config: TrainConfig) -> None:
    tokens = prepare_corpus(config).train
    base = Stream(tokens, LENGTH).sha256(5, BATCH, 0)
    other = prepare_corpus(replace(config, text_column="text", tokenizer="bpe", vocab_size=300)).train
    changed = [Stream(tokens, LENGTH).sha256(5, BATCH, 1), Stream(tokens, 8).sha256(5, BATCH, 0)]
    changed += [Stream(other, LENGTH).sha256(5, BATCH, 0)]
    (Path(str(config.data)) / "5.jsonl").write_text('{"text": "one more"}\n')
    changed.append(Stream(prepare_corpus(config).train, LENGTH).sha256(5, BATCH, 0))
    assert len({base, *changed}) == 5


# ---- what is refused -------------------------------------------------------------------------------------------


def test_a_stream_goes_forward_only(config: TrainConfig, opened: list[Stream]) -> None:
    source = fresh(config, opened)
    source.batch(1, BATCH, 0)
    for step in (1, 3):
        with pytest.raises(ValueError, match="next step is 2"):
            source.batch(step, BATCH, 0)


def test_an_error_in_the_text_stops_the_run_that_would_read_it(config: TrainConfig, opened: list[Stream]) -> None:
    file = Path(str(config.data)) / "3.jsonl"
    file.write_text(file.read_text().replace('{"text": "03/030', '{"body": "03/030'))
    with pytest.raises(UserError, match="line 31 of"):
        batches(fresh(config, opened), 1, 200)


def test_a_stream_without_documents_for_a_split_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="documents to validate on, got none held out"):
        prepare_corpus(TrainConfig(data=str(tmp_path / "a.jsonl"), stream=True))
    source = sources.Source("empty", [sources.Part("a.jsonl", 0, lambda: iter(()))])
    tokens = replace(prepare_corpus(config).train, source=source)
    with pytest.raises(UserError, match=r"documents to train on, got none in a\.jsonl"):
        Stream(tokens, LENGTH).batch(1, BATCH, 0)


def test_pairs_of_sentences_are_not_streamed(config: TrainConfig) -> None:
    config = replace(config, model="bert-tiny", tokenizer="wordpiece", vocab_size=300)
    with pytest.raises(UserError, match="pairs of sentences need text that can be looked up"):
        objective_for(config, prepare_corpus(config))


def test_a_bound_on_the_text_is_refused() -> None:
    with pytest.raises(UserError, match="corpus_bytes must be unset with stream"):
        TrainConfig(stream=True, corpus_bytes=1000)


def test_each_lane_reads_its_own_files(config: TrainConfig, opened: list[Stream]) -> None:
    seen: set[int] = set()
    for batch in batches(fresh(config, opened), 1, 60):
        for lane, row in enumerate(batch):
            text = bytes(np.where(row == 256, 10, row).astype(np.uint8)).decode()
            files = {int(word[:2]) for word in text.split("\n") if len(word) > 2 and word[2] == "/"}
            assert files <= {file for file in range(FILES) if file % 4 == lane}
            seen.update(files)
    assert seen == set(range(FILES))

"""What is predicted: masks and pairs, their dependence on seed, step and place alone, and the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from collage.train import runfiles
from collage.train.config import TrainConfig, UserError
from collage.train.data import Corpus, prepare_corpus
from collage.train.loop import train
from collage.train.models import BERT, MODELS, ROBERTA, ModelSpec, build_model
from collage.train.objectives import IGNORED, Batch, MaskedPairs, Objective, Pieces, dropout_bits, objective_for
from collage.train.tokens import number, read_tokenizer

ALL = slice(None)


@pytest.fixture
def bert(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """As `tiny`, with BERT's architecture and a WordPiece vocabulary."""
    monkeypatch.setitem(MODELS, "bert", ModelSpec(hidden=16, layers=1, heads=2, family=BERT, positions=32))
    return replace(tiny, model="bert", tokenizer="wordpiece", vocab_size=270, seq_len=24)


@pytest.fixture
def roberta(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """As `tiny`, with RoBERTa's architecture and a BPE vocabulary."""
    monkeypatch.setitem(MODELS, "roberta", ModelSpec(hidden=16, layers=1, heads=2, family=ROBERTA, positions=32))
    return replace(tiny, model="roberta", tokenizer="bpe", vocab_size=270, seq_len=24)


@pytest.fixture(params=["bert", "roberta"])
def masked(request: pytest.FixtureRequest) -> TrainConfig:
    return request.getfixturevalue(request.param)


def objective(config: TrainConfig) -> Objective:
    return objective_for(config, prepare_corpus(config))


def equal(first: Batch, second: Batch) -> bool:
    names = first.inputs.keys() == second.inputs.keys()
    inputs = all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)
    follows = first.follows is second.follows or torch.equal(first.follows, second.follows)  # pyright: ignore
    return names and inputs and torch.equal(first.labels, second.labels) and follows


def joined(parts: list[Batch]) -> Batch:
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    follows = None if parts[0].follows is None else torch.cat([p.follows for p in parts])  # pyright: ignore
    return Batch(inputs, torch.cat([part.labels for part in parts]), follows)


def originals(batch: Batch) -> torch.Tensor:
    """The sequences before they were masked."""
    return torch.where(batch.labels == IGNORED, batch.inputs["input_ids"], batch.labels)


# ---- what batches follow from ----


def test_a_sample_is_the_same_however_the_batch_is_shared_out(masked: TrainConfig) -> None:
    config = replace(masked, batch_size=6)
    made = objective(config)
    whole = made.batch(3, 7, ALL)
    shares = [made.batch(3, 7, slice(rank, None, 2)) for rank in range(2)]
    rows = [part.split(1)[index] for index in range(3) for part in shares]
    assert equal(joined(rows), whole)
    assert equal(joined(whole.split(4)), whole)


def test_batches_follow_from_seed_and_step_alone(masked: TrainConfig) -> None:
    made = objective(masked)
    first = made.batch(2, 0, ALL)
    torch.manual_seed(1)
    np.random.seed(1)
    made.batch(1, 5, ALL)
    made.validation(ALL)
    assert equal(objective(masked).batch(2, 0, ALL), first)
    assert not equal(made.batch(3, 0, ALL), first)
    assert not equal(made.batch(2, 1, ALL), first)


def test_a_window_is_masked_elsewhere_at_each_visit(roberta: TrainConfig) -> None:
    made = objective(roberta)
    epoch = made.training.count
    everything = objective(replace(roberta, batch_size=epoch))
    first, second = (everything.batch(step, 0, ALL) for step in (1, 2))
    texts = [originals(batch) for batch in (first, second)]
    order = [sorted(range(epoch), key=lambda row, text=text: text[row].tolist()) for text in texts]
    assert torch.equal(texts[0][order[0]], texts[1][order[1]])
    assert not torch.equal(first.labels[order[0]], second.labels[order[1]])


def test_the_validation_set_has_the_same_masks_each_time(masked: TrainConfig) -> None:
    made = objective(masked)
    first = made.validation(ALL)
    made.batch(1, 0, ALL)
    assert equal(made.validation(ALL), first)
    assert sum(first.predicted()) > 0


def test_the_hash_of_the_batches_covers_the_objective(
    masked: TrainConfig, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = objective(masked)
    before = made.sha256(5, 0)
    assert objective(masked).sha256(5, 0) == before
    assert len({before, made.sha256(6, 0), made.sha256(5, 1), made.training.sha256(5, masked.batch_size, 0)}) == 4
    monkeypatch.setattr("collage.train.objectives.MASKED_SHARE", 0.2)
    assert made.sha256(5, 0) != before
    causal = objective(tiny)
    assert causal.sha256(5, 0) == causal.training.sha256(5, tiny.batch_size, 0)


# ---- masks ----


def test_15_percent_of_tokens_are_predicted_and_80_10_10_of_them_masked_random_and_kept(roberta: TrainConfig) -> None:
    config = replace(roberta, batch_size=2000)
    text = prepare_corpus(config)
    assert text.tokenizer_json is not None
    tokenizer = read_tokenizer(text.tokenizer_json)
    batch = objective_for(config, text).batch(1, 0, ALL)
    inputs, labels = batch.inputs["input_ids"], batch.labels
    cls, sep, mask = (number(tokenizer, name) for name in ("<s>", "</s>", "<mask>"))
    tokens = int((~torch.isin(originals(batch), torch.tensor([cls, sep]))).sum())
    chosen = labels != IGNORED
    count = int(chosen.sum())
    # Five standard deviations of the binomial distributions.
    assert count / tokens == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / tokens) ** 0.5)
    kept = int((inputs == labels)[chosen].sum())
    hidden = int((inputs == mask)[chosen].sum())
    for found, share in ((hidden, 0.8), (kept, 0.1 + 0.1 / 270), (count - hidden - kept, 0.1)):
        assert found / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)
    assert not torch.isin(labels, torch.tensor([cls, sep, mask])).any()
    assert not (inputs == mask)[~chosen].any()


def test_a_sequence_is_packed_text_between_its_ends(roberta: TrainConfig) -> None:
    text = prepare_corpus(roberta)
    assert text.tokenizer_json is not None
    count = (len(text.train) - 1) // 22
    sequences = originals(objective_for(replace(roberta, batch_size=count), text).batch(1, 0, ALL))
    inner = sequences[:, 1:-1]
    assert (sequences[:, 0] == 0).all()
    assert (sequences[:, -1] == 2).all()
    order = sorted(inner.tolist())
    windows = text.train[: count * 22].reshape(-1, 22)
    assert order == sorted(windows.tolist())


# ---- pairs ----


def pairs(config: TrainConfig) -> tuple[MaskedPairs, Batch, Corpus]:
    text = prepare_corpus(config)
    made = objective_for(replace(config, batch_size=400), text)
    assert isinstance(made, MaskedPairs)
    return made, made.batch(1, 0, ALL), text


def parts(batch: Batch, row: int) -> tuple[list[int], list[int]]:
    """The two halves of a sample without special tokens."""
    real = batch.inputs["attention_mask"][row].bool()
    sequence, kinds = originals(batch)[row][real], batch.inputs["token_type_ids"][row][real]
    return sequence[kinds == 0][1:-1].tolist(), sequence[kinds == 1][:-1].tolist()


def contains(documents: list[list[int]], piece: list[int]) -> list[int]:
    """The documents that a stretch of tokens stands in."""
    texts = [f" {' '.join(map(str, document))} " for document in documents]
    return [number for number, text in enumerate(texts) if f" {' '.join(map(str, piece))} " in text]


def test_the_second_half_follows_the_first_or_comes_from_another_document(bert: TrainConfig) -> None:
    _, batch, text = pairs(bert)
    ends = np.flatnonzero(text.train == 3)
    documents = [part[part != 3].tolist() for part in np.split(text.train, ends)[:-1]]
    assert batch.follows is not None
    for row, unrelated in enumerate(batch.follows.tolist()):
        first, second = parts(batch, row)
        assert first
        assert second
        if not unrelated:
            assert contains(documents, first + second)
        else:
            assert contains(documents, first)
            assert contains(documents, second)
    share = float(batch.follows.float().mean())
    assert share == pytest.approx(0.5, abs=5 * (0.25 / 400) ** 0.5)


def test_the_other_document_is_never_the_same() -> None:
    # Each document has tokens of its own, so that a stretch tells where it comes from.
    documents = [np.full(length, 10 + index) for index, length in enumerate((5, 9, 2, 30))]
    tokens = np.concatenate([np.append(document, 3) for document in documents]).astype(np.uint16)
    pieces = Pieces(tokens, 3, 8, "train")
    for document in range(4):
        found = {int(pieces.elsewhere(document, 4, which, 7)[0]) - 10 for which in range(12)}
        assert found == {0, 1, 2, 3} - {document}
    assert [len(pieces.elsewhere(3, 4, which, 7)) for which in range(3)] == [4, 4, 2]


def test_pieces_cover_every_document_and_cross_none() -> None:
    lengths = (5, 9, 1, 2, 30, 17)
    tokens = np.concatenate([np.append(np.arange(100 * n, 100 * n + length), 3) for n, length in enumerate(lengths, 1)])
    pieces = Pieces(tokens.astype(np.uint16), 3, 8, "train")
    found = [pieces.text(int(start), int(length)) for start, length, _ in pieces.take(np.arange(pieces.count))]
    # A document of one token can't be halved, nor can the one token that 9 and 17 leave over.
    expected = [
        100 * n + i for n, length in enumerate(lengths, 1) if length > 1 for i in range(length - (length % 8 == 1))
    ]
    assert np.concatenate(found).tolist() == expected
    assert max(map(len, found)) == 8


def test_a_sample_has_its_special_tokens_types_and_padding(bert: TrainConfig) -> None:
    _, batch, _ = pairs(bert)
    cls, sep, pad = 2, 3, 0
    for sequence, kinds, real in zip(
        originals(batch).tolist(),
        batch.inputs["token_type_ids"].tolist(),
        batch.inputs["attention_mask"].tolist(),
        strict=True,
    ):
        length = sum(real)
        assert real == [1] * length + [0] * (24 - length)
        assert sequence[length:] == [pad] * (24 - length)
        assert sequence[0] == cls
        first_end = sequence.index(sep)
        assert [place for place, token in enumerate(sequence) if token == sep] == [first_end, length - 1]
        assert kinds == [0] * (first_end + 1) + [1] * (length - first_end - 1) + [0] * (24 - length)
    assert not torch.isin(batch.labels, torch.tensor([cls, sep, pad])).any()


# ---- the loss ----


def test_the_losses_are_transformers_own(masked: TrainConfig) -> None:
    text = prepare_corpus(masked)
    made = objective_for(masked, text)
    model: Any = build_model(masked.model, vocab_size=text.info.vocab_size, seq_len=24, seed=0, dropout=0.0)
    batch = made.batch(1, 0, ALL)
    losses = made.losses(model, batch)
    more = {} if batch.follows is None else {"next_sentence_label": batch.follows}
    expected = model(**batch.inputs, labels=batch.labels, **more).loss
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-6)  # pyright: ignore
    assert len(losses) == len(made.terms) == len(batch.predicted())


def test_a_batch_that_predicts_nothing_has_no_loss_and_a_gradient_of_zeros(roberta: TrainConfig) -> None:
    text = prepare_corpus(roberta)
    made = objective_for(roberta, text)
    model = build_model("roberta", vocab_size=text.info.vocab_size, seq_len=24, seed=0)
    batch = made.batch(1, 0, ALL)
    (loss,) = made.losses(model, Batch(batch.inputs, torch.full_like(batch.labels, IGNORED)))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_micro_batches_add_up_to_the_mean_over_all_that_is_predicted(masked: TrainConfig, tmp_path: Path) -> None:
    config = replace(masked, strategy="fp32", dropout=0.0)
    for micro in (1, 4):
        train(replace(config, micro_batch=micro), tmp_path / str(micro))
    records = [runfiles.read_metrics(tmp_path / str(micro) / "metrics.jsonl") for micro in (1, 4)]
    for key in ("loss", "grad_norm", "validation_loss", "masked_loss"):
        found, expected = ([record[key] for record in each if key in record] for each in records)
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_validation_loss_is_the_mean_over_the_masked_tokens(bert: TrainConfig, tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    run = train(bert, tmp_path / "run")
    model = BertForPreTraining.from_pretrained(tmp_path / "run/checkpoints/step-000008", dtype=torch.bfloat16).eval()
    batch = objective(bert).validation(ALL)
    with torch.no_grad():
        logits = model(**batch.inputs).prediction_logits.float()
    expected = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert run["final"]["validation_loss"] == pytest.approx(expected.item(), rel=2e-3)
    record = runfiles.read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert record["loss"] == pytest.approx(record["masked_loss"] + record["next_sentence_loss"])
    assert run["objective"] == {"name": "masked-pairs", "masked_share": 0.15, "unrelated_share": 0.5}


# ---- dropout ----


def test_dropout_follows_from_its_keys_and_leaves_the_generators_alone() -> None:
    drop, ones = torch.nn.Dropout(0.5), torch.ones(64)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = []
    for keys in ((1, 2), (1, 3), (1, 2)):
        with dropout_bits(torch.device("cpu"), *keys):
            found.append(drop(ones))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(torch.rand(2), expected)


def test_a_run_has_the_dropout_of_its_family_unless_told_otherwise(roberta: TrainConfig, tmp_path: Path) -> None:
    losses = {}
    for dropout in (None, 0.1, 0.0, 0.4):
        train(replace(roberta, dropout=dropout, steps=1, warmup=0), tmp_path / str(dropout))
        losses[dropout] = runfiles.read_metrics(tmp_path / str(dropout) / "metrics.jsonl")[0]["loss"]
    assert losses[None] == losses[0.1]
    assert len(set(losses.values())) == 3


# ---- refusals ----


def test_a_tokenizer_without_a_mask_token_is_refused(bert: TrainConfig, tiny: TrainConfig) -> None:
    text = prepare_corpus(replace(tiny, tokenizer="bpe", vocab_size=270))
    with pytest.raises(UserError, match=r"bert needs a tokenizer with special tokens for .*\[MASK\].*got bpe"):
        objective_for(bert, text)


def test_text_of_one_document_has_no_pairs() -> None:
    with pytest.raises(UserError, match=r"train split must have at least 2 documents of 2 tokens.*got 1"):
        Pieces(np.array([5, 6, 3, 7, 3]), 3, 8, "train")

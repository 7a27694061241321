"""Vocabularies: trained on the text, published, or from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from collage.train import tokens
from collage.train.config import PRETRAINED, TrainConfig, UserError
from collage.train.data import prepare_corpus
from collage.train.loop import train
from collage.train.models import BERT, LLAMA, MODELS, ROBERTA, ModelSpec
from collage.train.recipes import filled
from collage.train.tokens import Unreachable, choose, pack, read_tokenizer, special, train_bpe, train_wordpiece

DOCUMENTS = ["The cat sat on the mat; thé CAT slept.", "A [SEP] in the text, and a cat.", "Matters of cats: 12 cats."]


def test_a_wordpiece_vocabulary_is_lower_case_without_accents_and_marks_pieces_inside_words() -> None:
    pieces = train_wordpiece(DOCUMENTS, 80)
    assert pieces.encode("THÉ cat", add_special_tokens=False).tokens == ["the", "cat"]
    assert [pieces.id_to_token(number) for number in range(5)] == list(BERT.special_tokens)
    inside = [token for token in pieces.get_vocab() if token.startswith("##")]
    assert inside
    assert pieces.get_vocab_size() <= 80
    assert pieces.encode("ㅁ", add_special_tokens=False).tokens == ["[UNK]"]


@pytest.mark.parametrize("make", [train_wordpiece, train_bpe])
def test_every_training_gives_the_same_vocabulary(make: Callable[[list[str], int], Tokenizer]) -> None:
    # The library's own WordPiece training depends on the order of hash tables, each of which has another seed.
    text = [" ".join(f"w{n * n % 97}ord{n % 13}s" for n in range(k, k + 90)) for k in range(5)]
    assert len({make(text, 300).to_str() for _ in range(4)}) == 1


@pytest.mark.parametrize(("family", "end"), [(BERT, "[SEP]"), (ROBERTA, "</s>"), (LLAMA, "</s>")])
def test_special_tokens_are_the_familys_in_their_order(family: Any, end: str) -> None:
    bpe = train_bpe(DOCUMENTS, 300, family.special_tokens)
    assert [bpe.id_to_token(number) for number in range(len(family.special_tokens))] == list(family.special_tokens)
    assert special(bpe).end == end


def test_the_name_of_a_special_token_in_the_text_is_text() -> None:
    pieces = train_wordpiece(DOCUMENTS, 120)
    packed = pack(pieces, DOCUMENTS)
    assert packed.dtype == np.uint16
    assert (packed == pieces.token_to_id("[SEP]")).sum() == len(DOCUMENTS)
    assert packed[-1] == pieces.token_to_id("[SEP]")


def test_a_tokenizer_that_cannot_end_a_document_is_refused() -> None:
    with pytest.raises(UserError, match="a token for the end of a document, one of"):
        read_tokenizer(train_bpe(DOCUMENTS, 300, ("<unk>",)).to_str())


def test_a_tokenizer_of_ones_own_is_read_from_a_file_or_its_folder(tiny: TrainConfig, tmp_path: Path) -> None:
    made = train_bpe(DOCUMENTS, 290)
    made.enable_truncation(4)
    made.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        corpus = prepare_corpus(replace(tiny, tokenizer=str(path)))
        assert corpus.info.vocab_size == made.get_vocab_size()
        assert len(corpus.train) > 30 * 5
    with pytest.raises(UserError, match=r"tokenizer must be one of bytes, bpe, wordpiece.*or a tokenizer\.json"):
        replace(tiny, tokenizer="nowhere")


# ---- published ones ----


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str) -> Tokenizer:
        raise Unreachable("no network")

    monkeypatch.setattr(tokens, "load_published", fail)


@pytest.fixture
def recipe_settings(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A recipe that asks for a published tokenizer, at the size of a test."""
    monkeypatch.setitem(MODELS, "small", ModelSpec(hidden=16, layers=1, heads=2, family=ROBERTA, positions=32))
    given = {**tiny.to_json(), "recipe": "roberta-base", "model": "small", "seq_len": 24}
    del given["tokenizer"]
    return TrainConfig.from_json(filled({**given, "vocab_size": 270}))


def test_a_recipes_tokenizer_out_of_reach_is_trained_on_the_text_and_said_so(
    recipe_settings: TrainConfig, unreachable: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe_settings, tmp_path / "run")
    said = "tokenizer roberta (FacebookAI/roberta-base) can't be loaded (no network): a bpe vocabulary of 270 tokens"
    assert run["corpus"]["tokenizer_note"].startswith(said)
    assert (run["corpus"]["tokenizer"], run["corpus"]["vocab_size"]) == ("bpe", 270)
    assert f"WARNING: {said}" in capsys.readouterr().out


def test_a_tokenizer_asked_for_by_itself_is_never_replaced(tiny: TrainConfig, unreachable: None) -> None:
    with pytest.raises(UserError, match=r"tokenizer gpt2 \(openai-community/gpt2\) can't be loaded: no network; .*bpe"):
        choose(replace(tiny, tokenizer="gpt2"), DOCUMENTS)


def test_a_published_tokenizer_in_reach_is_the_one_taken(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made = train_bpe(DOCUMENTS, 280, ("<|endoftext|>",))
    asked = []
    monkeypatch.setattr(tokens, "load_published", lambda repository: asked.append(repository) or made)
    chosen = choose(replace(tiny, tokenizer="gpt2"), DOCUMENTS)
    assert asked == [PRETRAINED["gpt2"].repository]
    assert (chosen.tokenizer, chosen.name, chosen.note) == (made, "gpt2", None)
    assert pack(made, ["a"])[-1] == made.token_to_id("<|endoftext|>")


def test_the_local_cache_is_read_before_the_network_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    file = tmp_path / "tokenizer.json"
    train_bpe(DOCUMENTS, 280).save(str(file))

    def cached(repository: str, name: str, local_files_only: bool = False) -> str:
        assert local_files_only
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("asked the network"))
    assert tokens.load_published("some/where").get_vocab_size() == 280


def test_one_failed_question_to_the_hub_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    downloads = []

    class Api:
        def model_info(self, repository: str, timeout: float) -> None:
            assert timeout <= 5
            raise ConnectionError("name or service\nnot known")

    def download(repository: str, name: str, local_files_only: bool = False) -> str:
        downloads.append(local_files_only)
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(Unreachable, match="name or service not known"):
        tokens.load_published("some/where")
    assert downloads == [True]


def test_a_resumed_run_keeps_its_tokenizer_whatever_the_hub_says(
    recipe_settings: TrainConfig, unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(recipe_settings, schedule="constant", steps=3)
    train(config, tmp_path / "run")
    monkeypatch.setattr(tokens, "load_published", lambda repository: pytest.fail("asked the hub"))
    run = train(replace(config, steps=4), tmp_path / "run", resume=True)
    assert run["final"]["step"] == 4
    assert (run["corpus"]["tokenizer"], run["corpus"]["vocab_size"]) == ("bpe", 270)
    assert run["corpus"]["tokenizer_note"].startswith("tokenizer roberta")

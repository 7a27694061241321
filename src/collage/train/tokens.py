"""Tokenizers: text in, arrays of token numbers out, an end-of-document token after each document.

A vocabulary is trained on the text, with the special tokens of the model's family, or is a published one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from collage.train.config import BYTE_VOCABULARY, PRETRAINED, TOKENIZERS, TrainConfig, UserError
from collage.train.models import BERT, END_OF_DOCUMENT, GPT, MODELS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAINED_VOCABULARY = 4_096
"""Tokens of a vocabulary trained on the text unless said otherwise."""

ALPHABET = 1_000
"""The most characters that a WordPiece vocabulary holds; rarer ones are unknown. BERT's tools have the same bound."""

HUB_SECONDS = 5.0
FILE = "tokenizer.json"


# ---- special tokens --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Special:
    """The names of a vocabulary's special tokens; None where it has none for the purpose."""

    end: str
    cls: str | None
    sep: str | None
    mask: str | None
    pad: str | None
    unk: str | None


_NAMES = {
    "end": (END_OF_DOCUMENT, "<|endoftext|>", "[SEP]", "</s>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}


def special(tokenizer: Tokenizer) -> Special:
    """The special tokens of a tokenizer, found by their names.

    Raises:
        UserError: none of them can stand at the end of a document.
    """
    known = tokenizer.get_vocab(with_added_tokens=True)
    found = {role: next((name for name in names if name in known), None) for role, names in _NAMES.items()}
    if found["end"] is None:
        raise UserError(
            f"the tokenizer must have a token for the end of a document, one of {', '.join(_NAMES['end'])}, got none; "
            "take the file of a run, or another tokenizer"
        )
    return Special(**found)  # pyright: ignore[reportArgumentType]


def number(tokenizer: Tokenizer, name: str | None) -> int:
    """The number of a token that is known to be there."""
    found = None if name is None else tokenizer.token_to_id(name)
    assert found is not None
    return found


# ---- making one ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The tokenizer of a text.

    Attributes:
        tokenizer: None: bytes.
        vocab_size: its tokens.
        name: what it is.
        note: what the user must know of it: that a published vocabulary was out of reach; None: nothing.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    name: str
    note: str | None = None


def choose(config: TrainConfig, documents: Sequence[str], tokenizer_json: str | None = None) -> Chosen:
    """The tokenizer that `config` names.

    Args:
        config: the settings.
        documents: what to train a vocabulary on.
        tokenizer_json: a run's own tokenizer, in place of another one.

    Raises:
        UserError: a file holds no tokenizer, or a published one is out of reach and no recipe asked for it.
    """
    if config.tokenizer == "bytes":
        return Chosen(None, BYTE_VOCABULARY, "bytes")
    if tokenizer_json is not None:
        return _chosen(read_tokenizer(tokenizer_json), config.tokenizer)
    if config.tokenizer not in TOKENIZERS:
        return _chosen(read_tokenizer(_file_text(Path(config.tokenizer))), config.tokenizer)
    if config.tokenizer not in PRETRAINED:
        return _chosen(train_tokenizer(config, config.tokenizer, documents), config.tokenizer)
    published = PRETRAINED[config.tokenizer]
    try:
        return _chosen(load_published(published.repository), config.tokenizer)
    except Unreachable as error:
        if not _asked_by_recipe(config):
            raise UserError(
                f"tokenizer {config.tokenizer} ({published.repository}) can't be loaded: {error}; name its {FILE}, "
                f"or train one on the text: --tokenizer {published.kind}"
            ) from error
        made = train_tokenizer(config, published.kind, documents, published.vocab_size)
        size = made.get_vocab_size(with_added_tokens=True)
        note = (
            f"tokenizer {config.tokenizer} ({published.repository}) can't be loaded ({error}): a {published.kind} "
            f"vocabulary of {size:,} tokens was trained on the text in its place"
        )
        return Chosen(made, size, published.kind, note)


def _chosen(tokenizer: Tokenizer, name: str) -> Chosen:
    return Chosen(tokenizer, tokenizer.get_vocab_size(with_added_tokens=True), name)


def _asked_by_recipe(config: TrainConfig) -> bool:
    """Whether the tokenizer is the one of the config's recipe, rather than asked for by itself."""
    from collage.train.recipes import recipe

    return config.recipe is not None and recipe(config.recipe).tokenizer == config.tokenizer


def train_tokenizer(
    config: TrainConfig, kind: str, documents: Sequence[str], vocab_size: int | None = None
) -> Tokenizer:
    """A vocabulary of `kind` trained on documents, with the special tokens of the config's model."""
    size = config.vocab_size or vocab_size or TRAINED_VOCABULARY
    tokens = MODELS[config.model].family.special_tokens
    if kind == "wordpiece" and "[UNK]" not in tokens:
        raise UserError(
            f"a wordpiece vocabulary needs the special tokens of BERT, {config.model} has {', '.join(tokens)}"
        )
    return (train_wordpiece if kind == "wordpiece" else train_bpe)(documents, size, tokens)


def train_bpe(
    documents: Sequence[str], vocab_size: int, special_tokens: Sequence[str] = GPT.special_tokens
) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer, length=len(documents))
    return bpe


def train_wordpiece(
    documents: Sequence[str], vocab_size: int, special_tokens: Sequence[str] = BERT.special_tokens
) -> Tokenizer:
    """A WordPiece of at most ``vocab_size`` lower-case tokens, trained on the documents.

    Text and vocabulary are BERT's (uncased): accents are removed, words split at spaces and punctuation, a piece
    inside a word begins with ##.
    """
    from tokenizers import trainers

    letters = _letters(documents)
    # The trainer numbers the pieces inside words in the order of a hash table, and breaks ties by these numbers: every
    # training would give another vocabulary. Those of one letter are given to it, in an order of ours.
    inside = [f"##{letter}" for letter in letters if letter.isalnum()]
    trained = _wordpiece({})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special_tokens, *inside],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    trained.train_from_iterator(documents, trainer, length=len(documents))
    pieces = _wordpiece(trained.get_vocab(with_added_tokens=True))
    pieces.add_special_tokens(list(special_tokens))
    return pieces


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    pieces.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    return pieces


def _letters(documents: Iterable[str]) -> list[str]:
    """The most frequent characters of the normalised text, in the order of their code points."""
    from tokenizers import normalizers

    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts: Counter[str] = Counter()
    for text in documents:
        counts.update(normalizer.normalize_str(text))
    frequent = sorted((letter for letter in counts if not letter.isspace()), key=lambda c: (-counts[c], c))
    return sorted(frequent[:ALPHABET])


# ---- reading one -----------------------------------------------------------------------------------------------


def read_tokenizer(tokenizer_json: str) -> Tokenizer:
    """The tokenizer that the text of a tokenizer.json holds.

    Raises:
        UserError: it holds none, or one that can't end a document.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(
            f"{FILE} must be a tokenizer that `collage train` or the library tokenizers wrote, got: {error}"
        ) from error
    special(tokenizer)
    return tokenizer


def _file_text(path: Path) -> str:
    file = path / FILE if path.is_dir() else path
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer must be a {FILE} or a folder with one, got {path}: {error}") from error


class Unreachable(Exception):  # noqa: N818 - what the caller does about it decides whether it's an error
    """A published tokenizer that is neither in the local cache nor to be had from the Hugging Face hub."""


def load_published(repository: str) -> Tokenizer:
    """A tokenizer of the Hugging Face hub, from the local cache if it is there.

    Raises:
        Unreachable: it can't be had; known within seconds.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        return read_tokenizer(
            Path(hf_hub_download(repository, FILE, local_files_only=True)).read_text(encoding="utf-8")
        )
    except OSError:
        pass  # not in the cache
    try:
        # A download is tried again and again for half a minute, one question is not.
        HfApi().model_info(repository, timeout=HUB_SECONDS)
        return read_tokenizer(Path(hf_hub_download(repository, FILE)).read_text(encoding="utf-8"))
    except UserError:
        raise
    except Exception as error:  # of whichever client the hub's library uses
        raise Unreachable(" ".join(str(error).split()) or type(error).__name__) from error


def end_token(tokenizer: Tokenizer | None) -> int:
    """The number of the token that ends each document; of None, which stands for bytes, 256."""
    return BYTE_VOCABULARY - 1 if tokenizer is None else number(tokenizer, special(tokenizer).end)


# ---- packing ---------------------------------------------------------------------------------------------------


def pack_bytes(documents: list[str]) -> np.ndarray:
    """The documents' UTF-8 bytes as uint16, 256 after each document."""
    end = np.array([BYTE_VOCABULARY - 1], dtype=np.uint16)
    pieces = [part for text in documents for part in (np.frombuffer(text.encode(), dtype=np.uint8), end)]
    return np.concatenate(pieces).astype(np.uint16)


def pack(tokenizer: Tokenizer | None, documents: list[str]) -> np.ndarray:
    """The documents' tokens as uint16 where they all fit, else uint32, the end token after each document.

    A special token's name in the text is text like any other.
    """
    if tokenizer is None:
        return pack_bytes(documents)
    end = end_token(tokenizer)
    tokenizer.encode_special_tokens = True  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    dtype = np.uint16 if tokenizer.get_vocab_size(with_added_tokens=True) <= 2**16 else np.uint32
    return np.concatenate([np.array([*piece.ids, end], dtype=dtype) for piece in encoded])

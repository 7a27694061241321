"""Tokenizers: text in, arrays of token numbers out, an end-of-document token after each document."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from collage.train.config import BYTE_VOCABULARY, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BPE_VOCABULARY = 4_096
END_OF_DOCUMENT = "<|endofdocument|>"


def pack_bytes(documents: list[str]) -> np.ndarray:
    """The documents' UTF-8 bytes as uint16, 256 after each document."""
    end = np.array([BYTE_VOCABULARY - 1], dtype=np.uint16)
    pieces = [part for text in documents for part in (np.frombuffer(text.encode(), dtype=np.uint8), end)]
    return np.concatenate(pieces).astype(np.uint16)


def train_bpe(documents: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer, length=len(documents))
    return bpe


def read_bpe(tokenizer_json: str) -> Tokenizer:
    """The BPE that the text of a tokenizer.json holds. Raises UserError if it holds none of ours."""
    from tokenizers import Tokenizer

    try:
        bpe = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"tokenizer.json must be a tokenizer that `collage train` wrote, got: {error}") from error
    if bpe.token_to_id(END_OF_DOCUMENT) is None:
        raise UserError(f"tokenizer.json must have the token {END_OF_DOCUMENT}, got none; take the run's own file")
    return bpe


def pack_bpe(bpe: Tokenizer, documents: list[str]) -> np.ndarray:
    """The documents' tokens as uint16 where they all fit, else uint32, the end token after each document."""
    end = bpe.token_to_id(END_OF_DOCUMENT)
    encoded = bpe.encode_batch(documents, add_special_tokens=False)
    dtype = np.uint16 if bpe.get_vocab_size() <= 2**16 else np.uint32
    return np.concatenate([np.array([*piece.ids, end], dtype=dtype) for piece in encoded])

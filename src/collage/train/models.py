"""Models with fresh weights: the paper's GPT, BERT, RoBERTa and LLaMA, as transformers builds them.

A family is a record: its classes in transformers, how it is pre-trained, its special tokens, and the settings that make
transformers' class the paper's architecture. A model is a row of `MODELS`: a family and a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CAUSAL, MASKED, MASKED_PAIRS = "causal", "masked", "masked-pairs"
"""What models are pre-trained to predict; `collage.train.objectives` has a class for each."""


# ---- records ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        config: transformers' configuration class.
        model: transformers' class with the heads of pre-training.
        objective: what it is pre-trained to predict.
        special_tokens: those of a vocabulary trained for it, in their order; the order of the originals where the
            architecture depends on it (the padding token of RoBERTa has the number 1).
        dropout: the probability in pre-training.
        settings: (spec, seq_len, dropout) -> what the configuration needs beside the shape that all share.
    """

    config: str
    model: str
    objective: str
    special_tokens: tuple[str, ...]
    dropout: float
    settings: Callable[[ModelSpec, int, float], dict[str, Any]]


def _gpt_settings(spec: ModelSpec, seq_len: int, dropout: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": seq_len,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "tie_word_embeddings": False,
        "use_cache": False,
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
    }


def _llama_settings(spec: ModelSpec, seq_len: int, dropout: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": seq_len,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attention_dropout": dropout,
    }


def _bert_settings(spec: ModelSpec, seq_len: int, dropout: float) -> dict[str, Any]:
    return {
        "max_position_embeddings": spec.positions,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def _roberta_settings(spec: ModelSpec, seq_len: int, dropout: float) -> dict[str, Any]:
    assert spec.positions is not None
    return {
        **_bert_settings(spec, seq_len, dropout),
        # RoBERTa numbers positions from the padding token's number + 1 on.
        "max_position_embeddings": spec.positions + 2,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }


END_OF_DOCUMENT = "<|endofdocument|>"

GPT = Family("GPTNeoXConfig", "GPTNeoXForCausalLM", CAUSAL, (END_OF_DOCUMENT,), 0.0, _gpt_settings)
"""Decoder: rotary over the whole head, pre-LN, untied embeddings; GPT-NeoX without its parallel residual."""

LLAMA = Family("LlamaConfig", "LlamaForCausalLM", CAUSAL, ("<unk>", "<s>", "</s>"), 0.0, _llama_settings)
"""Decoder: rotary, RMSNorm before each block, gated SiLU feed-forward, no biases, untied embeddings."""

_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT = Family("BertConfig", "BertForPreTraining", MASKED_PAIRS, _BERT_TOKENS, 0.1, _bert_settings)
"""Encoder: learned positions, post-LN, tied embeddings, heads for masked tokens and for the next sentence."""

_ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ROBERTA = Family("RobertaConfig", "RobertaForMaskedLM", MASKED, _ROBERTA_TOKENS, 0.1, _roberta_settings)
"""Encoder as BERT's, with the head for masked tokens alone."""


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a model.

    Attributes:
        hidden: width of the residual stream.
        layers: number of blocks.
        heads: attention heads.
        init_std: standard deviation of fresh weights.
        family: the architecture.
        intermediate: width of the feed-forward layers; None: four times `hidden`.
        positions: the longest sequence; None: any (rotary embeddings).
    """

    hidden: int
    layers: int
    heads: int
    init_std: float = 0.02
    family: Family = GPT
    intermediate: int | None = None
    positions: int | None = None


MODELS = {
    "gpt-tiny": ModelSpec(hidden=32, layers=2, heads=2),
    "gpt-1m": ModelSpec(hidden=128, layers=4, heads=4),
    "gpt-10m": ModelSpec(hidden=320, layers=8, heads=5),
    "gpt-125m": ModelSpec(hidden=768, layers=12, heads=12, init_std=0.021),
    "gpt-1.3b": ModelSpec(hidden=2048, layers=24, heads=16, init_std=0.021),
    "gpt-2.7b": ModelSpec(hidden=2560, layers=32, heads=32, init_std=0.021),
    "gpt-6.7b": ModelSpec(hidden=4096, layers=32, heads=32, init_std=0.021),
    "bert-tiny": ModelSpec(hidden=96, layers=2, heads=3, family=BERT, positions=128),
    "bert-base": ModelSpec(hidden=768, layers=12, heads=12, family=BERT, positions=512),
    "bert-large": ModelSpec(hidden=1024, layers=24, heads=16, family=BERT, positions=512),
    "roberta-tiny": ModelSpec(hidden=96, layers=2, heads=3, family=ROBERTA, positions=128),
    "roberta-base": ModelSpec(hidden=768, layers=12, heads=12, family=ROBERTA, positions=512),
    "llama-tiny": ModelSpec(hidden=96, layers=2, heads=3, family=LLAMA, intermediate=256),
    "llama-7b": ModelSpec(hidden=4096, layers=32, heads=32, family=LLAMA, intermediate=11008),
}
"""The models by name: those of the paper, small ones for trying things out, and the default of `collage compare`."""


# ---- models ----------------------------------------------------------------------------------------------------


def attention_for(device_type: str, seq_len: int) -> str:
    """The fastest deterministic attention of transformers for a device.

    Short sequences on a CPU are better off without the fused kernel: a bfloat16 step of gpt-1m on one Zen 4 core takes
    105 ms instead of 157 at 128 tokens, 189 instead of 201 at 512, and 367 instead of 231 at 1024.
    """
    return "eager" if device_type == "cpu" and seq_len <= 512 else "sdpa"


def model_config(
    name: str, vocab_size: int, seq_len: int, *, dropout: float | None = None, attention: str = "sdpa"
) -> PretrainedConfig:
    """The configuration of the model `name` for transformers.

    Args:
        name: a key of `MODELS`.
        vocab_size: tokens of the vocabulary.
        seq_len: tokens of a sequence; models with learned positions have room for `ModelSpec.positions` anyway.
        dropout: the probability; None: the family's own.
        attention: transformers' name of the implementation.
    """
    import transformers

    spec = MODELS[name]
    probability = spec.family.dropout if dropout is None else dropout
    return getattr(transformers, spec.family.config)(
        vocab_size=vocab_size,
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        intermediate_size=spec.intermediate or 4 * spec.hidden,
        initializer_range=spec.init_std,
        attn_implementation=attention,
        **spec.family.settings(spec, seq_len, probability),
    )


def build_model(
    name: str,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    attention: str = "sdpa",
    dropout: float | None = None,
    device: str = "cpu",
) -> PreTrainedModel:
    """The model `name` in float32, its weights a function of the seed alone.

    Neither the default dtype nor the state of torch's generators matters, and both are left as they were. On the
    device "meta" it has shapes and no memory.
    """
    import transformers

    config = model_config(name, vocab_size, seq_len, dropout=dropout, attention=attention)
    with fresh_weights(seed), torch.device(device):
        return getattr(transformers, MODELS[name].family.model)(config)


@contextmanager
def fresh_weights(seed: int) -> Iterator[None]:
    """Within it new weights are float32 and a function of the seed; afterwards torch's state is as before."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every accelerator too.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of named parameters: matrices with `weight_decay`, biases and norm gains without.

    Parameters are named so that an audit can report by module.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in named if p.ndim >= 2]
    others = [(name, p) for name, p in named if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

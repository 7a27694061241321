"""Which model is planned for: by name, by a configuration file of transformers, or by its shape."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from collage.train.config import UserError
from collage.train.models import MODELS, model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARIES = {"gpt": 50257, "bert": 30522, "roberta": 50265, "llama": 32000}
"""Tokens of the published tokenizers, by the beginning of a model's name: GPT-2 BPE, BERT WordPiece and so on."""
MASKED_SHARE = 0.15
"""Of the tokens of an encoder's sequence, as :mod:`collage.train.objectives` masks them."""
SEQ, SHORT_SEQ = 2048, 512
"""Tokens of a sequence where none are given: of decoders, of BERT and its kin."""
FAMILIES = {"gpt": "GPTNeoXConfig", "llama": "LlamaConfig", "bert": "BertConfig"}
"""What a shape given by options is a model of, and transformers' configuration of it."""


@dataclass(frozen=True)
class Subject:
    """A model and the length of its sequences.

    Attributes:
        label: for people.
        config: transformers' configuration.
        seq_len: tokens of a sequence.
    """

    label: str
    config: PretrainedConfig
    seq_len: int

    @property
    def layers(self) -> int:
        """How many blocks it has."""
        return int(getattr(self.config, "num_hidden_layers", 0))

    @cached_property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of all trained parameters, from the whole model on the meta device."""
        return tuple(param.shape for param in self._meta.parameters() if param.requires_grad)

    @property
    def count(self) -> int:
        """Parameters."""
        return sum(shape.numel() for shape in self.shapes)

    @cached_property
    def by_block(self) -> list[list[int]]:
        """The parameters of each block, as places in ``shapes``."""
        return self.block_parameters(self._meta)

    @cached_property
    def uniform(self) -> bool:
        """Whether all blocks are alike, so that some stand for all."""
        kinds = getattr(self.config, "layer_types", None) or ()
        shapes = [[self.shapes[place] for place in block] for block in self.by_block]
        return len(set(kinds)) <= 1 and bool(shapes) and all(each == shapes[0] for each in shapes)

    @cached_property
    def _meta(self) -> PreTrainedModel:
        try:
            with torch.device("meta"):
                return self.build(dtype=torch.bfloat16, attention="sdpa")
        except Exception as error:
            raise UserError(f"transformers can't build {self.label}: {type(error).__name__}: {error}") from error

    def with_layers(self, layers: int) -> Subject:
        """The same with fewer blocks."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return replace(self, config=config)

    def build(self, *, dtype: torch.dtype, attention: str, checkpointing: bool = False) -> PreTrainedModel:
        """The model, where the device in force says."""
        config = copy.deepcopy(self.config)
        model = _model_class(config)._from_config(config, dtype=dtype, attn_implementation=attention)
        model.train()
        if checkpointing:
            # The name before transformers 5.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a model; none where it isn't one list of them."""
        lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == self.layers]
        return list(lists[0]) if len(lists) == 1 else []

    def block_parameters(self, model: nn.Module) -> list[list[int]]:
        """The parameters of each block, by their place among the model's trained ones."""
        place = {id(param): index for index, param in enumerate(p for p in model.parameters() if p.requires_grad)}
        return [[place[id(p)] for p in block.parameters() if id(p) in place] for block in self.blocks(model)]

    def tokens(self, batch: int) -> Tensor:
        """Sequences with the token behind them."""
        return torch.zeros(batch, self.seq_len + 1, dtype=torch.long)

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Mean cross-entropy of the next tokens, or of as many as training masks; in float32 from the logits on."""
        found = model(input_ids=tokens[:, :-1])
        logits = found["logits" if "logits" in found else "prediction_logits"]
        pairs = found.get("seq_relationship_logits")  # which of two sentences follows which
        del found
        logits, labels = logits.flatten(0, 1), tokens[:, 1:].flatten()
        if _predicts_masked(self.config):
            places = torch.arange(len(tokens) * round(MASKED_SHARE * self.seq_len), device=tokens.device)
            logits, labels = logits.index_select(0, places), labels[: len(places)]
        loss = cross_entropy(logits.float(), labels)
        return loss if pairs is None else loss + cross_entropy(pairs.float(), tokens[:, 0].clamp(max=1))


def _predicts_masked(config: PretrainedConfig) -> bool:
    """Whether it is an encoder, which is trained on masked tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _model_class(config: PretrainedConfig) -> Any:
    """The class with the head it is trained with: the one that the configuration names, or that of its kind."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = MODEL_FOR_MASKED_LM_MAPPING if _predicts_masked(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise UserError(f"models of type {config.model_type!r} predict no tokens, so there is no training to plan")
    return mapping[type(config)]


# ---- where it is from ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A dense model by its numbers; `intermediate` and `kv_heads` are those usual in its family where they are None."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    family: str = "gpt"
    kv_heads: int | None = None
    intermediate: int | None = None


def named(name: str, seq_len: int, vocab: int | None = None) -> Subject:
    """A model of :data:`collage.train.models.MODELS`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in MODELS:
        raise UserError(
            f"--model must be one of {', '.join(MODELS)}, or a configuration file of transformers (a config.json or "
            f"its folder), got {name!r}; or give --hidden, --layers, --heads and --vocab"
        )
    tokens = vocab or VOCABULARIES.get(name.partition("-")[0], VOCABULARIES["gpt"])
    config = model_config(name, tokens, seq_len)
    config.architectures = [MODELS[name].family.model]
    return _checked(Subject(name, config, seq_len))


def from_file(path: Path, seq_len: int | None) -> Subject:
    """A model of a config.json, or of the folder that holds one; without a length, with :data:`SEQ` or as many
    positions as it has.

    Raises:
        UserError: it isn't such a file, or of a model that transformers doesn't know.
    """
    from transformers import CONFIG_MAPPING

    file = path / "config.json" if path.is_dir() else path
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--model must be a readable config.json of transformers, got {file}: {error}") from error
    kind = str(settings.get("model_type")) if isinstance(settings, dict) else ""
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{file} must name a model_type that transformers knows, got {kind!r}; a newer transformers may know it"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict({**settings, "use_cache": False})
    except Exception as error:
        raise UserError(f"transformers can't read {file}: {type(error).__name__}: {error}") from error
    positions = getattr(config, "max_position_embeddings", None) or SEQ
    return _checked(Subject(str(path), config, seq_len or min(SEQ, positions)))


def from_shape(shape: Shape, seq_len: int) -> Subject:
    """A model of a shape, untied, without dropout.

    Raises:
        UserError: no model has this shape.
    """
    import transformers

    if shape.family not in FAMILIES:
        raise UserError(f"--family must be one of {', '.join(FAMILIES)}, got {shape.family!r}")
    kv_heads = shape.heads if shape.kv_heads is None else shape.kv_heads
    for name, value in (("--hidden", shape.hidden), ("--layers", shape.layers), ("--heads", shape.heads)):
        _at_least_one(name, value)
    for name, value in (("--vocab", shape.vocab), ("--kv-heads", kv_heads)):
        _at_least_one(name, value)
    if shape.hidden % shape.heads or shape.hidden // shape.heads % 2:
        raise UserError(
            f"--heads must divide --hidden into heads of an even width, got {shape.heads} heads of {shape.hidden}"
        )
    if shape.heads % kv_heads or (kv_heads != shape.heads and shape.family != "llama"):
        raise UserError(f"--kv-heads must divide --heads, with --family llama, got {kv_heads} of {shape.heads}")
    width = shape.intermediate or (_llama_width(shape.hidden) if shape.family == "llama" else 4 * shape.hidden)
    own: Mapping[str, Mapping[str, Any]] = {
        "gpt": {"rotary_pct": 1.0, "use_parallel_residual": False, "tie_word_embeddings": False},
        "llama": {"num_key_value_heads": kv_heads, "tie_word_embeddings": False},
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }
    config = getattr(transformers, FAMILIES[shape.family])(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=width,
        max_position_embeddings=seq_len,
        use_cache=False,
        **own[shape.family],
    )
    label = f"{shape.family} of {shape.hidden} x {shape.layers} layers, {shape.heads} heads, {shape.vocab:,} tokens"
    return _checked(Subject(label, config, seq_len))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} must be >= 1, got {value}")


def _llama_width(hidden: int) -> int:
    """Two thirds of four times the width, up to the next multiple of 256."""
    return -(-8 * hidden // 3 // 256) * 256


def _checked(subject: Subject) -> Subject:
    longest = getattr(subject.config, "max_position_embeddings", None)
    if longest is not None and subject.seq_len > longest:
        raise UserError(f"--seq must be at most the {longest} positions of {subject.label}, got {subject.seq_len}")
    if subject.layers < 1:
        raise UserError(f"{subject.label} has no blocks (num_hidden_layers), so it can't be planned")
    return subject

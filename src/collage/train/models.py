"""GPT-style decoders with fresh weights: rotary embeddings over the whole head, pre-LN, untied, no dropout.

The architecture is transformers' GPT-NeoX without its parallel residual. Adding a model is adding a row to `MODELS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder; the feed-forward layers are four times as wide as `hidden`."""

    hidden: int
    layers: int
    heads: int
    init_std: float = 0.02


MODELS = {
    "gpt-tiny": ModelSpec(hidden=32, layers=2, heads=2),
    "gpt-1m": ModelSpec(hidden=128, layers=4, heads=4),
    "gpt-10m": ModelSpec(hidden=320, layers=8, heads=5),
    "gpt-125m": ModelSpec(hidden=768, layers=12, heads=12, init_std=0.021),
}
"""The models by name; gpt-tiny is for trying things out, gpt-125m is the smallest of the paper's GPTs."""


def attention_for(device_type: str, seq_len: int) -> str:
    """The fastest deterministic attention of transformers for a device.

    Short sequences on a CPU are better off without the fused kernel: a bfloat16 step of gpt-1m on one Zen 4 core takes
    105 ms instead of 157 at 128 tokens, 189 instead of 201 at 512, and 367 instead of 231 at 1024.
    """
    return "eager" if device_type == "cpu" and seq_len <= 512 else "sdpa"


def build_model(name: str, *, vocab_size: int, seq_len: int, seed: int, attention: str = "sdpa") -> PreTrainedModel:
    """The model `name` in float32 on the CPU, its weights a function of the seed alone.

    Neither the default dtype nor the state of torch's generators matters, and both are left as they were.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    spec = MODELS[name]
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": 4 * spec.hidden,
        "max_position_embeddings": seq_len,
        "initializer_range": spec.init_std,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": attention,
    }
    with _fresh_weights(seed):
        return GPTNeoXForCausalLM(GPTNeoXConfig(**settings))


@contextmanager
def _fresh_weights(seed: int) -> Iterator[None]:
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

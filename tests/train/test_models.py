from __future__ import annotations

from typing import Any

import pytest
import torch

import collage
from collage.train.models import MODELS, ROBERTA, attention_for, build_model, model_config, parameter_groups


def small(seed: int = 0, attention: str = "eager") -> torch.nn.Module:
    return build_model("gpt-1m", vocab_size=257, seq_len=32, seed=seed, attention=attention)


def test_the_same_seed_gives_the_same_fp32_weights_whatever_the_global_state() -> None:
    torch.manual_seed(1)
    first = small().state_dict()
    torch.manual_seed(2)
    torch.set_default_dtype(torch.bfloat16)
    second = small().state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in second.values())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights() -> None:
    assert not torch.equal(small(0).state_dict()["lm_head.weight"], small(1).state_dict()["lm_head.weight"])


def test_building_leaves_generator_and_default_dtype_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    small()
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("name", "low", "high"), [("gpt-1m", 0.8e6, 1.0e6), ("gpt-10m", 9.5e6, 10.5e6)])
def test_a_model_has_the_size_in_its_name(name: str, low: float, high: float) -> None:
    model = build_model(name, vocab_size=257, seq_len=32, seed=0)
    assert low <= sum(p.numel() for p in model.parameters()) <= high


# ---- exact sizes, by arithmetic of our own ----


def gpt_size(vocab: int, h: int, layers: int) -> int:
    # Two untied embeddings; per layer q, k, v, output (4 h² + 4 h), feed-forward (8 h² + 5 h), two norms; a last norm.
    return 2 * vocab * h + layers * (12 * h * h + 13 * h) + 2 * h


def llama_size(vocab: int, h: int, layers: int, wide: int) -> int:
    # No biases; three feed-forward matrices; norms have a gain alone.
    return 2 * vocab * h + layers * (4 * h * h + 3 * h * wide + 2 * h) + h


def encoder_size(vocab: int, h: int, layers: int, positions: int, types: int) -> int:
    # Embeddings with a norm; the decoders' layers; the head: a layer with a norm, a bias per token, the tied embedding.
    embeddings = (vocab + positions + types) * h + 2 * h
    return embeddings + layers * (12 * h * h + 13 * h) + h * h + 3 * h + vocab


def bert_size(vocab: int, h: int, layers: int, positions: int) -> int:
    # The pooler, and two classes of the next sentence.
    return encoder_size(vocab, h, layers, positions, 2) + h * h + h + 2 * h + 2


SIZES = {
    "gpt-tiny": (1024, gpt_size(1024, 32, 2)),
    "gpt-125m": (50_257, gpt_size(50_257, 768, 12)),
    "gpt-1.3b": (50_257, gpt_size(50_257, 2048, 24)),
    "gpt-2.7b": (50_257, gpt_size(50_257, 2560, 32)),
    "gpt-6.7b": (50_257, gpt_size(50_257, 4096, 32)),
    "bert-tiny": (1024, bert_size(1024, 96, 2, 128)),
    "bert-base": (30_522, bert_size(30_522, 768, 12, 512)),
    "bert-large": (30_522, bert_size(30_522, 1024, 24, 512)),
    "roberta-tiny": (1024, encoder_size(1024, 96, 2, 130, 1)),
    "roberta-base": (50_265, encoder_size(50_265, 768, 12, 514, 1)),
    "llama-tiny": (1024, llama_size(1024, 96, 2, 256)),
    "llama-7b": (32_000, llama_size(32_000, 4096, 32, 11_008)),
}


def on_meta(name: str, vocab_size: int) -> Any:
    return build_model(name, vocab_size=vocab_size, seq_len=64, seed=0, device="meta")


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_exactly_so_many_parameters(name: str) -> None:
    vocab_size, expected = SIZES[name]
    model = on_meta(name, vocab_size)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_arithmetic_gives_the_published_sizes() -> None:
    # Of BertForPreTraining, RobertaForMaskedLM and LLaMA-7B as they are published.
    assert [SIZES[name][1] for name in ("bert-base", "roberta-base", "llama-7b")] == [
        110_106_428,
        124_697_433,
        6_738_415_616,
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gpt-125m", (768, 12, 12, 0.021)),
        ("gpt-1.3b", (2048, 24, 16, 0.021)),
        ("gpt-2.7b", (2560, 32, 32, 0.021)),
        ("gpt-6.7b", (4096, 32, 32, 0.021)),
        ("bert-base", (768, 12, 12, 0.02)),
        ("bert-large", (1024, 24, 16, 0.02)),
        ("roberta-base", (768, 12, 12, 0.02)),
        ("llama-7b", (4096, 32, 32, 0.02)),
    ],
)
def test_a_model_of_the_paper_has_its_shape(name: str, shape: tuple[int, int, int, float]) -> None:
    spec = MODELS[name]
    assert (spec.hidden, spec.layers, spec.heads, spec.init_std) == shape


# ---- what each architecture is ----


def test_llama_has_rms_norms_gated_feed_forward_no_biases_and_untied_embeddings() -> None:
    model = on_meta("llama-tiny", 300)
    block = model.model.layers[0]
    assert type(block.input_layernorm).__name__ == "LlamaRMSNorm"
    assert block.input_layernorm.variance_epsilon == 1e-6
    assert tuple(block.mlp.gate_proj.weight.shape) == (256, 96)
    assert not any("bias" in name for name, _ in model.named_parameters())
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_bert_has_both_heads_tied_embeddings_and_room_for_the_second_phase() -> None:
    model = on_meta("bert-tiny", 300)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.seq_relationship.out_features == 2
    assert model.bert.embeddings.position_embeddings.num_embeddings == 128
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_roberta_has_one_head_tied_embeddings_and_numbers_positions_from_the_padding_token_on() -> None:
    model = on_meta("roberta-tiny", 300)
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    assert model.config.pad_token_id == 1
    assert ROBERTA.special_tokens[model.config.pad_token_id] == "<pad>"
    assert model.roberta.embeddings.position_embeddings.num_embeddings == 130
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_dropout_is_the_settings() -> None:
    config = model_config("gpt-tiny", 300, 64, dropout=0.25)
    assert (config.hidden_dropout, config.attention_dropout) == (0.25, 0.25)
    config = model_config("bert-tiny", 300, 64, dropout=0.25)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)


def test_architecture_is_rotary_over_the_head_pre_ln_untied_without_dropout() -> None:
    model = small()
    block: Any = model.gpt_neox.layers[0]  # pyright: ignore
    assert block.attention.rotary_ndims == block.attention.head_size == 32
    assert model.gpt_neox.rotary_emb.inv_freq.numel() == 16  # pyright: ignore
    assert block.use_parallel_residual is False
    assert model.lm_head.weight is not model.gpt_neox.embed_in.weight  # pyright: ignore
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)  # pyright: ignore


def test_a_later_token_never_changes_an_earlier_prediction() -> None:
    tokens = torch.arange(12)[None, :]
    changed = tokens.clone()
    changed[0, 8] = 200
    for attention in ("eager", "sdpa"):
        model = small(attention=attention)
        with torch.no_grad():
            before, after = model(input_ids=tokens).logits, model(input_ids=changed).logits
        assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
        assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-6)


def test_short_sequences_on_a_cpu_take_the_eager_attention() -> None:
    assert [attention_for("cpu", 128), attention_for("cpu", 1024), attention_for("cuda", 128)] == [
        "eager",
        "sdpa",
        "sdpa",
    ]


@pytest.mark.parametrize("name", ["gpt-tiny", "bert-tiny", "roberta-tiny", "llama-tiny"])
def test_biases_and_norm_gains_are_not_decayed_and_no_parameter_is_forgotten(name: str) -> None:
    model = on_meta(name, 300)
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(name.endswith("weight") and "norm" not in name.lower() for name, _ in decayed["params"])
    assert all("bias" in name or "norm" in name.lower() for name, _ in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_the_audit_learns_the_modules_names() -> None:
    model = collage.to_low_precision(small(), torch.bfloat16)
    optimizer = collage.AdamW(parameter_groups(model, 0.1), strategy="plus")
    audit = collage.audit(optimizer, every=1)
    model(input_ids=torch.arange(9)[None, :]).logits.float().logsumexp(-1).mean().backward()
    optimizer.step()
    assert "gpt_neox.layers.0.attention.dense" in audit.report()["modules"]


def test_building_reseeds_no_generator_but_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerators_too(seed: int) -> None:
        raise AssertionError("torch.manual_seed reseeds every device")

    monkeypatch.setattr(torch, "manual_seed", accelerators_too)
    small()

from __future__ import annotations

from typing import Any

import pytest
import torch

import collage
from collage.train.models import MODELS, attention_for, build_model, parameter_groups


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


def test_gpt_125m_is_the_papers_shape() -> None:
    spec = MODELS["gpt-125m"]
    assert (spec.hidden, spec.layers, spec.heads, spec.init_std) == (768, 12, 12, 0.021)


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


def test_biases_and_norm_gains_are_not_decayed_and_no_parameter_is_forgotten() -> None:
    model = small()
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(name.endswith("weight") and p.ndim == 2 for name, p in decayed["params"])
    assert all("bias" in name or "norm" in name for name, _ in others["params"])
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

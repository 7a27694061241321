"""Two checkpoints compared: exact counts, kinds of layers, words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from collage.metrics import moved
from comparing import values


def reading(tensors: dict[str, Tensor]) -> dict[str, object]:
    return {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


def test_elements_are_counted_and_the_way_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "PIECE", 7)
    before = values((6, 5), 0, torch.float32)
    after = before.clone()
    after[0] += 3.0
    found = moved.compare("mlp.weight", before, after)
    assert (found.elements, found.unchanged, found.still, found.ones) == (30, 25, False, False)
    assert found.displacement == pytest.approx(3 * 5**0.5, rel=1e-6)
    assert found.norm == pytest.approx(float(before.norm()), rel=1e-6)


def test_a_change_of_a_low_precision_weight_into_a_wider_one_that_holds_the_same_is_none() -> None:
    before = values((9,), 0)
    assert moved.compare("norm.weight", before, before.float()).still


@pytest.mark.parametrize(
    ("name", "dimensions", "kind"),
    [
        ("model.layers.0.input_layernorm.weight", 1, "norm gains"),
        ("transformer.h.0.ln_1.weight", 1, "norm gains"),
        ("transformer.h.0.ln_1.bias", 1, "biases"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", 2, "attention"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", 2, "mlp"),
        ("model.layers.3.self_attn.q_proj.weight", 2, "attention"),
        ("model.layers.3.mlp.down_proj.weight", 2, "mlp"),
        ("model.layers.3.self_attn.q_proj.bias", 1, "biases"),
        ("transformer.wte.weight", 2, "embeddings"),
        ("model.embed_tokens.weight", 2, "embeddings"),
        ("lm_head.weight", 2, "embeddings"),
        ("conv1.weight", 4, "other weights"),
        ("layers.1.feed_forward.w1.weight", 2, "mlp"),
    ],
)
def test_the_kind_of_a_layer_follows_from_its_name(name: str, dimensions: int, kind: str) -> None:
    assert moved.kind_of(name, dimensions) == kind


def test_the_verdict_names_kinds_that_stand_still_and_gains_at_one() -> None:
    first = {
        "a.norm.weight": torch.ones(8, dtype=torch.bfloat16),
        "b.norm.weight": torch.ones(8, dtype=torch.bfloat16),
        "a.mlp.weight": values((4, 4), 0),
        "gone": torch.ones(2),
        "other.weight": torch.ones(2, 2),
    }
    second = first | {"a.mlp.weight": values((4, 4), 1), "other.weight": torch.ones(3, 2), "new": torch.ones(1)}
    second = {name: tensor.clone() for name, tensor in second.items() if name != "gone"}
    second["b.norm.weight"][:4] = 2
    found = moved.difference(reading(first), reading(second))  # type: ignore[arg-type]
    assert found.verdict() == [
        "norm gains: 75 % of the elements did not move, 1 of 2 tensors not at all (1 of them stand at exactly 1); "
        "updates below half a unit of a 16-bit weight are lost, strategy light would keep them"
    ]
    assert (found.only_first, found.only_second, found.reshaped) == (["gone"], ["new"], ["other.weight"])
    plain = found.to_json()
    assert plain["kinds"]["norm gains"]["unchanged_fraction"] == 0.75
    assert {each["name"] for each in plain["tensors"]} == {"a.norm.weight", "b.norm.weight", "a.mlp.weight"}


def test_what_moved_or_is_the_same_altogether_is_said() -> None:
    tensors = {"mlp.weight": values((4, 4), 0)}
    same = moved.difference(reading(tensors), reading(tensors))  # type: ignore[arg-type]
    assert same.verdict() == ["nothing moved: the two hold the same weights"]
    other = {"mlp.weight": values((4, 4), 1)}
    assert moved.difference(reading(tensors), reading(other)).verdict() == ["every kind of layer moved"]  # type: ignore[arg-type]
    assert moved.difference(reading(tensors), reading({})).verdict() == ["the two have no tensor in common"]  # type: ignore[arg-type]

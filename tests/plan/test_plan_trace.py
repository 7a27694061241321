"""The traced step: what it extrapolates is what it would find, and what it finds is what torch allocates."""

from __future__ import annotations

import pytest
import torch

from collage.plan.models import Shape, Subject, from_shape
from collage.plan.trace import TRACED_BLOCKS, Timeline, trace


def small(layers: int, family: str = "gpt", seq: int = 32) -> Subject:
    kv_heads = 2 if family == "llama" else None
    return from_shape(Shape(64, layers, 4, 96, family, kv_heads=kv_heads, intermediate=128), seq)


def traced(subject: Subject, *, checkpointing: bool = False, whole: bool = False, attention: str = "sdpa") -> Timeline:
    low = torch.bfloat16
    return trace(subject, dtype=low, gradient=low, checkpointing=checkpointing, attention=attention, whole=whole)


def peaks(line: Timeline, subject: Subject, micro_batch: int) -> tuple[float, float, float]:
    """Of the forward, of the backward with its gradients, and what is kept between both."""
    of = subject.with_layers(TRACED_BLOCKS) if line.missing_blocks else subject
    sizes = [2 * shape.numel() for shape in of.shapes]
    alive = line.constant + line.per_sequence * micro_batch
    with_gradients = alive + line.gradients(sizes)
    kept = line.kept[0] + line.kept[1] * micro_batch
    return float(alive[: line.forward].max()), float(with_gradients[line.forward :].max()), kept


@pytest.mark.parametrize(("family", "checkpointing"), [("gpt", False), ("llama", True), ("bert", False)])
def test_three_blocks_tell_what_five_need(family: str, checkpointing: bool) -> None:
    subject = small(5, family)
    short = traced(subject, checkpointing=checkpointing)
    whole = traced(subject, checkpointing=checkpointing, whole=True)
    assert (short.missing_blocks, whole.missing_blocks) == (2, 0)
    assert len(short.constant) < len(whole.constant)
    # Where gradients grow faster than activations go, and where not.
    for micro_batch in (1, 2, 7, 64):
        assert peaks(short, subject, micro_batch) == pytest.approx(peaks(whole, subject, micro_batch), abs=0.5)


def test_all_gradients_have_arrived_in_the_end() -> None:
    subject = small(5)
    line = traced(subject)
    sizes = [2 * shape.numel() for shape in subject.with_layers(TRACED_BLOCKS).shapes]
    # The last event makes the last gradient, which arrives after it.
    last = sizes[line.order[-1]]
    assert line.gradients(sizes)[-1] + last == 2 * subject.count
    assert sorted(line.order) == list(range(len(sizes)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_of_products_are_read_in_either_pass_and_an_embedding_in_none(checkpointing: bool) -> None:
    subject = small(2)
    line = traced(subject, checkpointing=checkpointing)
    embedding, *products = [index for index, shape in enumerate(subject.shapes) if len(shape) == 2]
    for reads in (line.reads[: line.forward], line.reads[line.forward :]):
        assert set(products) <= set(reads.tolist())
    assert embedding not in line.reads
    sizes = [2 * shape.numel() for shape in subject.shapes]
    values = line.values(sizes)
    assert not values[line.reads < 0].any()
    assert set(values[line.reads == products[-1]]) == {2 * 96 * 64}
    # A view computes nothing: most operations read no weight.
    assert (line.reads < 0).mean() > 0.5


def test_eager_attention_keeps_scores_and_the_fused_one_does_not() -> None:
    subject = small(2, seq=64)
    scores = 2 * 4 * 64 * 64  # two blocks, four heads
    fused, eager = traced(subject).kept[1], traced(subject, attention="eager").kept[1]
    assert eager - fused >= 2 * scores  # in bfloat16 at least once
    doubled = small(2, seq=128)
    assert traced(doubled).kept[1] == pytest.approx(2 * fused, rel=0.01), "no term is quadratic in the length"


def test_checkpointing_keeps_the_input_of_each_block() -> None:
    deep, deeper = small(4), small(5)
    a, b = (traced(each, checkpointing=True).kept[1] for each in (deep, deeper))
    assert b - a == 2 * 32 * 64  # a sequence's hidden states in bfloat16
    assert traced(deep).kept[1] > a


def test_blocks_that_differ_are_all_traced() -> None:
    from transformers import Qwen2Config

    kinds = ["full_attention", "sliding_attention"] * 2
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=kinds,
        use_cache=False,
    )
    subject = Subject("mixed blocks", config, 16)
    assert not subject.uniform
    assert traced(subject).missing_blocks == 0


def test_nothing_is_allocated_and_no_global_state_is_left() -> None:
    before = (torch.get_default_dtype(), torch.get_rng_state().sum())
    huge = from_shape(Shape(16384, 126, 128, 128256, "llama", kv_heads=8, intermediate=53248), 4096)
    assert huge.count == 405_853_388_800
    line = traced(huge, checkpointing=True)
    assert line.kept[1] > 1e9
    assert before == (torch.get_default_dtype(), torch.get_rng_state().sum())

from __future__ import annotations

import pytest
import torch

from collage.bench.shapes import SHAPES, ShapeSet, Values, shape_sets
from collage.train.config import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("10m", 10_004_000, 20),
        ("gpt-125m", 2 * 50257 * 768 + 12 * (12 * 768 * 768 + 13 * 768) + 2 * 768, 148),
        ("llama-1b", 60_821_504, 9),
        ("llama-7b", 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 9),
        ("many-small", 2_000_000, 2_000),
        ("llama-1b-whole", 1_235_814_400, 146),
    ],
)
def test_the_shapes_are_those_of_the_named_models(name: str, parameters: int, tensors: int) -> None:
    assert (SHAPES[name].parameters, len(SHAPES[name].shapes)) == (parameters, tensors)


def test_only_many_small_is_also_timed_as_one_tensor() -> None:
    assert [each.name for each in SHAPES.values() if each.joined and each.name != "many"] == ["many-small"]
    one = SHAPES["many-small"].as_one()
    assert (one.name, one.shapes, one.joined) == ("many-small-joined", ((2_000_000,),), False)


def test_an_unknown_set_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UserError, match=r"--shapes must name sets of 10m, gpt-125m.*got 'huge'"):
        shape_sets(["10m", "huge"])


def test_values_are_the_same_in_every_run_and_have_the_stated_spread() -> None:
    shapes = ShapeSet("one", "", ((500, 400),))
    first, again = (Values.of(shapes, torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(first.params[0], again.params[0])
    assert torch.equal(first.grads[0], again.grads[0])
    assert first.params[0].float().std().item() == pytest.approx(0.02, rel=0.02)
    assert first.grads[0].float().std().item() == pytest.approx(0.01, rel=0.02)


def test_contenders_share_no_memory() -> None:
    values = Values.of(ShapeSet("one", "", ((3, 4),)), torch.bfloat16, CPU)
    made = [values.parameters(dtype)[0] for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)]
    tensors = [*made, *(param.grad for param in made if param.grad is not None), *values.params, *values.grads]
    assert len({each.data_ptr() for each in tensors}) == len(tensors) == 8
    assert all(param.grad is not None and param.grad.dtype == param.dtype for param in made)

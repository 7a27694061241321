"""A step's bits depend on the values, the seed, the ordinal and the step alone: not on how the work is cut up."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import collage
from collage.kernels import eager
from comparing import STRATEGIES, assert_same, dtype_of, values


def cut_into(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(eager, "CHUNK", chunk)
    monkeypatch.setattr(eager, "_buffers", eager._Buffers())


def run(
    shapes: list[tuple[int, ...]], strategy: str, steps: int = 3, layout=lambda x: x, grad_layout=lambda x: x, **options
) -> collage.AdamW:
    dtype = dtype_of(strategy)
    params = [nn.Parameter(layout(values(shape, i, dtype))) for i, shape in enumerate(shapes)]
    opt = collage.AdamW(params, lr=1e-3, weight_decay=0.1, strategy=strategy, seed=3, **options)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = grad_layout(values(tuple(param.shape), 100 * step + i + 50, dtype))
        opt.step()
    return opt


SHAPES = [(), (1,), (0,), (3, 0, 2), (63,), (64,), (65,), (7, 11, 13), (1000, 3), (50, 122)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pieces_of_any_length_give_the_same_bits(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(SHAPES, strategy, backend="eager")
    for chunk in (128, 1024):
        cut_into(monkeypatch, chunk)
        assert_same(run(SHAPES, strategy, backend="eager"), whole)


@pytest.mark.parametrize("tile", [(1, 128), (2, 64), 32], ids=str)
@pytest.mark.parametrize("strategy", ["fp8", "fp8-native", "fp8-3", "naive-fp8"])
def test_pieces_of_any_length_give_the_same_bits_in_tiles(
    strategy: str, tile: int | tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stepped() -> collage.AdamW:
        torch.manual_seed(0)
        model = collage.to_fp8_(nn.Linear(384, 40, bias=False), strategy, tile=tile)
        opt = collage.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, strategy=strategy, seed=3, backend="eager")
        for step in range(3):
            model.weight.grad = values((40, 384), step)
            opt.step()
        return opt

    whole = stepped()
    for chunk in (256, 1024):
        cut_into(monkeypatch, chunk)
        assert_same(stepped(), whole)


@pytest.mark.parametrize("strategy", ["plain", "plus-nearest", "kahan"])
def test_pieces_of_any_length_give_the_same_bits_in_working_arithmetic(strategy, monkeypatch) -> None:
    whole = run([(300,)], strategy, arithmetic="working")
    cut_into(monkeypatch, 64)
    assert_same(run([(300,)], strategy, arithmetic="working"), whole)


def test_a_tensor_longer_than_the_default_piece_draws_the_bits_of_its_own_indices(monkeypatch) -> None:
    length = eager.CHUNK + 1000
    whole = run([(length,)], "plus", steps=1, backend="eager")
    cut_into(monkeypatch, 1 << 13)
    assert_same(run([(length,)], "plus", steps=1, backend="eager"), whole)


TRANSPOSED = {"contiguous": lambda x: x, "transposed": lambda x: x.t().contiguous().t()}
CHANNELS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


@pytest.mark.parametrize("strategy", ["plain", "stochastic", "kahan", "plus", "mixed", "fp32"])
@pytest.mark.parametrize(("shape", "layouts"), [((17, 9), TRANSPOSED), ((3, 4, 5, 2), CHANNELS)], ids=["2d", "4d"])
def test_memory_layouts_of_parameters_and_gradients_do_not_matter(strategy: str, shape, layouts) -> None:
    plain = run([shape], strategy)
    for of_param, of_grad in itertools.product(layouts.values(), repeat=2):
        opt = run([shape], strategy, layout=of_param, grad_layout=of_grad)
        assert_same(opt, plain)
        param = opt.param_groups[0]["params"][0]
        assert param.stride() == nn.Parameter(of_param(values(shape, 0, param.dtype))).stride()


@pytest.mark.parametrize("strategy", ["plain", "plus", "mixed"])
def test_a_parameter_that_is_a_window_of_a_buffer_changes_only_its_window(strategy: str) -> None:
    buffer = values((40, 30), 1, torch.bfloat16)
    before = buffer.clone()
    param = nn.Parameter(buffer[5:20, 3:9])
    opt = collage.AdamW([param], lr=1.0, strategy=strategy)
    param.grad = values((15, 6), 2, torch.bfloat16)
    opt.step()
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[5:20, 3:9] = False
    assert torch.equal(buffer[outside], before[outside])
    assert (buffer[5:20, 3:9] != before[5:20, 3:9]).all()


@pytest.mark.parametrize("strategy", ["plain", "plus", "mixed", "kahan"])
def test_groups_and_neighbours_do_not_change_a_parameters_bits(strategy: str) -> None:
    shapes = [(33,), (5, 6), (70,)]
    together = run(shapes, strategy)
    params = [nn.Parameter(values(shape, i, torch.bfloat16)) for i, shape in enumerate(shapes)]
    groups = [{"params": [params[0]]}, {"params": params[1:], "lr": 1e-3}]
    apart = collage.AdamW(groups, lr=5.0, weight_decay=0.1, strategy=strategy, seed=3)
    apart.param_groups[0]["lr"] = 1e-3
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = values(tuple(param.shape), 100 * step + i + 50, torch.bfloat16)
        apart.step()
    assert_same(together, apart)


def test_a_parameter_without_gradients_keeps_the_ordinals_of_those_after_it() -> None:
    whole = run([(8,), (40,)], "plus", steps=1)
    params = [nn.Parameter(values(shape, i, torch.bfloat16)) for i, shape in enumerate([(8,), (40,)])]
    opt = collage.AdamW(params, lr=1e-3, weight_decay=0.1, strategy="plus", seed=3)
    params[1].grad = values((40,), 51, torch.bfloat16)
    opt.step()
    assert torch.equal(params[1], whole.param_groups[0]["params"][1])
    assert not opt.state[params[0]]


@pytest.mark.parametrize("strategy", ["stochastic", "light", "plus"])
def test_seeds_ordinals_and_steps_draw_other_bits(strategy: str) -> None:
    def lows(seed: int, ordinal: int) -> Tensor:
        same = values((4000,), 0, torch.bfloat16)
        params = [nn.Parameter(same.clone()) for _ in range(2)]
        opt = collage.AdamW(params, lr=1e-4, strategy=strategy, seed=seed)
        for param in params:
            param.grad = values((4000,), 1, torch.bfloat16)
        opt.step()
        return opt.full_param(params[ordinal])

    base = lows(0, 0)
    assert torch.equal(base, lows(0, 0))
    for other in (lows(1, 0), lows(0, 1)):
        assert 0.02 < (base != other).float().mean().item() < 0.9


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_default_dtype_does_not_matter(strategy: str, default: torch.dtype) -> None:
    usual = run([(129,), (4, 4)], strategy)
    torch.set_default_dtype(default)
    assert_same(run([(129,), (4, 4)], strategy), usual)


@pytest.mark.parametrize("strategy", ["plain", "plus-nearest", "kahan"])
def test_the_default_dtype_does_not_matter_in_working_arithmetic(strategy: str) -> None:
    usual = run([(129,)], strategy, arithmetic="working")
    torch.set_default_dtype(torch.bfloat16)
    assert_same(run([(129,)], strategy, arithmetic="working"), usual)


@pytest.mark.parametrize("strategy", ["plain", "plus", "mixed", "kahan"])
def test_the_thread_count_and_the_global_generator_do_not_matter(strategy: str) -> None:
    # Longer than the length from which torch works with several threads.
    torch.set_num_threads(1)
    one = run([(40_000,)], strategy, steps=2)
    torch.set_num_threads(2)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_same(run([(40_000,)], strategy, steps=2), one)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_in_inference_mode_leaves_usable_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 1024)
    with torch.inference_mode():
        run([(100,)], "plus", steps=1, backend="eager")
    run([(100,)], "plus", steps=1, backend="eager")


def test_the_sums_of_a_piece_do_not_depend_on_the_thread_count() -> None:
    pieces = [values((eager.CHUNK,), seed, torch.float64) for seed in range(8)]
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.append([eager.total(piece).item() for piece in pieces])
    assert sums[0] == sums[1] == sums[2]

"""The Triton step on a GPU, bit by bit beside the eager one on the same GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from fused_batches import (
    BLOCKED,
    CASES,
    HYPER,
    IN_TILES,
    LOW,
    assert_same,
    copy_of,
    gradients,
    layout_of,
    make_batch,
    normal,
    step_both,
    tile_batch,
    tile_layout,
    wild,
)

import collage
from collage import Tiled, TiledTensor
from collage.kernels import eager, fused
from collage.kernels.contract import Inputs
from collage.numerics import BF16, round_nearest
from collage.storage import matmul
from collage.storage.tensor import read
from comparing import any_bits, bits, snapshot, values
from comparing import assert_same as assert_same_optimizers

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds none here"),
    pytest.mark.skipif(bool(fused.unavailable()), reason=f"the Triton step cannot run: {fused.unavailable()}"),
    # torch says once in a process what its tools do not promise.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle"),
]
SIZES = [1, 7, 0, 1023, 1024, 1025, 4099, 300_000]
# Of parameters in tiles: width, rows and columns of a tile; and numbers of rows of three tensors.
TILES = [(768, 128, 128), (768, 1, 128), (512, 32, 64), (366, 128, 122), (300, 8, 100)]
HEIGHTS = [300, 128, 7]


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("strategy", "dtype"), CASES)
def test_steps_are_the_eager_ones(strategy: str, dtype: torch.dtype) -> None:
    batch = make_batch(layout_of(strategy, dtype), dtype, SIZES, device="cuda")
    other = copy_of(batch)
    for step, kind in enumerate([dtype, torch.float32, dtype]):
        step_both(batch, other, Inputs(HYPER, gradients(batch, kind, step), audit=step > 0))


@pytest.mark.parametrize(("strategy", "dtype"), CASES)
def test_steps_are_the_eager_ones_for_any_bit_patterns(strategy: str, dtype: torch.dtype) -> None:
    firsts, steps = [2**32 - 70_000, 7 * 2**32 - 3], [4.0, 100_000.0]
    batch = make_batch(layout_of(strategy, dtype), dtype, [200_003, 33], wild, firsts, steps, "cuda", seed=-(2**70) + 3)
    other = copy_of(batch)
    for step, (lr, decay, maximize) in enumerate([(10.0, 0.0, True), (1e-3, 0.5, False)]):
        hyper = replace(HYPER, lr=lr, weight_decay=decay, maximize=maximize)
        step_both(batch, other, Inputs(hyper, gradients(batch, torch.float32 if step else dtype, step, wild)))


def test_every_float32_number_is_rounded_to_bfloat16_as_defined() -> None:
    # With beta1 = 0 the new first moment is the gradient.
    size, hyper = 2**26, replace(HYPER, beta1=0.0)
    batch = make_batch(layout_of("plain", torch.bfloat16), torch.bfloat16, [size], device="cuda")
    for first in range(0, 2**32, size):
        patterns = torch.arange(first, first + size, dtype=torch.int64, device="cuda").to(torch.int32)
        grad = patterns.view(torch.float32)
        fused.step(batch, Inputs(hyper, [grad]))
        # The sum of products that it is makes of -0 a 0, and of nothing else another number.
        wanted = round_nearest(grad + 0.0, BF16)
        (state,) = batch.states
        assert torch.equal(bits(state["exp_avg"]), bits(wanted.to(torch.bfloat16))), hex(first)
        state["exp_avg"].zero_()


@pytest.mark.parametrize("block", [122, 100, 96, 32])
@pytest.mark.parametrize(("strategy", "dtype"), BLOCKED)
def test_rows_have_blocks_of_any_even_size(strategy: str, dtype: torch.dtype, block: int) -> None:
    batch = make_batch(layout_of(strategy, dtype, block), dtype, [70_000, 900], wild, device="cuda")
    other = copy_of(batch)
    step_both(batch, other, Inputs(HYPER, gradients(batch, dtype, 0, wild)))
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.float32, 1), audit=True))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("strategy", ["plus", "compact", "compact-4bit", "naive-8bit"])
def test_steps_on_the_gpu_are_those_on_the_cpu(strategy: str, dtype: torch.dtype) -> None:
    batch = make_batch(layout_of(strategy, dtype), dtype, SIZES)
    other = make_batch(batch.layout, dtype, SIZES, device="cuda")
    for step in range(2):
        eager.step(batch, Inputs(HYPER, gradients(batch, dtype, step)))
        fused.step(other, Inputs(HYPER, gradients(other, dtype, step)))
    params = [param.cpu() for param in other.params]
    states = [{name: value.cpu() for name, value in state.items()} for state in other.states]
    assert_same(batch, replace(other, params=params, states=states, steps=other.steps.cpu()))


@pytest.mark.parametrize("strategy", ["plus", "compact-4bit"])
def test_unaligned_tensors_step_as_aligned_ones(strategy: str) -> None:
    batch = make_batch(layout_of(strategy, torch.bfloat16), torch.bfloat16, [5000], device="cuda")
    other = copy_of(batch)
    size = len(batch.params[0])
    other.params = [torch.cat([other.params[0], other.params[0]])[size - 3 : -3].copy_(batch.params[0])]
    assert other.params[0].data_ptr() % 16 != 0
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 0)))


@pytest.mark.parametrize("strategy", ["plain", "plus", "mixed", "compact-4bit"])
def test_a_step_waits_for_nothing(strategy: str, synchronisation_is_an_error: Callable[[], None]) -> None:
    batch = make_batch(layout_of(strategy, torch.bfloat16), torch.bfloat16, SIZES, device="cuda")
    lr, found = torch.tensor(1e-3, device="cuda"), torch.zeros((), device="cuda")
    every = [gradients(batch, torch.bfloat16, step) for step in range(3)]
    fused.step(batch, Inputs(HYPER, every[0], lr=lr, found_inf=found, audit=True))
    synchronisation_is_an_error()
    for grads in every:
        # Other addresses each time.
        fused.step(batch, Inputs(HYPER, grads, lr=lr, found_inf=found))
    fused.step(batch, Inputs(replace(HYPER, beta1=0.8), every[0], lr=lr, audit=True))


def test_a_step_allocates_nothing_while_addresses_stay() -> None:
    batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, SIZES, device="cuda")
    inputs = Inputs(HYPER, gradients(batch, torch.bfloat16, 0))
    fused.step(batch, inputs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        fused.step(batch, inputs)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert batch.kept["triton"].uploads == 1


@pytest.mark.parametrize("strategy", ["stochastic", "plus", "mixed", "compact"])
def test_a_replayed_graph_steps_as_the_steps_would(strategy: str) -> None:
    batch = make_batch(layout_of(strategy, torch.bfloat16), torch.bfloat16, SIZES, device="cuda")
    other = copy_of(batch)
    lr = torch.tensor(1e-2, dtype=torch.float64, device="cuda")
    grads = gradients(batch, torch.bfloat16, 0)
    # One step outside, with other gradients, compiles the same kernels.
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 9), lr=lr))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.step(other, Inputs(HYPER, grads, lr=lr))
    assert_same(batch, other)
    for step in range(4):
        lr.fill_(1e-2 / (step + 1))
        for grad, value in zip(grads, gradients(batch, torch.bfloat16, step), strict=True):
            grad.copy_(value)
        eager.step(batch, Inputs(replace(HYPER, lr=float(lr)), grads))
        graph.replay()
        assert_same(batch, other)
        if step == 1:
            # A step between replays, with addresses of its own.
            step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 77)))


@pytest.mark.parametrize("anything", [False, True])
@pytest.mark.parametrize(("width", "rows", "columns"), TILES)
@pytest.mark.parametrize("strategy", IN_TILES)
def test_parameters_in_tiles_step_as_the_eager_ones(
    strategy: str, width: int, rows: int, columns: int, anything: bool
) -> None:
    layout = tile_layout(strategy, width, rows, columns)
    batch = tile_batch(layout, HEIGHTS, steps=[0.0, 5.0, 1e5], device="cuda", anything=anything)
    other = copy_of(batch)
    fill = wild if anything else normal
    for step, kind in enumerate([torch.bfloat16, torch.float32, torch.bfloat16]):
        hyper = replace(HYPER, maximize=step == 1)
        step_both(batch, other, Inputs(hyper, gradients(batch, kind, step, fill), audit=step > 0))


@pytest.mark.parametrize("strategy", IN_TILES)
def test_tiles_on_the_gpu_are_those_on_the_cpu(strategy: str) -> None:
    layout = tile_layout(strategy, 384, 128, 128)
    batch, other = tile_batch(layout, HEIGHTS), tile_batch(layout, HEIGHTS, device="cuda")
    for step in range(2):
        eager.step(batch, Inputs(HYPER, gradients(batch, torch.bfloat16, step)))
        fused.step(other, Inputs(HYPER, gradients(other, torch.bfloat16, step)))
    params = [param.cpu() for param in other.params]
    states = [{name: value.cpu() for name, value in state.items()} for state in other.states]
    assert_same(batch, replace(other, params=params, states=states, steps=other.steps.cpu()))


@pytest.mark.parametrize("strategy", IN_TILES)
def test_a_step_of_tiles_waits_for_nothing_and_allocates_nothing_while_addresses_stay(
    strategy: str, synchronisation_is_an_error: Callable[[], None]
) -> None:
    batch = tile_batch(tile_layout(strategy, 768, 128, 128), HEIGHTS, device="cuda")
    inputs = Inputs(HYPER, gradients(batch, torch.bfloat16, 0))
    fused.step(batch, inputs)
    others = Inputs(HYPER, gradients(batch, torch.bfloat16, 1))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    synchronisation_is_an_error()
    for _ in range(3):
        fused.step(batch, inputs)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    fused.step(batch, others)


@pytest.mark.parametrize("strategy", IN_TILES)
def test_a_replayed_graph_steps_tiles_as_the_steps_would(strategy: str) -> None:
    batch = tile_batch(tile_layout(strategy, 768, 128, 128), HEIGHTS, device="cuda")
    other = copy_of(batch)
    grads = gradients(batch, torch.bfloat16, 0)
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 9)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.step(other, Inputs(HYPER, grads))
    for step in range(3):
        for grad, value in zip(grads, gradients(batch, torch.bfloat16, step), strict=True):
            grad.copy_(value)
        eager.step(batch, Inputs(HYPER, grads))
        graph.replay()
        assert_same(batch, other)


@pytest.mark.parametrize("forward", ["value", "hi"])
@pytest.mark.parametrize(("width", "rows", "columns"), TILES)
@pytest.mark.parametrize("strategy", IN_TILES)
def test_a_model_reads_tiles_as_defined(strategy: str, width: int, rows: int, columns: int, forward: str) -> None:
    form = tile_layout(strategy, width, rows, columns).param
    assert isinstance(form, Tiled)
    parts = TiledTensor.of(torch.zeros(300, width), form).parts
    for part in parts:
        part.view(torch.uint8).copy_(any_bits(tuple(part.shape), part.numel(), torch.uint8))
    tensor = TiledTensor([part.cuda() for part in parts], form, forward)
    found = fused.read(tensor)
    assert found is not None
    assert torch.equal(bits(found), bits(read(form, tensor.parts, forward)))
    assert torch.equal(bits(tensor.dequantize()).cpu(), bits(read(form, parts, forward)))


@pytest.mark.parametrize(("width", "columns"), [(768, 128), (512, 64), (366, 122)])
def test_activations_are_rounded_as_defined(width: int, columns: int) -> None:
    x = any_bits((300, width), width, torch.bfloat16)
    wanted = matmul.rounded(x, columns)
    found = fused.round_rows(x.cuda(), wanted.form)
    assert found is not None
    for mine, theirs in zip(found, wanted.parts, strict=True):
        assert torch.equal(bits(mine.cpu()), bits(theirs))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [128, (1, 128)], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(256, 512, 384), (5, 640, 128), (1, 128, 256)])
def test_products_of_float8_numbers_are_those_of_their_values(
    rows: int, inputs: int, outputs: int, tile: int | tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    net = collage.to_fp8_(torch.nn.Linear(inputs, outputs, bias=bias), forward="fp8", tile=tile).cuda()
    if not matmul.multiplies_in_float8(net.weight):
        pytest.skip("needs float8 products with scales per 128 x 128: Hopper, CUDA 12.9")
    x = values((rows, inputs), 1).cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = net(x)
    assert "aten::_scaled_mm_v2" in {event.key for event in profile.key_averages()}
    factor = matmul.rounded(x, 128).exact(torch.float64)
    weight = net.weight.detach().dequantize(torch.float64)
    wanted = factor @ weight.t()
    size = factor.abs() @ weight.abs().t()
    if bias:
        wanted += net.bias.double()
        size += net.bias.double().abs()
    # The tensor cores keep some 14 bits of what they add up, a few times per 128 products; then it is rounded.
    assert ((found.double() - wanted).abs() <= size * 2.0**-11 + wanted.abs() * 2.0**-8).all()


@pytest.mark.parametrize("strategy", IN_TILES)
def test_an_optimizer_takes_these_kernels_for_a_model_in_tiles(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for backend in ("eager", None):
        torch.manual_seed(0)
        model = collage.to_fp8_(torch.nn.Linear(256, 192, bias=False), strategy).cuda()
        optimizer = collage.AdamW(model.parameters(), lr=1e-3, strategy=strategy, backend=backend)
        for step in range(3):
            model.weight.grad = values((192, 256), step).cuda()
            optimizer.step()
            # The first step is looked at beside the eager one; after it that must not be called.
            if backend is None:
                monkeypatch.setattr(eager, "_fp32", None)
        found.append([(name, kind, value.cpu()) for name, kind, value in snapshot(optimizer)])
    assert_same_optimizers(*found)


def test_a_null_step_changes_nothing() -> None:
    written = [wild(size, torch.bfloat16, i).cuda() for i, size in enumerate([1, 0, 4096, 100_001])]
    read = [normal(70_001, torch.float32, 9).cuda()]
    before = [tensor.clone() for tensor in written]
    fused.null_step(written, read)
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(written, before, strict=True))

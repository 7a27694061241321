"""Products of activations with weights in tiles, both of float8 numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import collage
from collage.numerics import E4M3FN, round_nearest
from collage.storage import TiledTensor, matmul
from collage.storage.matmul import rounded
from comparing import values


def layer(inputs: int = 256, outputs: int = 128, bias: bool = False, forward: str = "fp8", tile: Any = 128) -> Any:
    torch.manual_seed(0)
    return collage.to_fp8_(nn.Linear(inputs, outputs, bias=bias), forward=forward, tile=tile)


def by_hand(x: Tensor, columns: int) -> Tensor:
    """Rounds blocks of a row to e4m3 after division by the least power of two that brings them to 448."""
    blocks = x.double().view(-1, columns)
    largest = blocks.abs().amax(1, keepdim=True)
    powers = torch.where(largest > 0, 2.0 ** torch.ceil(torch.log2(largest / 448.0)), 1.0)
    return (round_nearest((blocks / powers).float(), E4M3FN).double() * powers).view(x.shape)


# ---- the factors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [32, 100, 128])
def test_activations_have_a_power_of_two_per_row_and_block(columns: int) -> None:
    x = values((7, 4 * columns), 1) * torch.logspace(-20, 20, 7, base=2.0)[:, None].bfloat16()
    x[2, :columns] = 0.0
    factor = rounded(x, columns)
    assert factor.scale.shape == (7, 4)
    assert torch.equal(factor.exact(torch.float64), by_hand(x, columns))
    assert not torch.equal(factor.exact().bfloat16(), x)
    assert torch.equal(factor.dequantize().double(), factor.exact(torch.float64))


def test_a_number_that_is_not_finite_spoils_no_other() -> None:
    x = values((4, 128), 2)
    wanted = rounded(x, 64).dequantize()
    x[1, 3], x[2, 90] = torch.inf, torch.nan
    wanted[1, 3] = wanted[2, 90] = torch.nan
    found = rounded(x, 64).dequantize()
    assert torch.equal(found.isnan(), wanted.isnan())
    same = torch.ones_like(x, dtype=torch.bool)
    same[1, :64] = same[2, 64:] = False
    assert torch.equal(found[same], wanted[same])


# ---- what a layer computes -------------------------------------------------------------------------------------------

SHAPES = [(3, 256), (1, 256), (2, 3, 256), (2, 2, 3, 256), (256,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_multiplies_rounded_activations_with_hi(shape: tuple[int, ...], bias: bool, grad: bool) -> None:
    net, x = layer(bias=bias), values(shape, 3)
    factor = by_hand(x, 128).bfloat16()
    wanted = functional.linear(factor, net.weight.detach().dequantize(), net.bias)
    with torch.set_grad_enabled(grad):
        found = net(x.requires_grad_(grad))
    assert torch.equal(found, wanted)
    # Rounding the activations is what matters here.
    assert not torch.equal(found, layer(bias=bias, forward="hi")(x))


def test_activations_in_any_order_of_memory_are_rounded() -> None:
    x = values((256, 6), 4).t()
    stacked = values((256, 2, 3), 4).permute(1, 2, 0)
    for each in (x, stacked):
        assert not each.is_contiguous()
        wanted = functional.linear(by_hand(each.contiguous(), 128).bfloat16(), layer().weight.detach().dequantize())
        assert torch.equal(layer()(each), wanted)
        assert torch.equal(layer()(each.clone().requires_grad_()), wanted)


def test_the_backward_pass_has_the_activations_as_they_were_and_hi() -> None:
    for shape in SHAPES[:4]:
        nets = [layer(bias=True), layer(bias=True, forward="hi")]
        inputs = [values(shape, 5).requires_grad_() for _ in nets]
        for net, x in zip(nets, inputs, strict=True):
            net(x).backward(values((*shape[:-1], 128), 6))
        assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
        for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)


def test_all_else_reads_hi() -> None:
    net, other = layer(), layer(forward="hi")
    assert torch.equal(net.weight * 1.0, other.weight * 1.0)
    x = values((3, 128), 7)
    assert torch.equal(x @ net.weight, x @ other.weight)
    embeddings = [collage.to_fp8_(nn.Embedding(64, 64, _weight=values((64, 64), 8)), forward=f) for f in ("fp8", "hi")]
    ids = torch.arange(64)
    assert torch.equal(embeddings[0](ids), embeddings[1](ids))


def test_a_compiled_layer_multiplies_the_same() -> None:
    net, x = layer(bias=True), values((4, 256), 9)
    assert torch.equal(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


# ---- the library's products ------------------------------------------------------------------------------------------


def as_the_library_documents(
    a: Tensor, b: Tensor, scale_a: Tensor, of_a: Any, scale_b: Tensor, of_b: Any, *, bias: Any, output_dtype: Any
) -> Tensor:
    """Checks shapes, strides and dtypes as cuBLASLt's and torch's documents ask for them, and computes from what stands
    at the places that they name."""
    (m, k), n = a.shape, b.shape[1]
    blocks = -(-k // 128)
    padded = -(-blocks // 4) * 4
    square = of_b == functional.ScalingType.BlockWise128x128
    assert of_a == functional.ScalingType.BlockWise1x128
    assert square or of_b == of_a
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert m % 4 == k % 128 == n % (128 if square else 16) == 0
    for scale, shape in ((scale_a, (m, blocks)), (scale_b, (padded, n // 128) if square else (n, blocks))):
        assert scale.shape == shape
        # The stride from a column to the next is free where there is one column.
        assert scale.stride(0) == 1
        assert scale.stride(1) == shape[0] or shape[1] == 1
    left = a.double() * scale_a.double().repeat_interleave(128, 1)
    powers = scale_b.double()[:blocks].repeat_interleave(128, 1) if square else scale_b.double().t()
    right = b.double() * powers.repeat_interleave(128, 0)
    found = left @ right
    return (found if bias is None else found + bias.double()).to(output_dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "tile"),
    [(8, 256, 128, 128), (5, 640, 256, 128), (1, 128, 384, 128), (0, 128, 128, 128), (5, 640, 144, (1, 128))],
)
def test_the_library_is_handed_what_it_documents(
    rows: int, inputs: int, outputs: int, tile: Any, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def scaled_mm(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return as_the_library_documents(*args, **kwargs)

    net, x = layer(inputs, outputs, bias, tile=tile), values((rows, inputs), 10)
    net.weight.data.mul_(torch.logspace(-8, 8, outputs, base=2.0)[:, None])
    wanted = by_hand(x, 128) @ net.weight.detach().dequantize().double().t()
    if bias:
        wanted += net.bias.double()
    assert not matmul.multiplies_in_float8(net.weight)
    monkeypatch.setattr(matmul, "_has_float8_products", lambda device: True)
    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)
    assert matmul.multiplies_in_float8(net.weight)
    assert torch.equal(net(x), wanted.bfloat16())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "net",
    [
        lambda: layer(256, 192),
        lambda: layer(192, 128),
        lambda: layer(forward="hi"),
        lambda: layer(tile=64),
        lambda: layer(outputs=136, tile=(1, 128)),
    ],
    ids=["a last tile is less high", "no tiles of 128", "reads hi", "tiles of 64", "not sixteen rows"],
)
def test_other_tiles_and_other_models_are_not_for_the_library(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_has_float8_products", lambda device: True)
    weight = net().weight
    assert isinstance(weight, TiledTensor)
    assert not matmul.multiplies_in_float8(weight)


@pytest.mark.parametrize(
    ("device", "cuda", "capability", "has"),
    [
        ("cuda", "12.9", (9, 0), True),
        ("cuda", "13.0", (9, 0), True),
        ("cuda", "12.8", (9, 0), False),
        ("cuda", "13.0", (8, 9), False),
        ("cuda", "13.0", (10, 0), False),
        ("cuda", None, (9, 4), False),
        ("cpu", "12.9", (9, 0), False),
    ],
)
def test_products_of_float8_numbers_are_hoppers(
    device: str, cuda: str | None, capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert matmul._has_float8_products(torch.device(device)) is has

"""Matrix products of 16-bit models on CPUs without the instructions for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import collage
from collage.storage.matmul import rounded
from collage.train import products
from collage.train.products import NATIVE, WIDENED, multiplying
from comparing import values

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)


def without_instructions(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported)


def test_only_16_bit_models_on_a_cpu_that_lacks_the_instructions_are_multiplied_in_float32(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    without_instructions(monkeypatch, False)
    assert [products.products(CPU, dtype) for dtype in (*HALF, torch.float32)] == [WIDENED, WIDENED, NATIVE]
    assert products.products(torch.device("cuda"), torch.bfloat16) == NATIVE
    without_instructions(monkeypatch, True)
    assert [products.products(CPU, dtype) for dtype in HALF] == [NATIVE, NATIVE]


@pytest.mark.parametrize("dtype", HALF)
def test_products_forward_and_backward_are_those_of_float32_rounded_once(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(40, 24).to(dtype), values((3, 16, 40), 0, dtype).requires_grad_()
    with multiplying(WIDENED):
        out = layer(x)
        scores = out @ out.transpose(-1, -2)
        (out.float().sum() + scores.float().sum()).backward()
    flat, weight = x.detach().float().view(-1, 40), layer.weight.detach().float()
    assert torch.equal(out.view(-1, 24), torch.addmm(layer.bias.detach().float(), flat, weight.t()).to(dtype))
    wide = out.detach().float()
    assert torch.equal(scores, torch.bmm(wide, wide.transpose(-1, -2)).to(dtype))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == dtype
    reference = nn.Linear(40, 24)
    reference.load_state_dict({name: t.float() for name, t in layer.state_dict().items()})
    y = reference(x.detach().float())
    (y.sum() + (y @ y.transpose(-1, -2)).sum()).backward()
    assert reference.weight.grad is not None
    error = (layer.weight.grad.float() - reference.weight.grad).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * reference.weight.grad.abs().max()


def test_a_weight_in_tiles_decides_what_is_multiplied() -> None:
    torch.manual_seed(0)
    x, layers = values((3, 64), 0), {}
    for forward in ("hi", "fp8"):
        layers[forward] = collage.to_fp8_(nn.Linear(64, 64), forward=forward)
    hi = layers["hi"].weight.detach().dequantize().float()
    layers["fp8"].load_state_dict(layers["hi"].state_dict())
    for forward, factor in (("hi", x), ("fp8", rounded(x, 64).dequantize())):
        layer, given = layers[forward], x.clone().requires_grad_()
        with multiplying(WIDENED):
            out = layer(given)
            out.backward(torch.ones_like(out))
        assert torch.equal(out, torch.addmm(layer.bias.float(), factor.float(), hi.t()).bfloat16())
        assert torch.equal(given.grad, (torch.ones(3, 64) @ hi).bfloat16())  # type: ignore[arg-type]


def test_native_products_are_torchs_own() -> None:
    seen = []
    with multiplying(NATIVE):
        seen.append(torch.utils._python_dispatch._get_current_dispatch_mode())
    assert seen == [None]

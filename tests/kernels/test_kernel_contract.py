"""The scalars that every backend must use, the choice of a backend, and the shape of what a step returns."""

from __future__ import annotations

import random
import struct

import pytest
import torch

import collage
from collage import kernels
from collage.kernels import DRAWS, SUMS, Batch, Hyper, Inputs, Layout, Scalars
from collage.kernels.contract import power
from comparing import values

HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def powers(beta: float, exponent: int) -> float:
    value = 1.0
    for _ in range(exponent):
        value *= beta
    return value


def test_powers_are_repeated_multiplications_in_whatever_order_they_are_asked() -> None:
    rng = random.Random(0)
    for _ in range(300):
        beta, exponent = rng.choice([0.9, 0.95, 0.999, 0.0]), rng.randrange(400)
        assert power(beta, exponent) == powers(beta, exponent)


@pytest.mark.parametrize("step", [1, 2, 10, 1000])
def test_scalars_are_float64_rounded_once_to_float32(step: int) -> None:
    exact = Scalars.of(HYPER, step, "working")
    assert exact.step_size == -HYPER.lr / (1.0 - powers(HYPER.beta1, step))
    assert exact.bias_correction2_sqrt == (1.0 - powers(HYPER.beta2, step)) ** 0.5
    assert exact.inverse_bias_correction2_sqrt == 1.0 / exact.bias_correction2_sqrt
    assert (exact.one_minus_beta1, exact.one_minus_beta2) == (1.0 - 0.9, 1.0 - 0.999)
    assert (exact.beta1, exact.beta2, exact.eps, exact.decay) == (0.9, 0.999, 1e-8, 1e-3 * 0.01)
    rounded = Scalars.of(HYPER, step, "fp32")
    for name, value in vars(exact).items():
        assert getattr(rounded, name) == struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_scalars_do_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    Scalars.of.cache_clear()
    scalars = Scalars.of(HYPER, 3, "fp32")
    assert scalars.beta2 == struct.unpack("f", struct.pack("f", 0.999))[0]


def test_each_tensor_has_a_draw_of_its_own_and_parameter_and_second_moment_share_a_word() -> None:
    assert len(set(DRAWS.values())) == len(kernels.ROLES) == len(DRAWS)
    assert DRAWS["param"] // 2 == DRAWS["exp_avg_sq"] // 2


def test_backends_say_what_runs_here_and_why_the_others_cannot() -> None:
    found = collage.backends()
    assert list(found) == ["eager", "native", "triton"]
    assert found["eager"]
    for backend in found.values():
        assert bool(backend) == backend.available == (backend.reason == "")


def test_an_unavailable_backend_is_refused_with_its_reason_and_an_unknown_one_with_the_names() -> None:
    for name, backend in collage.backends().items():
        if backend:
            kernels.check_backend(name)
        else:
            with pytest.raises(ValueError, match=f"'{name}' cannot run here: .*Usable: eager"):
                kernels.check_backend(name)
    with pytest.raises(ValueError, match="one of eager, native, triton, got 'cuda'"):
        kernels.check_backend("cuda")


def batch(count: int) -> tuple[Batch, list[torch.Tensor]]:
    layout = collage.strategies()["plus"].layout(torch.bfloat16)
    params = [values((50,), i) for i in range(count)]
    components = layout.components(torch.bfloat16)
    states = [{name: torch.zeros(50, dtype=each.dtype) for name, each in components.items()} for _ in params]
    made = Batch(layout, "fp32", 0, params, states, torch.zeros(count), list(range(count)), [0] * count)
    return made, [values((50,), 10 + i) for i in range(count)]


def usable() -> list[str]:
    return [name for name, backend in collage.backends().items() if backend and "cpu" in (backend.devices or ("cpu",))]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("backend", usable())
def test_a_step_counts_itself_and_returns_a_row_of_sums_per_parameter_when_audited(backend: str, count: int) -> None:
    made, grads = batch(count)
    assert kernels.step(made, Inputs(HYPER, grads), backend) is None
    sums = kernels.step(made, Inputs(HYPER, grads, audit=True), backend)
    assert sums is not None
    assert (sums.shape, sums.dtype) == ((count, len(SUMS)), torch.float64)
    assert (sums[:, SUMS.index("updates")] == 50).all()
    assert made.steps.tolist() == [2.0] * count


@pytest.mark.parametrize("backend", [None, *usable()])
def test_the_named_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    monkeypatch.setattr(kernels, "check_first_use", lambda *_: None)
    calls: list[str] = []
    for name in kernels._STEPS:
        monkeypatch.setitem(kernels._STEPS, name, lambda batch, inputs, name=name: calls.append(name))
    param = torch.nn.Parameter(values((4,), 0))
    param.grad = values((4,), 1)
    collage.AdamW([param], backend=backend).step()
    assert calls == [backend or ("native" if collage.backends()["native"] else "eager")]


def test_working_arithmetic_and_layouts_without_a_kernel_take_the_eager_step() -> None:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    plus = collage.strategies()["plus-nearest"].layout(bf16)
    assert kernels.choose(plus, "working", bf16, cpu, None) == "eager"
    three = Layout(collage.Expansion(3), collage.Rounded(), collage.Rounded())
    assert kernels.choose(three, "fp32", bf16, cpu, None) == "eager"


@pytest.mark.skipif(not collage.backends()["native"], reason="no native kernels were built")
def test_insisting_on_a_backend_that_has_no_kernel_is_refused() -> None:
    three = collage.Strategy("three", collage.Expansion(3), collage.Rounded(), collage.Rounded())
    param = torch.nn.Parameter(values((4,), 0))
    opt = collage.AdamW([param], strategy=three, backend="native")
    param.grad = values((4,), 1)
    with pytest.raises(ValueError, match=r"backend 'native' has no kernel for .*Expansion.*backend=None or 'eager'"):
        opt.step()

"""The scalars that every backend must use, the choice of a backend, and the shape of what a step returns."""

from __future__ import annotations

import random
import struct

import pytest
import torch

import collage
from collage import kernels
from collage.kernels import DRAWS, SUMS, Batch, Hyper, Scalars
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


def batch(count: int, audit: bool) -> Batch:
    layout = collage.strategies()["plus"].layout(torch.bfloat16)
    params = [values((50,), i) for i in range(count)]
    names = layout.state_names(torch.bfloat16)
    states = [{name: torch.zeros(50, dtype=dtype) for name, dtype in names.items()} for _ in params]
    grads = [values((50,), 10 + i) for i in range(count)]
    return Batch(layout, HYPER, "fp32", 0, params, grads, states, [1] * count, list(range(count)), audit=audit)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_step_returns_a_row_of_sums_per_parameter_when_audited_and_else_nothing(count: int) -> None:
    assert kernels.step(batch(count, audit=False)) is None
    sums = kernels.step(batch(count, audit=True), "eager")
    assert sums is not None
    assert (sums.shape, sums.dtype) == ((count, len(SUMS)), torch.float64)
    assert (sums[:, SUMS.index("updates")] == 50).all()


def test_the_eager_step_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setitem(kernels._STEPS, "eager", lambda each: calls.append(each))
    for backend in (None, "eager"):
        param = torch.nn.Parameter(values((4,), 0))
        param.grad = values((4,), 1)
        collage.AdamW([param], backend=backend).step()
    assert len(calls) == 2
    assert all(torch.equal(call.grads[0], values((4,), 1)) for call in calls)

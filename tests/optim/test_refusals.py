"""What cannot be stepped is refused with what, got, allowed and remedy, before anything has changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from comparing import assert_same, snapshot, values


def params(*dtypes: torch.dtype) -> list[nn.Parameter]:
    return [
        nn.Parameter(values((4, 3), i, dtype)) for i, dtype in enumerate(dtypes or (torch.bfloat16, torch.bfloat16))
    ]


# ---- float16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["plus", "plain", "light", "kahan"])
def test_a_second_moment_in_float16_is_warned_of_unless_eps_makes_up_for_it(strategy: str) -> None:
    with pytest.warns(UserWarning, match=r"holds nothing below 6e-8.*eps = 1e-08.*strategy 'fp16' or 'compact'"):
        collage.AdamW(params(torch.float16), strategy=strategy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collage.AdamW(params(torch.float16), strategy=strategy, eps=2e-5)
        collage.AdamW(params(torch.bfloat16), strategy=strategy)
        for other in ("fp16", "compact", "fp32-states", "mixed"):
            collage.AdamW(params(torch.float16), strategy=other)


def test_what_the_warning_says_happens_and_does_not_in_the_strategies_it_names() -> None:
    def moved(strategy: str, grad: float, **options: Any) -> float:
        param = nn.Parameter(torch.full((64, 64), 0.5, dtype=torch.float16))
        opt = collage.AdamW([param], strategy=strategy, lr=1e-5, weight_decay=0.0, **options)
        before = opt.full_param(param)
        for scale in (1.0, 1.0, 0.0):
            param.grad = torch.full_like(param, grad * scale)
            opt.step()
        return (opt.full_param(param) - before).mean().abs().item()

    # Gradients whose square underflows, then none: v is 0 and m is not.
    assert moved("plus", 2e-5) > 100 * moved("mixed", 2e-5)
    # Gradients whose square overflows, first in the format's own arithmetic: inf - inf.
    assert torch.isnan(torch.tensor(moved("plus-nearest", 3e4, arithmetic="working", eps=1e-6)))
    for strategy in ("fp16", "compact", "compact-4bit"):
        for grad in (2e-5, 3e4):
            assert moved(strategy, grad) == pytest.approx(moved("mixed", grad), rel=0.1), (strategy, grad)


# ---- construction --------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
OPTIONS = [
    ({"lr": -1e-3}, r"lr must be finite and >= 0, got -0\.001"),
    ({"lr": NAN}, "lr must be finite and >= 0, got nan"),
    ({"lr": INF}, "lr must be finite and >= 0, got inf"),
    ({"lr": torch.tensor([1.0, 2.0])}, r"lr as a tensor must have one element, got shape \(2,\)"),
    ({"lr": torch.tensor(NAN)}, "lr must be finite and >= 0, got nan"),
    ({"eps": -1.0}, r"eps must be finite and >= 0, got -1\.0"),
    ({"eps": NAN}, "eps must be finite"),
    ({"weight_decay": -0.1}, r"weight_decay must be finite and >= 0, got -0\.1"),
    ({"weight_decay": NAN}, "weight_decay must be finite"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1\.0"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0\.1"),
    ({"betas": (0.9, NAN)}, r"betas\[1\] must be in \[0, 1\), got nan"),
    ({"betas": (0.9,)}, "betas must be two numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas must be two numbers"),
    ({"strategy": "collage"}, "no strategy is called 'collage'; there are plain, "),
    ({"arithmetic": "bf16"}, "arithmetic must be one of fp32, working, got 'bf16'"),
    ({"arithmetic": "working"}, "not defined for strategy 'plus'; it is for plain, kahan, light-nearest, plus-nearest"),
    ({"arithmetic": "working", "strategy": "stochastic"}, "not defined for strategy 'stochastic'"),
    ({"arithmetic": "working", "strategy": "light"}, "not defined for strategy 'light'"),
    ({"arithmetic": "working", "strategy": "mixed"}, "not defined for strategy 'mixed'"),
    ({"arithmetic": "working", "strategy": "fp32-states"}, "not defined for strategy 'fp32-states'"),
    ({"backend": "cuda"}, "backend must be None or one of eager, native, triton, got 'cuda'"),
    ({"amsgrad": True}, "amsgrad=True is not served"),
    ({"differentiable": True}, "differentiable=True is not served"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_bad_options_are_refused_for_the_optimizer_and_for_a_group(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collage.AdamW(params(), **options)
    if "amsgrad" in options or "differentiable" in options:
        return
    first, second = params()
    opt = collage.AdamW([first])
    first.grad = values((4, 3), 5)
    opt.step()
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [second], **options})
    assert len(opt.param_groups) == 1
    assert_same(opt, before)


@pytest.mark.parametrize(
    ("options", "message"), [row for row in OPTIONS if not {"amsgrad", "differentiable"} & set(row[0])]
)
def test_options_that_go_bad_during_a_run_stop_the_step_before_anything_changes(options, message: str) -> None:
    first, second = params()
    opt = collage.AdamW([{"params": [first]}, {"params": [second]}])
    for param in (first, second):
        param.grad = values((4, 3), 5)
    opt.step()
    before = snapshot(opt)
    opt.param_groups[1].update(options)
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert_same(opt, before)


def test_working_arithmetic_refuses_an_eps_that_its_format_rounds_to_zero() -> None:
    half = params(torch.float16)
    options: dict[str, Any] = {"strategy": "plus-nearest", "arithmetic": "working"}
    with pytest.raises(ValueError, match=r"eps must be 0 or > 3\.0e-08 .* torch.float16, got 1e-08, .*a larger eps"):
        collage.AdamW(half, **options)
    opt = collage.AdamW([*half, *params()], eps=6e-8, **options)
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert all(torch.isfinite(param).all() for param in opt.param_groups[0]["params"])
    before = snapshot(opt)
    opt.param_groups[0]["eps"] = 2.0**-25
    with pytest.raises(ValueError, match="eps must be 0 or"):
        opt.step()
    assert_same(opt, before)
    # bfloat16 holds it, and in float32 arithmetic nothing is rounded away.
    collage.AdamW(params(), **options)
    collage.AdamW(half, strategy="plus-nearest")


PARAMETERS = [
    (
        torch.zeros(3, dtype=torch.float64),
        ValueError,
        "cannot serve parameters of torch.float64; allowed: torch.bfloat16",
    ),
    (torch.zeros(3, dtype=torch.complex64), TypeError, "is torch.complex64; allowed: floating-point parameters"),
    (torch.zeros(3, dtype=torch.int32), TypeError, "is torch.int32; allowed: floating-point"),
    (torch.zeros(3).to(torch.float8_e4m3fn), ValueError, "cannot serve parameters of torch.float8_e4m3fn"),
]


@pytest.mark.parametrize("strategy", ["plain", "plus", "mixed", "fp32"])
@pytest.mark.parametrize(("tensor", "error", "message"), PARAMETERS, ids=[str(row[0].dtype) for row in PARAMETERS])
def test_parameters_that_no_strategy_serves_are_refused(strategy: str, tensor: Tensor, error, message: str) -> None:
    param = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(error, match=message):
        collage.AdamW([param], strategy=strategy)
    with pytest.raises(error, match="parameter 'head.bias'" if error is TypeError else message):
        collage.AdamW([("head.bias", param)], strategy=strategy)


def test_what_torch_refuses_stays_refused() -> None:
    first, second = params()
    for bad, error in (
        ([], ValueError),
        (first, TypeError),
        ([first.detach().clone().requires_grad_() * 2], ValueError),
    ):
        with pytest.raises(error):
            collage.AdamW(bad)  # type: ignore[arg-type]
    opt = collage.AdamW([first, second])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [first]})


# ---- gradients -----------------------------------------------------------------------------------------------------


class Forged(nn.Parameter):
    """A parameter whose gradient torch has not checked."""

    grad = None  # type: ignore[assignment]


def forged(value: Tensor, grad: Tensor) -> nn.Parameter:
    param = Forged(value)
    param.grad = grad
    return param


GRADIENTS = {
    "sparse": (lambda: torch.eye(4, 3).to_sparse().to(torch.bfloat16), ValueError, "torch.sparse_coo; allowed: dense"),
    "shape": (lambda: values((3, 4), 1), ValueError, r"has shape \(4, 3\) on cpu, its gradient \(3, 4\)"),
    "float16": (
        lambda: values((4, 3), 1, torch.float16),
        TypeError,
        "with a gradient of torch.float16; allowed: its own",
    ),
    "float64": (lambda: values((4, 3), 1, torch.float64), TypeError, "with a gradient of torch.float64"),
    "complex": (lambda: values((4, 3), 1).float().to(torch.complex64), TypeError, "gradient of torch.complex64"),
    "meta": (
        lambda: torch.zeros(4, 3, dtype=torch.bfloat16, device="meta"),
        ValueError,
        "on cpu, its gradient .* on meta",
    ),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("make", "error", "message"), GRADIENTS.values(), ids=GRADIENTS)
def test_a_gradient_that_cannot_be_used_stops_the_step_before_any_parameter_changes(
    make, error, message, named
) -> None:
    good, bad = params()[0], forged(values((4, 3), 7), values((4, 3), 8))
    opt = collage.AdamW([("good", good), ("bad", bad)] if named else [good, bad])
    good.grad = values((4, 3), 5)
    opt.step()
    before = snapshot(opt)
    bad.grad = make()
    with pytest.raises(error, match=("parameter 'bad'.*" if named else "a parameter.*") + message):
        opt.step()
    assert_same(opt, before)


def test_a_refused_first_step_leaves_no_state() -> None:
    good, bad = params()[0], forged(values((4, 3), 7), values((3, 4), 8))
    opt = collage.AdamW([good, bad])
    good.grad = values((4, 3), 5)
    with pytest.raises(ValueError, match="they must agree"):
        opt.step()
    assert not opt.state


def test_sparse_gradients_of_an_embedding_are_refused_with_the_remedy() -> None:
    embedding = nn.Embedding(5, 4, sparse=True, dtype=torch.bfloat16)
    opt = collage.AdamW(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"parameter 'weight' .*sparse=False, or step it with torch.optim.SparseAdam"):
        opt.step()

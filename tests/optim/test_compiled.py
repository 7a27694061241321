"""A compiled training step keeps every bit: a compiler sees the step as one opaque operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from collage.optim import operator
from comparing import STRATEGIES, WORKING, assert_same, dtype_of, values

# TorchInductor's own imports warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
SIZES = (100, 33, 7)
MODES: dict[str, Callable[[collage.AdamW], Callable[[], Any]]] = {
    "graph breaks allowed": lambda opt: torch.compile(lambda: opt.step()),
    "fullgraph": lambda opt: torch.compile(lambda: opt.step(), fullgraph=True),
    "the step itself": lambda opt: torch.compile(opt.step, fullgraph=True),
}


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


def trained(strategy: str, wrap: Callable[[collage.AdamW], Callable[[], Any]], **options: Any) -> collage.AdamW:
    params = [nn.Parameter(values((size,), i, dtype_of(strategy))) for i, size in enumerate(SIZES)]
    opt = collage.AdamW(params, lr=1e-3, strategy=strategy, seed=1, **options)
    step = wrap(opt)
    for count in range(3):
        opt.param_groups[0]["lr"] = 1e-3 / (count + 1)
        for i, param in enumerate(params):
            param.grad = values(tuple(param.shape), 10 * count + i + 5, param.dtype)
        step()
    return opt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_survives_torch_compile(strategy: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    standing = operator._standing_on
    monkeypatch.setattr(operator, "_standing_on", lambda own, given: calls.append(len(own)) or standing(own, given))
    assert_same(trained(strategy, MODES[mode]), trained(strategy, lambda opt: opt.step))
    assert calls == [3, 3, 3], "the operator did not run"


@pytest.mark.parametrize("strategy", WORKING)
def test_working_arithmetic_survives_torch_compile(strategy: str) -> None:
    options = {"arithmetic": "working"}
    assert_same(trained(strategy, MODES["fullgraph"], **options), trained(strategy, lambda opt: opt.step, **options))


def test_a_low_part_that_the_compiler_could_delete_is_there() -> None:
    opt = trained("plus", MODES["fullgraph"])
    for param in opt.param_groups[0]["params"]:
        assert opt.state[param]["param_lo"].any()
        assert opt.state[param]["exp_avg_sq_lo"].any()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's own look
def test_a_compiled_forward_backward_and_step_train_as_without_compiler() -> None:
    def run(compiled: bool) -> tuple[collage.AdamW, list[float]]:
        torch.manual_seed(0)
        model = nn.Linear(8, 1, bias=False, dtype=torch.bfloat16)
        opt = collage.AdamW(model.parameters(), lr=1e-3, strategy="plus")
        x = values((1, 8), 1, spread=1.0)

        def train() -> torch.Tensor:
            loss = model(x).sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        step = torch.compile(train, backend="aot_eager") if compiled else train
        return opt, [step().item() for _ in range(4)]

    (mine, losses), (plain, wanted) = run(True), run(False)
    assert losses == wanted
    assert_same(mine, plain)


def test_a_closure_and_an_audit_work_within_a_graph() -> None:
    def losses(wrap: Callable[[collage.AdamW], Callable[[], Any]]) -> tuple[Any, Any]:
        param = nn.Parameter(values((50,), 0))
        opt = collage.AdamW([param], strategy="plus")
        audit = collage.audit(opt, every=2)
        step = wrap(opt)
        for seed in range(4):
            param.grad = values((50,), seed + 1)
            step()
        return audit.report(), audit.steps

    assert losses(MODES["fullgraph"]) == losses(lambda opt: opt.step)
    assert losses(MODES["fullgraph"])[1] == [2, 4]


def test_new_learning_rates_compile_once_more_and_not_again() -> None:
    torch._dynamo.utils.counters.clear()
    opt = trained("plus", MODES["fullgraph"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    del opt


def test_parameters_that_a_graph_still_needs_are_stepped_on_its_copies() -> None:
    params = [nn.Parameter(values((20,), i)) for i in range(2)]
    opts = [collage.AdamW([param], strategy="plus") for param in (params[0], nn.Parameter(params[0].detach().clone()))]
    grad = values((20,), 5)
    copy, address = params[0].detach().clone(), params[0].data_ptr()
    before = params[0].detach().clone()
    torch.ops.collage.step_([copy], [grad], [0], opts[0].number)
    assert torch.equal(params[0], before)
    assert params[0].data_ptr() == address
    other = opts[1].param_groups[0]["params"][0]
    other.grad = grad
    opts[1].step()
    assert torch.equal(copy, other)
    params[0].data.copy_(copy)
    assert_same(opts[0], opts[1])


def test_the_operator_passes_torchs_own_checks() -> None:
    param = nn.Parameter(values((20,), 0), requires_grad=False)
    opt = collage.AdamW([param], strategy="plus-nearest")
    torch.library.opcheck(
        torch.ops.collage.step_.default,
        ([param.detach()], [values((20,), 1)], [0], opt.number),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_is_read_of_tiles_survives_torch_compile() -> None:
    kinds = [("fp8", "value"), ("fp8-native", "value"), ("fp8-3", "value"), ("fp8", "hi"), ("fp8", "fp8")]
    weights = [
        collage.to_fp8_(nn.Linear(64, 64, bias=False), strategy, forward=forward).weight.detach()
        for strategy, forward in kinds
    ]

    def read(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [each for w in weights for each in (w.dequantize(), nn.functional.linear(x, w))]  # type: ignore[attr-defined]

    x = values((5, 64), 1)
    for found, wanted in zip(torch.compile(read, fullgraph=True)(x, *weights), read(x, *weights), strict=True):
        assert torch.equal(found, wanted)

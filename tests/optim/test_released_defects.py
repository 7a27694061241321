"""The defects of the method's released code (docs/arithmetic.md), each with a test that it is not here.

Its mixed-precision baseline (unfused) concerns benchmarks, not the step; a test of the step cannot hold it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import collage
from collage import kernels
from collage.numerics import BF16, fast_two_sum, from_wide, grow, mul
from collage.storage import Expansion
from comparing import WORKING, assert_same, values


def stepped(count: int, **options: Any) -> collage.AdamW:
    opt = collage.AdamW([nn.Parameter(values((400,), 0))], **options)
    for seed in range(1, count + 1):
        opt.param_groups[0]["params"][0].grad = values((400,), seed)
        opt.step()
    return opt


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99])
def test_the_product_reads_the_old_leading_component(beta2: float) -> None:
    # Overwriting hi before the error term is formed halves the steady v, or leaves a third of it.
    parts = list(from_wide(values((200,), 3, torch.float64).square(), BF16))
    hi, lo = (part.clone() for part in parts)
    addend = values((200,), 4).square()
    Expansion(2).working_average(parts, beta2, addend)
    factor = from_wide(beta2, BF16)
    wanted = grow(mul((hi, lo), factor), addend)
    assert all(torch.equal(part, component) for part, component in zip(parts, wanted, strict=True))
    exact = beta2 * (hi.double() + lo.double()) + addend.double()
    assert ((parts[0].double() + parts[1].double()) / exact - 1).abs().max() < 2**-13


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("strategy", "arithmetic"), [("plus", "fp32"), ("plus-nearest", "working")])
def test_v_decays_at_beta2_999_under_any_default_dtype(strategy: str, arithmetic: str, default: torch.dtype) -> None:
    # Taking the low part of beta2 against a default dtype of float32 made it 0, and beta2 one.
    torch.set_default_dtype(default)
    param = nn.Parameter(values((100,), 0))
    opt = collage.AdamW([param], strategy=strategy, arithmetic=arithmetic)
    param.grad = torch.ones_like(param)
    opt.step()
    first = opt.state[param]["exp_avg_sq"].double() + opt.state[param]["exp_avg_sq_lo"].double()
    param.grad = torch.zeros_like(param)
    for _ in range(100):
        opt.step()
    last = opt.state[param]["exp_avg_sq"].double() + opt.state[param]["exp_avg_sq_lo"].double()
    torch.testing.assert_close(last / first, torch.full_like(first, 0.999**100), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("name", "low_part"), [("plain", False), ("light", True), ("fp32-states", False)])
def test_names_of_strategies_and_arithmetics_are_compared_by_value(name: str, low_part: bool) -> None:
    # `is not 'none'` compared identity: a name read from a command line is another object than the literal.
    read = "".join(list(name))
    assert read is not name
    opt = stepped(1, strategy=read)
    assert ("param_lo" in opt.state[opt.param_groups[0]["params"][0]]) == low_part
    words = ["".join(list(word)) for word in ("plus-nearest", "working")]
    working, fp32 = (stepped(1, strategy=words[0], arithmetic=word) for word in (words[1], "".join(list("fp32"))))
    first, second = (each.state[each.param_groups[0]["params"][0]]["exp_avg_sq_lo"] for each in (working, fp32))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("arithmetic", ["fp32", "working"])
@pytest.mark.parametrize("strategy", WORKING)
def test_the_metric_observes_the_one_step_there_is(strategy: str, arithmetic: str, monkeypatch) -> None:
    calls = []
    for name, step in list(kernels._STEPS.items()):

        def spy(batch, inputs, step=step):
            calls.append(inputs.audit)
            return step(batch, inputs)

        monkeypatch.setitem(kernels._STEPS, name, spy)
    opt = collage.AdamW([nn.Parameter(values((400,), 0))], strategy=strategy, arithmetic=arithmetic)
    collage.audit(opt, every=2)
    for seed in (1, 2, 3):
        opt.param_groups[0]["params"][0].grad = values((400,), seed)
        opt.step()
    assert calls[-3:] == [False, True, False]  # before them the check of the first use
    monkeypatch.undo()
    assert_same(opt, stepped(3, strategy=strategy, arithmetic=arithmetic))


def test_a_compiler_never_sees_the_step_and_cannot_keep_its_low_precision_intermediates_wide() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    opt = stepped(1)
    param = opt.param_groups[0]["params"][0]

    def step(x: torch.Tensor) -> torch.Tensor:
        opt.step()
        return x * 3

    param.grad = values((400,), 2)
    assert torch.compile(step, backend=backend)(torch.ones(2)).tolist() == [3.0, 3.0]
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
    seen = [name for name in called if "set_grad_enabled" not in name]
    assert seen == ["collage.step_", "<built-in function mul>"]
    assert_same(opt, stepped(2))
    assert opt.state[param]["param_lo"].any()


def test_two_sum_in_eager_execution_leaves_the_residuals_that_a_fusing_compiler_deletes() -> None:
    a, b = values((4096,), 1, spread=1.0), values((4096,), 2, spread=0.01)
    order = a.abs() >= b.abs()
    s, e = fast_two_sum(torch.where(order, a, b), torch.where(order, b, a))
    assert torch.equal(s.double() + e.double(), a.double() + b.double())
    assert (e != 0).float().mean() > 0.9


@pytest.mark.parametrize("strategy", ["mixed", "fp32-states", "plus"])
def test_loading_casts_no_state_to_the_parameters_dtype(strategy: str) -> None:
    opt = stepped(2, strategy=strategy)
    saved = opt.state_dict()
    for name, tensor in saved["state"][0].items():
        # Numbers that bfloat16 cannot hold.
        if tensor.dtype == torch.float32:
            tensor.fill_(257 if name == "step" else 1 / 3)
        if tensor.dtype == torch.int64:
            tensor.fill_(12345)
    opt.load_state_dict(saved)
    loaded = opt.state[opt.param_groups[0]["params"][0]]
    assert loaded.keys() == saved["state"][0].keys()
    for name, tensor in saved["state"][0].items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)

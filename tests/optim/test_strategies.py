"""The table of strategies: bytes, state names and dtypes, records."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import collage
from collage.optim import resolve
from comparing import CASES, STRATEGIES, assert_same, dtype_of, parameter, values

# The design's table: bytes per parameter with a gradient of the parameter's dtype.
BYTES = {
    "plain": 8,
    "stochastic": 8,
    "kahan": 10,
    "light": 10,
    "plus": 12,
    "light-nearest": 10,
    "plus-nearest": 12,
    "fp32-states": 12,
    "mixed": 16,
    "fp32": 16,
    "exact": 12,
    "exact-fp32-states": 14,
    "compact": 7.0625,
    "compact-4bit": 6.5625,
    "fp16": 12,
    "naive-8bit": 6.0625,
    "fp8": 4.0625 + 2**-14 + 2,
    "fp8-native": 4 + 2**-6 + 2**-14 + 2,
    "fp8-3": 8 + 2**-6 + 2**-14 + 2,
    "naive-fp8": 3 + 2**-6 + 2**-14 + 2,
}
HALF, WIDE = "half", torch.float32
MOMENTS = {"exp_avg": HALF, "exp_avg_sq": HALF}
LO = {"param_lo": HALF}
CODES = {"exp_avg": torch.int8, "exp_avg_scale": WIDE, "exp_avg_sq": torch.uint8, "exp_avg_sq_scale": WIDE}
# What each keeps beside `step`, in order; "half" is the parameter's own dtype. Stochastic ones also keep `ordinal`.
STATE = {
    "plain": MOMENTS,
    "stochastic": MOMENTS,
    "kahan": {**LO, **MOMENTS},
    "light": {**LO, **MOMENTS},
    "plus": {**LO, **MOMENTS, "exp_avg_sq_lo": HALF},
    "light-nearest": {**LO, **MOMENTS},
    "plus-nearest": {**LO, **MOMENTS, "exp_avg_sq_lo": HALF},
    "fp32-states": {"exp_avg": WIDE, "exp_avg_sq": WIDE},
    "mixed": {"master_param": WIDE, "exp_avg": WIDE, "exp_avg_sq": WIDE},
    "exact": {"param_remainder": torch.int16, **MOMENTS, "exp_avg_sq_lo": HALF},
    "exact-fp32-states": {"param_remainder": torch.int16, "exp_avg": WIDE, "exp_avg_sq": WIDE},
    "compact": {"param_remainder": torch.int8, **CODES},
    "compact-4bit": {"param_remainder": torch.uint8, **CODES},
    "fp16": {**LO, **dict.fromkeys(("exp_avg", "exp_avg_sq", "exp_avg_sq_lo"), torch.bfloat16)},
    "naive-8bit": CODES,
    # Parameters that are not in tiles; tests/optim/test_fp8.py has those that are.
    "fp8": {**LO, "exp_avg": WIDE, "exp_avg_sq": WIDE},
    "fp8-native": {**LO, "exp_avg": WIDE, "exp_avg_sq": WIDE},
    "fp8-3": {"master_param": WIDE, "exp_avg": WIDE, "exp_avg_sq": WIDE},
    "naive-fp8": {"exp_avg": WIDE, "exp_avg_sq": WIDE},
}
# Those that serve several elements with one entry.
SHARED = {"exp_avg_scale": (64, 1), "exp_avg_sq_scale": (64, 1), "compact-4bit param_remainder": (64, 64)}
STOCHASTIC = {"stochastic", "light", "plus", "exact", "compact", "compact-4bit", "fp16", "fp8", "fp8-native"}
SHAPE = (64, 128)
# Tiles are 128 rows high.
SHAPES = dict.fromkeys(("fp8", "fp8-native", "fp8-3", "naive-fp8"), (128, 128))


def stepped(name: str, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> tuple[nn.Parameter, collage.AdamW]:
    param = nn.Parameter(values(shape, 0, dtype))
    opt = collage.AdamW([param], strategy=name)
    param.grad = values(shape, 1, dtype)
    opt.step()
    return param, opt


def test_the_table_holds_the_strategies_of_the_design_in_order() -> None:
    assert list(collage.strategies()) == list(BYTES)
    for name, strategy in collage.strategies().items():
        assert strategy.name == name
        assert strategy.summary


@pytest.mark.parametrize("name", BYTES)
def test_bytes_per_param_is_the_designs_and_that_of_the_real_tensors(name: str) -> None:
    dtype = dtype_of(name)
    param = parameter(values(SHAPES.get(name, SHAPE), 0, dtype), name)
    opt = collage.AdamW([param], strategy=name)
    param.grad = values(tuple(param.shape), 1, dtype)
    opt.step()
    parts = getattr(param, "parts", [param])
    tensors = [*parts, param.grad, *(t for key, t in opt.state[param].items() if key not in ("step", "ordinal"))]
    counted = sum(t.numel() * t.element_size() for t in tensors) / param.numel()
    strategy = collage.strategies()[name]
    assert strategy.bytes_per_param(dtype) == BYTES[name] == counted
    assert strategy.bytes_per_param(dtype, grad=False) == counted - param.grad.element_size()


@pytest.mark.parametrize("name", BYTES)
def test_a_float32_parameter_steps_and_counts_as_plain_float32_whatever_the_strategy(name: str) -> None:
    param, opt = stepped(name, torch.float32)
    assert {key: t.dtype for key, t in opt.state[param].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), torch.float32
    )
    assert collage.strategies()[name].bytes_per_param(torch.float32) == 16
    _, reference = stepped("fp32", torch.float32)
    assert_same(opt, reference)


@pytest.mark.parametrize("name", ["plain", "plus-nearest"])
def test_a_float32_parameter_steps_as_plain_float32_in_a_working_group_too(name: str) -> None:
    param = nn.Parameter(values((100,), 0, torch.float32))
    opt = collage.AdamW([param], strategy=name, arithmetic="working")
    param.grad = values((100,), 1, torch.float32)
    opt.step()
    twin = nn.Parameter(values((100,), 0, torch.float32))
    reference = collage.AdamW([twin], strategy="fp32")
    twin.grad = values((100,), 1, torch.float32)
    reference.step()
    assert_same(opt, reference)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[f"{n}-{d}".replace("torch.", "") for n, d in CASES])
def test_the_state_has_exactly_these_names_and_dtypes(name: str, dtype: torch.dtype) -> None:
    param, opt = stepped(name, dtype)
    counters = {"step": torch.float32} | ({"ordinal": torch.int64} if name in STOCHASTIC else {})
    wanted = {key: dtype if kind == HALF else kind for key, kind in STATE[name].items()}
    state = opt.state[param]
    assert {key: t.dtype for key, t in state.items()} == counters | wanted
    for key, tensor in state.items():
        assert isinstance(tensor, torch.Tensor)
        shared = SHARED.get(key) or SHARED.get(f"{name} {key}")
        assert tensor.shape == (() if key in counters else shared or param.shape)
    # Everything a strategy keeps stands in optimizer.state.
    assert set(opt.state_dict()["state"][0]) == set(state)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_record_serves_wherever_a_name_does(name: str) -> None:
    dtype = dtype_of(name)
    _, by_name = stepped(name, dtype)
    strategy = collage.strategies()[name]
    for given in (strategy, resolve(strategy.to_dict())):
        param = nn.Parameter(values(SHAPE, 0, dtype))
        opt = collage.AdamW([param], strategy=given)
        param.grad = values(SHAPE, 1, dtype)
        opt.step()
        assert_same(opt, by_name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_plain_form_of_a_record_has_json_types_and_an_inverse(name: str) -> None:
    strategy = collage.strategies()[name]

    def is_plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
        return value is None or type(value) in (str, int, float, bool)

    assert is_plain(strategy.to_dict())
    assert resolve(strategy.to_dict()) == strategy


def test_a_strategy_of_ones_own_steps_and_counts() -> None:
    mine = collage.Strategy(
        "three", collage.Expansion(3), collage.Rounded("fp32"), collage.Rounded(rounding="stochastic")
    )
    assert mine.bytes_per_param() == 2 + 6 + 4 + 2
    param, opt = stepped(mine, torch.bfloat16)  # type: ignore[arg-type]
    assert set(opt.state[param]) == {"step", "ordinal", "param_lo", "param_lo2", "exp_avg", "exp_avg_sq"}
    assert resolve(mine.to_dict()) == mine


def test_a_summary_is_words_and_no_part_of_what_a_strategy_is() -> None:
    plus = collage.strategies()["plus"]
    assert collage.Strategy("plus", plus.param, plus.exp_avg, plus.exp_avg_sq, "other words") == plus


@pytest.mark.parametrize("name", ["none", "Plus", "", "bf16"])
def test_an_unknown_name_is_an_error_that_lists_the_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"there are plain, stochastic, kahan, light, plus, .*mixed, fp32"):
        collage.AdamW([nn.Parameter(values((2,), 0))], strategy=name)


def test_something_that_is_no_strategy_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"a name or a collage.Strategy, got int"):
        collage.AdamW([nn.Parameter(values((2,), 0))], strategy=3)  # type: ignore[arg-type]


def test_the_strategy_fp32_refuses_low_precision_parameters() -> None:
    with pytest.raises(ValueError, match=r"keeps parameters in torch.float32, got a parameter of torch.bfloat16"):
        collage.AdamW([nn.Parameter(values((2,), 0))], strategy="fp32")


def test_the_strategies_with_working_arithmetic_are_those_without_random_bits_or_wider_states() -> None:
    able = [name for name, strategy in collage.strategies().items() if strategy.has_working_arithmetic]
    assert able == ["plain", "kahan", "light-nearest", "plus-nearest"]

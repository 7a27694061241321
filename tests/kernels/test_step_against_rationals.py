"""Both arithmetics, every strategy, element by element against exact rationals (tests/step_oracle.py)."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import collage
from collage.numerics import format_of, random_bits
from comparing import dtype_of
from step_oracle import CASES as SERVED_CASES
from step_oracle import STRATEGIES, Element, Hyper
from step_oracle import nearest as round_to

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORKING = ("plain", "kahan", "light-nearest", "plus-nearest")
CASES = [*SERVED_CASES, ("plus", "fp32"), ("mixed", "fp32")]
STEPS = 6
# Names of the state tensors that the oracle's fields are compared with.
PAIR = {"exp_avg": "m", "exp_avg_sq": "v", "exp_avg_sq_lo": "v_lo", "param_lo": "extra", "master_param": "extra"}
PAIR |= {"param_remainder": "remainder"}
HYPERS = {
    "defaults": Hyper(),
    "no-decay": Hyper(lr=3e-4, beta2=0.95, weight_decay=0.0),
    "tiny-steps": Hyper(lr=1e-6, beta1=0.8, beta2=0.98, weight_decay=0.1),
    "no-momentum": Hyper(lr=1e-2, beta1=0.0, beta2=0.0, eps=1e-6, weight_decay=0.0),
}


def magnitudes(rng: random.Random, low: float, high: float, fmt: str) -> float:
    return round_to(rng.choice([-1.0, 1.0]) * 10 ** rng.uniform(low, high), fmt)


def start_values(rng: random.Random, fmt: str, count: int) -> list[float]:
    """Many magnitudes, and numbers on whose ties and binade edges roundings go wrong."""
    special = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1.0 + 2.0**-7, 255 / 256, 2.0**-14, 2.0**-20]
    special = [round_to(value, fmt) for value in special]
    return special + [magnitudes(rng, -5, 2, fmt) for _ in range(count - len(special))]


def gradients(rng: random.Random, fmt: str, count: int) -> list[float]:
    low = -4 if fmt == "fp16" else -9
    return [0.0 if rng.random() < 0.1 else magnitudes(rng, low, 1, fmt) for _ in range(count)]


def optimizer(start: list[float], fmt: str, hyper: Hyper, **options) -> tuple[nn.Parameter, collage.AdamW]:
    param = nn.Parameter(torch.tensor(start, dtype=torch.float64).to(DTYPES[fmt]))
    betas = (hyper.beta1, hyper.beta2)
    return param, collage.AdamW(
        [param], lr=hyper.lr, betas=betas, eps=hyper.eps, weight_decay=hyper.weight_decay, **options
    )


def assert_same(found: Tensor, wanted: list[float], what: str, signed_zeros: bool) -> None:
    """Bit for bit; the sign of a zero residual is nobody's business."""
    expected = torch.tensor(wanted, dtype=torch.float64)
    found = found.detach().to(torch.float64)
    same = (found == expected) | (found.isnan() & expected.isnan())
    if signed_zeros:
        same &= (found.signbit() == expected.signbit()) | found.isnan()
    wrong = (~same).nonzero().flatten().tolist()
    first = [(i, found[i].item(), wanted[i]) for i in wrong[:3]]
    assert not wrong, f"{what}: {len(wrong)} of {len(wanted)} differ, (index, found, exact): {first}"


def compare(param: nn.Parameter, state: dict[str, Tensor], elements: list[Element], step: int) -> None:
    assert_same(param, [e.param for e in elements], f"param at step {step}", signed_zeros=True)
    for name, field in PAIR.items():
        if name in state:
            wanted = [getattr(e, field) for e in elements]
            assert_same(state[name], wanted, f"{name} at step {step}", signed_zeros=name in ("exp_avg", "exp_avg_sq"))
    assert state["step"].item() == step


@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize(("name", "fmt"), CASES, ids=[f"{name}-{fmt}" for name, fmt in CASES])
def test_fp32_arithmetic_is_the_rule_in_float32_between_a_load_and_a_store(name: str, fmt: str, hyper: Hyper) -> None:
    rng = random.Random(f"{name} {fmt} {hyper}")
    start = start_values(rng, fmt, 48)
    param, opt = optimizer(start, fmt, hyper, strategy=name, seed=7)
    # A float32 parameter steps as plain float32 whatever the strategy.
    words = STRATEGIES["plain"] if fmt == "fp32" else STRATEGIES[name]
    elements = [Element(words, fmt, value) for value in start]
    for step in range(1, STEPS + 1):
        grads = gradients(rng, fmt, len(start))
        draws = [random_bits(7, 0, step, 0, len(start), number).tolist() for number in (0, 1)]
        for i, (element, grad) in enumerate(zip(elements, grads, strict=True)):
            element.step_fp32(grad, hyper, lambda draw, i=i, draws=draws: draws[draw][i])
        param.grad = torch.tensor(grads, dtype=torch.float64).to(param.dtype)
        opt.step()
        compare(param, opt.state[param], elements, step)


@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
@pytest.mark.parametrize("name", WORKING)
def test_working_arithmetic_is_the_papers_sequence_each_operation_rounded(name: str, fmt: str, hyper: Hyper) -> None:
    if fmt == "fp16":
        # 1e-8 is 0 in float16, and 0 / 0 is nan.
        hyper = Hyper(hyper.lr, hyper.beta1, hyper.beta2, 1e-6, hyper.weight_decay)
    rng = random.Random(f"{name} {fmt} {hyper} working")
    start = start_values(rng, fmt, 40)
    param, opt = optimizer(start, fmt, hyper, strategy=name, arithmetic="working")
    elements = [Element(STRATEGIES[name], fmt, value) for value in start]
    for step in range(1, STEPS + 1):
        grads = gradients(rng, fmt, len(start))
        for element, grad in zip(elements, grads, strict=True):
            element.step_working(grad, hyper)
        param.grad = torch.tensor(grads, dtype=torch.float64).to(param.dtype)
        opt.step()
        compare(param, opt.state[param], elements, step)


@pytest.mark.parametrize("name", ["plain", "plus", "mixed", "kahan"])
def test_float32_gradients_enter_unrounded(name: str) -> None:
    rng = random.Random(name)
    hyper = Hyper()
    start = start_values(rng, "bf16", 32)
    param, opt = optimizer(start, "bf16", hyper, strategy=name)
    param.grad_dtype = torch.float32
    elements = [Element(STRATEGIES[name], "bf16", value) for value in start]
    for step in range(1, 4):
        grads = gradients(rng, "fp32", len(start))
        draws = [random_bits(0, 0, step, 0, len(start), number).tolist() for number in (0, 1)]
        for i, (element, grad) in enumerate(zip(elements, grads, strict=True)):
            element.step_fp32(grad, hyper, lambda draw, i=i, draws=draws: draws[draw][i])
        param.grad = torch.tensor(grads, dtype=torch.float32)
        opt.step()
        compare(param, opt.state[param], elements, step)


@pytest.mark.parametrize("scale", [65536.0, 3.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_divided_by_the_loss_scale_and_turned_round(scale: float, maximize: bool) -> None:
    rng = random.Random(str(scale))
    start = start_values(rng, "bf16", 32)
    param, opt = optimizer(start, "bf16", Hyper(), strategy="light-nearest", maximize=maximize)
    elements = [Element(STRATEGIES["light-nearest"], "bf16", value) for value in start]
    grads = gradients(rng, "bf16", len(start))
    for element, grad in zip(elements, grads, strict=True):
        unscaled = round_to(grad / scale, "fp32")
        element.step_fp32(-unscaled if maximize else unscaled, Hyper(), lambda _: 0)
    param.grad = torch.tensor(grads, dtype=torch.float64).to(param.dtype)
    setattr(opt, "grad_scale", torch.tensor(scale))  # noqa: B010  what torch.amp.GradScaler sets for the time of a step
    opt.step()
    compare(param, opt.state[param], elements, 1)


def test_lr_and_betas_that_change_between_steps_are_the_ones_in_force() -> None:
    rng = random.Random(5)
    start = start_values(rng, "bf16", 32)
    param, opt = optimizer(start, "bf16", Hyper(), strategy="plus-nearest")
    elements = [Element(STRATEGIES["plus-nearest"], "bf16", value) for value in start]
    for step, hyper in enumerate(HYPERS.values(), 1):
        grads = gradients(rng, "bf16", len(start))
        for element, grad in zip(elements, grads, strict=True):
            element.step_fp32(grad, hyper, lambda _: 0)
        opt.param_groups[0].update(
            lr=hyper.lr, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, weight_decay=hyper.weight_decay
        )
        param.grad = torch.tensor(grads, dtype=torch.float64).to(param.dtype)
        opt.step()
        compare(param, opt.state[param], elements, step)


def test_the_oracles_strategies_are_the_table() -> None:
    assert list(STRATEGIES) == list(collage.strategies())
    for name, words in STRATEGIES.items():
        if name != "fp32":
            dtype = dtype_of(name)
            states = collage.strategies()[name].layout(dtype, torch.Size((48,))).components(dtype)
            moments = {states["exp_avg"].dtype, states["exp_avg_sq"].dtype}
            assert moments == {format_of(words.moments or "bf16").dtype}

"""What Triton's interpreter makes of the kernels, bit by bit beside the definition.

TRITON_INTERPRET must be set before triton is first imported, so that ``test_fused.py`` runs this file in a process of
its own: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/fused_values.py``.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fused_batches import (
    BLOCKED,
    CASES,
    HYPER,
    LOW,
    assert_same,
    copy_of,
    gradients,
    layout_of,
    make_batch,
    normal,
    step_both,
    wild,
)
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

import collage
from collage.kernels import eager, fused
from collage.kernels.contract import Inputs, Layout
from collage.kernels.fused import elements, integers, launching, storages
from collage.kernels.fused.forms import stored
from collage.kernels.looking import look
from collage.numerics import (
    BF16,
    E4M3FN,
    FP16,
    FP32,
    format_of,
    join_remainder,
    round_nearest,
    round_stochastic,
    split_remainder,
)
from collage.storage import Blockwise, Expansion, Kahan, Master, Remainder, Rounded
from comparing import assert_same as assert_same_optimizers
from comparing import bits, values

pytestmark = pytest.mark.usefixtures("interpreted")

SIZES = [1, 0, 1023, 1025]


def test_the_kernels_can_run_here() -> None:
    assert fused.unavailable() == ""


@pytest.mark.parametrize(("strategy", "dtype"), CASES)
def test_steps_are_the_eager_ones(strategy: str, dtype: torch.dtype) -> None:
    batch = make_batch(layout_of(strategy, dtype), dtype, SIZES)
    other = copy_of(batch)
    for step, kind in enumerate([dtype, torch.float32]):
        step_both(batch, other, Inputs(HYPER, gradients(batch, kind, step), audit=step > 0))


@pytest.mark.parametrize(("strategy", "dtype"), CASES)
def test_steps_are_the_eager_ones_for_any_bit_patterns(strategy: str, dtype: torch.dtype) -> None:
    sizes = [1500, 33]
    firsts, steps = [2**32 - 700, 7 * 2**32 - 3], [4.0, 30.0]
    batch = make_batch(layout_of(strategy, dtype), dtype, sizes, wild, firsts, steps, seed=-(2**70) + 3)
    other = copy_of(batch)
    for step, (lr, decay, maximize) in enumerate([(10.0, 0.0, True), (1e-3, 0.5, False)]):
        hyper = replace(HYPER, lr=lr, weight_decay=decay, maximize=maximize)
        grads = gradients(batch, torch.float32 if step else dtype, step, wild)
        step_both(batch, other, Inputs(hyper, grads))


STORAGES = {
    "param": [
        Rounded(),
        Rounded(rounding="stochastic"),
        Kahan(),
        Expansion(2),
        Expansion(2, rounding="stochastic"),
        Master(),
    ],
    "exp_avg": [Rounded(), Rounded(FP32), Expansion(2, rounding="stochastic")],
    "exp_avg_sq": [Rounded(), Rounded(FP32), Expansion(2), Expansion(2, rounding="stochastic")],
}
LAYOUTS = [Layout(*storages) for storages in itertools.product(*STORAGES.values())]


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_any_combination_of_storages_steps_as_the_eager_one(number: int) -> None:
    layout, dtype = LAYOUTS[number], LOW[number % 2]
    assert fused.serves(layout, dtype)
    batch = make_batch(layout, dtype, [400], wild, steps=[2.0])
    step_both(batch, copy_of(batch), Inputs(HYPER, gradients(batch, dtype, number, wild)))


def run_ptx(asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """What the instructions in ``elements`` do, after PTX's manual: from bfloat16 to float32, and to the nearest, where
    every nan becomes 0x7FFF."""
    (x,) = args
    data = x.handle.data
    if asm.startswith("cvt.rn.bf16x2.f32"):
        made = round_nearest(torch.from_numpy(data.copy()), BF16).to(torch.bfloat16).view(torch.int16).numpy()
        made[np.isnan(data)] = 0x7FFF
    else:
        assert asm.startswith("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
        made = (data.astype(np.int32) << 16).view(np.float32)
    return tl.tensor(TensorHandle(made, dtype), tl.block_type(dtype, list(x.shape)))


@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_any_combination_of_storages_steps_so_as_ptx(number: int, audit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(asm: str, *args: Any) -> Any:
        ran.append(asm)
        return run_ptx(asm, *args)

    monkeypatch.setattr(tl, "inline_asm_elementwise", run)
    for module in (elements, storages):
        monkeypatch.setattr(module, "PTX", tl.constexpr(True))
    fill = normal if audit else wild
    batch = make_batch(LAYOUTS[number], torch.bfloat16, [400], fill, steps=[2.0])
    step_both(batch, copy_of(batch), Inputs(HYPER, gradients(batch, torch.bfloat16, number, fill), audit=audit))
    assert ran


@pytest.mark.parametrize("number", range(0, len(LAYOUTS), 3))
def test_any_combination_of_storages_has_the_eager_sums(number: int) -> None:
    layout, dtype = LAYOUTS[number], LOW[number % 2]
    batch = make_batch(layout, dtype, [400])
    step_both(batch, copy_of(batch), Inputs(HYPER, gradients(batch, dtype, number), audit=True))


SOFTSIGN, ROOT4 = Blockwise("softsign", 64), Blockwise("root4", 64)
OTHERS = [
    Layout(Remainder(16), Rounded(), ROOT4),
    Layout(Remainder(8), Rounded(FP32), SOFTSIGN),
    Layout(Remainder(4), ROOT4, Rounded(FP32)),
    Layout(Remainder(4, rounding="stochastic"), Rounded(), Expansion(2)),
    Layout(Remainder(4), Rounded(FP32), Rounded(FP32)),
    Layout(Expansion(2, scaled=True), SOFTSIGN, Rounded()),
    Layout(Expansion(2, rounding="stochastic", scaled=True), Expansion(2, FP16, scaled=True), ROOT4),
    Layout(Kahan(), Blockwise("root4", 2), Blockwise("softsign", 2)),
    Layout(Master(), Blockwise("softsign", 100), Blockwise("softsign", 100, "nearest")),
    Layout(Rounded(), Rounded(BF16), Expansion(2, BF16, "stochastic")),
]


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_storages_of_integers_go_with_all_others(number: int) -> None:
    layout, dtype = OTHERS[number], LOW[number % 2]
    assert fused.serves(layout, dtype)
    batch = make_batch(layout, dtype, [1200], wild, steps=[2.0])
    step_both(batch, copy_of(batch), Inputs(HYPER, gradients(batch, dtype, number, wild)))


@pytest.mark.parametrize("block", [122, 32])
@pytest.mark.parametrize(("strategy", "dtype"), BLOCKED)
def test_rows_have_blocks_of_any_even_size(strategy: str, dtype: torch.dtype, block: int) -> None:
    layout = layout_of(strategy, dtype, block)
    assert layout.block(dtype) == block
    # No block crosses a boundary of the keys; of another size than a power of two, none comes near one.
    firsts = [3 * 2**32 - 320 if block == 32 else 2**31]
    batch = make_batch(layout, dtype, [1300], wild, firsts=firsts, steps=[4.0])
    other = copy_of(batch)
    step_both(batch, other, Inputs(HYPER, gradients(batch, dtype, 0, wild)))
    inputs = Inputs(replace(HYPER, maximize=True), gradients(batch, torch.float32, 1), audit=True)
    step_both(batch, other, replace(inputs, grad_scale=torch.tensor(3.0)))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("strategy", sorted({strategy for strategy, _ in BLOCKED}))
def test_parameters_too_small_for_blocks_are_stepped(strategy: str, dtype: torch.dtype) -> None:
    layout = collage.strategies()[strategy].layout(dtype, torch.Size((40,)))
    assert fused.serves(layout, dtype)
    batch = make_batch(layout, dtype, [300], wild)
    other = copy_of(batch)
    for step, kind in enumerate([torch.float32, dtype]):
        step_both(batch, other, Inputs(HYPER, gradients(batch, kind, step, wild)))


@pytest.mark.parametrize("moved", [["param", "param_remainder", "exp_avg"], ["exp_avg_scale"]])
@pytest.mark.parametrize("block", [128, 122])
def test_unaligned_tensors_in_blocks_have_the_same_bits(block: int, moved: list[str], monkeypatch) -> None:
    monkeypatch.setattr(launching, "WARP", 32)
    dtype = torch.bfloat16
    batch = make_batch(layout_of("compact-4bit", dtype, block), dtype, [600])
    other = copy_of(batch)
    for name in moved:
        old = other.params[0] if name == "param" else other.states[0][name]
        new = torch.cat([old, old])[3 : 3 + len(old)].copy_(old)
        assert new.data_ptr() % 16 != 0
        if name == "param":
            other.params = [new]
        else:
            other.states[0][name] = new
    step_both(batch, other, Inputs(HYPER, gradients(batch, dtype, 0), audit=True))


@pytest.mark.parametrize("strategy", ["stochastic", "plus", "plain", "mixed"])
def test_tails_and_unaligned_tensors_are_taken_in_pieces_with_the_same_bits(strategy: str, monkeypatch) -> None:
    monkeypatch.setattr(launching, "WARP", 32)
    dtype = torch.bfloat16
    batch = make_batch(layout_of(strategy, dtype), dtype, [1025, 1040], firsts=[2**32 - 1024, 2**33 - 100])
    other = copy_of(batch)
    moved = torch.cat([other.params[1], other.params[1]])[3 : 3 + 1040].copy_(other.params[1])
    assert moved.data_ptr() % 16 != 0
    other.params = [other.params[0], moved]
    step_both(batch, other, Inputs(HYPER, gradients(batch, dtype, 0), audit=True))


@pytest.mark.parametrize("first", [0, 2**32 - 2100, 2**32 - 1024, 2**32 - 1, 2**32, 5 * 2**32 - 1025, 2**40 - 7])
@pytest.mark.parametrize("strategy", ["stochastic", "plus"])
def test_random_bits_are_those_of_the_64_bit_index(strategy: str, first: int) -> None:
    batch = make_batch(layout_of(strategy, torch.bfloat16), torch.bfloat16, [2100, 5], firsts=[first, 0])
    step_both(batch, copy_of(batch), Inputs(HYPER, gradients(batch, torch.bfloat16, 0)))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_learning_rate_on_the_device_counts_instead_of_the_number(kind: torch.dtype) -> None:
    batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, [300])
    other = copy_of(batch)
    for step in range(2):
        lr = torch.tensor(0.1 / (step + 3), dtype=kind)
        grads = gradients(batch, torch.bfloat16, step)
        plain = Inputs(replace(HYPER, lr=float(lr)), grads)
        step_both(batch, other, Inputs(replace(HYPER, lr=9.0), grads, lr=lr), plain)


def test_numbers_reach_the_device_in_float64() -> None:
    # Each of these rounds otherwise by way of float32.
    hyper = replace(HYPER, lr=1 / 3, beta1=0.9 + 2**-40, beta2=1 - 1e-9, weight_decay=1 / 7, eps=1e-300)
    batch = make_batch(layout_of("fp32", torch.float32), torch.float32, [400])
    other = copy_of(batch)
    for step in range(3):
        step_both(batch, other, Inputs(hyper, gradients(batch, torch.float32, step)))


@pytest.mark.parametrize("audit", [True, False])
def test_a_step_with_found_inf_changes_and_counts_nothing(audit: bool) -> None:
    batch = make_batch(layout_of("plus", torch.float16), torch.float16, [300, 0, 40])
    other = copy_of(batch)
    for step, found in enumerate([0.0, 1.0, 0.0]):
        inputs = Inputs(HYPER, gradients(batch, torch.float16, step), found_inf=torch.tensor(found), audit=audit)
        if found:
            sums = fused.step(other, inputs)
            assert_same(batch, other)
            assert sums is None or (sums == 0).all()
        else:
            step_both(batch, other, inputs)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_gradients_are_divided_by_the_loss_scale(dtype: torch.dtype) -> None:
    batch = make_batch(layout_of("plus", dtype), dtype, [300])
    other = copy_of(batch)
    for step, scale in enumerate([65536.0, 3.0]):
        grads = gradients(batch, dtype, step, wild if step else normal)
        step_both(batch, other, Inputs(HYPER, grads, grad_scale=torch.tensor(scale), audit=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_without_learning_rate_keeps_the_signs_of_zeros(dtype: torch.dtype) -> None:
    batch = make_batch(layout_of("plain", dtype), dtype, [64], lambda n, kind, seed: -torch.zeros(n, dtype=kind))
    for maximize in (True, False):
        for sign in (1.0, -1.0):
            hyper = replace(HYPER, lr=0.0, weight_decay=0.0, maximize=maximize)
            inputs = Inputs(hyper, [torch.zeros(64, dtype=dtype) * sign])
            step_both(copy_of(batch), copy_of(batch), inputs)


def test_powers_of_the_betas_follow_every_change_of_betas_and_steps() -> None:
    batch = make_batch(layout_of("fp32", torch.float32), torch.float32, [40, 40, 40], steps=[0.0, 17.0, 60.0])
    other = copy_of(batch)
    for step, (beta1, beta2, back) in enumerate(
        [
            (0.9, 0.999, 0),
            (0.9, 0.999, 0),
            (0.9, 0.999, 4),
            (0.8, 0.999, 0),
            (0.8, 0.99, 1),
            (0.0, 0.0, 0),
            (0.9, 0.999, 3),
        ]
    ):
        for each in (batch, other):
            each.steps[1] -= back
        grads = gradients(batch, torch.float32, step)
        step_both(batch, other, Inputs(replace(HYPER, beta1=beta1, beta2=beta2), grads))


def test_an_eager_step_between_two_others_changes_nothing() -> None:
    batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, [100])
    other = copy_of(batch)
    for step in range(3):
        inputs = Inputs(HYPER, gradients(batch, torch.bfloat16, step))
        eager.step(batch, inputs)
        (eager if step == 1 else fused).step(other, inputs)
        assert_same(batch, other)


def test_gradients_of_two_dtypes_may_stand_in_one_batch() -> None:
    batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, [1030, 9])
    grads = [normal(1030, torch.bfloat16, 1), normal(9, torch.float32, 2)]
    step_both(batch, copy_of(batch), Inputs(HYPER, grads))


def test_an_epsilon_of_zero_gives_the_eager_nans() -> None:
    batch = make_batch(layout_of("light", torch.bfloat16), torch.bfloat16, [50])
    grads = gradients(batch, torch.bfloat16, 0)
    grads[0][::3] = 0
    step_both(batch, copy_of(batch), Inputs(replace(HYPER, eps=0.0), grads, audit=True))


def test_many_tensors_are_stepped_in_one_launch(launches: list[str]) -> None:
    batch = make_batch(layout_of("light", torch.bfloat16), torch.bfloat16, [3] * 12)
    other = copy_of(batch)
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 0)))
    assert launches == ["advance_kernel", "step_kernel"]
    launches.clear()
    step_both(batch, other, Inputs(HYPER, gradients(batch, torch.bfloat16, 1), audit=True))
    assert launches == ["advance_kernel", "step_kernel", "sums_kernel"]


def test_sums_add_up_many_blocks_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "TILE", 128)
    monkeypatch.setattr(launching, "ROWS", 8)
    batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, [1200, 10, 300])
    others = [copy_of(batch) for _ in range(2)]
    inputs = Inputs(HYPER, gradients(batch, torch.bfloat16, 0), audit=True)
    step_both(batch, others[0], inputs)
    again = copy_of(others[1])
    first, second = fused.step(others[1], inputs), fused.step(again, inputs)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@pytest.mark.parametrize("audit", [True, False])
def test_batches_without_elements_are_counted(audit: bool) -> None:
    for sizes in ([], [0], [0, 0]):
        batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, sizes)
        step_both(batch, copy_of(batch), Inputs(HYPER, gradients(batch, torch.bfloat16, 0), audit=audit))


def test_addresses_are_uploaded_again_only_when_a_gradient_has_moved() -> None:
    batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, [40, 50])
    other = copy_of(batch)
    grads = gradients(batch, torch.bfloat16, 0)
    for expected in (1, 1, 1):
        step_both(batch, other, Inputs(HYPER, grads))
        assert other.kept["triton"].uploads == expected
    grads[1] = grads[1].clone()
    step_both(batch, other, Inputs(HYPER, grads))
    assert other.kept["triton"].uploads == 2
    seen = look(grads).addresses
    step_both(batch, other, Inputs(HYPER, grads, addresses=seen))
    assert other.kept["triton"].uploads == 2


def test_an_optimizer_finds_tensors_that_have_moved(launches: list[str]) -> None:
    optimizers = []
    for backend in ("triton", "eager"):
        params = [torch.nn.Parameter(values((n,), n)) for n in (40, 50)]
        optimizer = collage.AdamW(params, lr=1e-2, backend=backend)
        for step in range(4):
            for param in params:
                param.grad = values(param.shape, step)
            # Held, so that what moves gets other memory.
            before = [params[1].data, optimizer.state[params[0]].get("param_lo")]
            if step == 1:
                params[1].data = params[1].data.clone()
            if step == 2:
                optimizer.state[params[0]]["param_lo"] = optimizer.state[params[0]]["param_lo"].clone()
            optimizer.step()
            del before
        optimizers.append(optimizer)
    # A layout's first use may come before.
    assert launches[-8:] == ["advance_kernel", "step_kernel"] * 4
    assert_same_optimizers(*optimizers)


def test_a_graph_that_is_captured_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(layout_of("plus", torch.bfloat16), torch.bfloat16, [40, 50])
    other = copy_of(batch)
    capturing = [True]
    monkeypatch.setattr(launching.Tables, "_capturing", lambda tables: capturing[0])
    outside, inside = (gradients(batch, torch.bfloat16, step) for step in range(2))
    with pytest.raises(RuntimeError, match="at least one step before capturing"):
        fused.step(other, Inputs(HYPER, outside))
    for grads, within in [(outside, False), (inside, True), (outside, False)]:
        capturing[0] = within
        step_both(batch, other, Inputs(HYPER, grads))
    # What was captured stands in no other step's way.
    tables = other.kept["triton"]
    assert tables.uploads == 1
    (_, table), *more = tables._captured
    assert not more
    assert table[:, 0].tolist() == [grad.data_ptr() for grad in inside]
    # Nor does a later step outside, with the gradients of the graph, take its table to be written.
    capturing[0] = False
    step_both(batch, other, Inputs(HYPER, inside))
    assert tables.uploads == 2
    capturing[0] = True
    step_both(batch, other, Inputs(HYPER, inside))
    with pytest.raises(RuntimeError, match="outside before each capture"):
        fused.step(other, Inputs(HYPER, inside))


def test_a_null_step_changes_nothing_in_one_launch(launches: list[str]) -> None:
    sizes = [1, 3, 0, 4096, 9001, 5000]
    written = [wild(size, dtype, i) for i, (size, dtype) in enumerate(itertools.product(sizes, [*LOW, torch.float32]))]
    read = [wild(size, torch.bfloat16, 90 + i) for i, size in enumerate([40_000, 7, 9001])]
    before = [tensor.clone() for tensor in (*written, *read)]
    fused.null_step(written, read)
    for tensor, kept in zip((*written, *read), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), kept.view(torch.uint8))
    fused.null_step(written, [])
    assert launches == ["null_kernel"] * 2


@triton.jit
def round_kernel(values, draws, nearest, stochastic, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(values + at)
    tl.store(nearest + at, elements.nearest(x, FORMAT))
    rounded = elements.rounded_number(x, tl.load(draws + at), FORMAT, True)
    tl.store(stochastic + at, elements.or_nan(x, rounded, FORMAT))


@pytest.mark.parametrize("dtype", [*LOW, E4M3FN.dtype])
def test_rounding_is_that_of_the_definition(dtype: torch.dtype) -> None:
    x, draws = numbers_and_draws()
    nearest, stochastic = torch.empty(len(x)), torch.empty(len(x))
    fmt = format_of(dtype)
    launching.launch(round_kernel, 1, x, draws, nearest, stochastic, FORMAT=fmt.name, SIZE=len(x))
    assert torch.equal(bits(nearest), bits(round_nearest(x, fmt).float()))
    assert torch.equal(bits(stochastic), bits(round_stochastic(x, fmt, draws).float()))


def numbers_and_draws() -> tuple[Tensor, Tensor]:
    """float32 of every sign and exponent, with random and with critical significands; draws, with both extremes."""
    count = 1 << 18
    generator = torch.Generator().manual_seed(1)
    top = torch.arange(512).repeat_interleave(count // 512) << 23
    low = torch.randint(0, 1 << 23, (count,), generator=generator)
    zeros = torch.randint(0, 24, (count,), generator=generator)
    low = torch.where(low % 3 == 0, low >> zeros << zeros, low) + torch.randint(-1, 2, (count,), generator=generator)
    x = (top + low.clamp(0, (1 << 23) - 1)).to(torch.int64).to(torch.int32).view(torch.float32)
    draws = torch.randint(0, 1 << 16, (count,), generator=generator, dtype=torch.int32)
    draws[::7], draws[1::7] = 0, (1 << 16) - 1
    return x, draws


@triton.jit
def remainder_kernel(values, draws, hi, lo, back, FORMAT: tl.constexpr, EXTRA: tl.constexpr, STOCHASTIC: tl.constexpr,
                     SIZE: tl.constexpr):  # fmt: skip
    at = tl.arange(0, SIZE)
    new_hi, new_lo = integers.split_remainder(tl.load(values + at), tl.load(draws + at), FORMAT, EXTRA, STOCHASTIC)
    joined = integers.join_remainder(tl.load(hi + at).to(tl.int32), tl.load(lo + at), FORMAT, EXTRA)
    tl.store(hi + at, new_hi.to(hi.dtype.element_ty))
    tl.store(lo + at, new_lo)
    tl.store(back + at, joined)


REMAINDERS8 = [(E4M3FN.dtype, 8), (E4M3FN.dtype, 16)]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    ("dtype", "extra"),
    [(BF16.dtype, 16), (BF16.dtype, 8), (BF16.dtype, 4), (FP16.dtype, 8), (FP16.dtype, 4), *REMAINDERS8],
)
def test_remainders_are_those_of_the_definition(dtype: torch.dtype, extra: int, stochastic: bool) -> None:
    x, draws = numbers_and_draws()
    # The subnormals of float16 and e4m3 are more than they would be among all of float32's.
    x[::3] = (x[::3].view(torch.int32) % 0x0A000000 + 0x33000000).view(torch.float32)
    hi = torch.randint(-(2**15), 2**15, x.shape, generator=torch.Generator().manual_seed(2)).to(torch.int16)
    hi[: 1 << 16] = torch.arange(-(1 << 15), 1 << 15)
    hi = hi if dtype.itemsize == 2 else hi.to(torch.int8)
    lo = draws % (1 << extra) - (1 << (extra - 1))
    wanted = join_remainder(hi.view(dtype), lo, extra)
    wanted_hi, wanted_lo = split_remainder(x, format_of(dtype), extra, draws if stochastic else None)
    back = torch.empty_like(x)
    args = (x, draws, hi, lo, back)
    options = {"FORMAT": format_of(dtype).name, "EXTRA": extra, "STOCHASTIC": stochastic, "SIZE": len(x)}
    launching.launch(remainder_kernel, 1, *args, **options)
    assert torch.equal(bits(hi.view(dtype)), bits(wanted_hi))
    assert torch.equal(lo, wanted_lo)
    assert torch.equal(bits(back), bits(wanted))


@triton.jit
def codes_kernel(values, draws, codes, scales, back, STORED: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, ROWS)[:, None]
    at = rows * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(values + at)
    scale, finite = integers.scale_of(x, STORED)
    new = integers.codes_of(x, scale, finite, tl.load(draws + at), STORED)
    tl.store(back + at, storages.value_of((tl.load(codes + at).to(tl.int32), tl.load(scales + rows)), STORED))
    tl.store(codes + at, new)
    tl.store(scales + rows, scale)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("companding", ["softsign", "root4"])
def test_codes_are_those_of_the_definition(companding: str, rounding: str) -> None:
    storage = Blockwise(companding, 32, rounding)
    x, draws = numbers_and_draws()
    values = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(3))]
    rows = values.view(-1, 32)
    # Blocks of like exponents (every eighth row as it was), of the codes' own values, about the ends of their range.
    exponents = torch.arange(len(rows), dtype=torch.int32) % 254 << 23
    spread = rows.view(torch.int32) & 0x807FFFFF | exponents[:, None] | (draws.view(-1, 32) & 3) << 23
    alike = torch.arange(len(rows)) % 8 != 0
    rows[alike] = spread[alike].view(torch.float32)
    edges = [2.0**127, 2.0**127 - 2.0**103, FP32.max, 2.0**-118, 2.0**-94, 2.0**-126, 2.0**-149, 0.0]
    for row, edge in enumerate(edges):
        rows[row] = torch.linspace(-1, 1, 32) * edge
    parts = (torch.arange(len(x)).to(storage.components(BF16.dtype)[0].dtype), wild(len(rows), torch.float32, 4))
    codes, scales, back = parts[0].clone(), parts[1].clone(), torch.empty(len(x))
    wanted = storage.load(parts, torch.empty(len(x)))
    again = torch.arange(len(rows)) % 8 == 1
    rows[again] = wanted.view(-1, 32)[again]
    storage.store(values.clone(), parts, draws.clone() if storage.stochastic else None, torch.empty(len(x)))
    options = {"STORED": tuple(stored(storage, "exp_avg", BF16.dtype) or ()), "ROWS": len(rows), "COLUMNS": 32}
    args = (values, draws, codes, scales, back)
    launching.launch(codes_kernel, 1, *args, **options)
    assert torch.equal(bits(back), bits(wanted))
    assert torch.equal(bits(scales), bits(parts[1]))
    assert torch.equal(codes, parts[0])
    assert 0.01 < scales.isnan().float().mean() < 0.5

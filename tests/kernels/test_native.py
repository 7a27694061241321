"""The native CPU kernels have the bits of the eager step, on every instruction set that this processor has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from collage import kernels
from collage.kernels import Batch, Hyper, Inputs, library, looking, native
from collage.storage import Blockwise, Remainder
from comparing import LOW, STRATEGIES, Keeper, any_bits, any_rows, assert_same, bits, keeps, values

needs_library = pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}")
ISAS = native.instruction_sets() or ("none",)
# Lengths around the widths of vectors, more than one piece of work, and none at all.
SHAPES = [(), (0,), (1,), (7,), (8,), (15,), (31,), (33,), (64,), (5, 13), (1000,), (40_009,)]
HALVES = [case for case in itertools.product(LOW, (torch.bfloat16, torch.float16)) if keeps(*case)]
CASES = [*HALVES, ("fp32", torch.float32)]
# In blocks of 128, 122, 96, 100 and 32 codes, and of 32 and 34 by a hair; the last two have no blocks.
ROWS = [(48, 256), (12, 976), (50, 480), (60, 100), (132, 32), (124, 34), (31,), (33, 3)]


def stepped(backend: str, strategy: str, dtype: torch.dtype, grad_dtype: torch.dtype, **options: Any) -> collage.AdamW:
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "seed": 2**40 + 3, **options}
    scale = settings.pop("grad_scale", None)
    params = [nn.Parameter(any_bits(shape, i, dtype)) for i, shape in enumerate(SHAPES)]
    opt = collage.AdamW(params, strategy=strategy, backend=backend, **settings)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad_dtype = grad_dtype
            # One parameter misses a step, so that the steps of a batch differ.
            missing = step == 1 and i == 5
            param.grad = None if missing else any_bits(tuple(param.shape), 100 * step + i + 50, grad_dtype)
        if scale is not None:
            setattr(opt, "grad_scale", torch.tensor(scale))  # noqa: B010  what torch.amp.GradScaler sets
        opt.step()
    return opt


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("strategy", "dtype"), CASES, ids=lambda case: str(case).removeprefix("torch."))
def test_any_bits_step_as_in_the_eager_definition(strategy: str, dtype: torch.dtype, isa: str, ran: list[str]) -> None:
    for grad_dtype in {dtype, torch.float32}:
        eager = stepped("eager", strategy, dtype, grad_dtype)
        ran.clear()
        with native.using(isa):
            mine = stepped("native", strategy, dtype, grad_dtype)
        assert set(ran) == {"native"}
        assert_same(mine, eager)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"maximize": True},
        {"grad_scale": 3.0},
        {"grad_scale": 65536.0, "maximize": True},
        {"lr": 3.0, "eps": 0.0},
        {"betas": (0.0, 0.0)},
        {"lr": torch.tensor(1e-3)},
        {"lr": 1e-38},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("strategy", "dtype"), [("plus", torch.bfloat16), ("kahan", torch.bfloat16), ("mixed", torch.float16)]
)
def test_options_step_as_in_the_eager_definition(strategy: str, dtype: torch.dtype, options, isa: str) -> None:
    with native.using(isa):
        assert_same(
            stepped("native", strategy, dtype, dtype, **options), stepped("eager", strategy, dtype, dtype, **options)
        )


def any_batch(strategy: str, dtype: torch.dtype, shape: tuple[int, ...], firsts: Sequence[int]) -> Batch:
    """Parameters and states of any bits: the first as they come, the others with scales as a store leaves them."""
    layout = collage.strategies()[strategy].layout(dtype, torch.Size(shape))
    params = [any_rows(shape, 7 + i, dtype) for i in range(len(firsts))]
    states = []
    for i in range(len(firsts)):
        components = layout.components(dtype).items()
        state = {name: any_rows(each.shape(torch.Size(shape)), 31 * i, each.dtype) for name, each in components}
        for name, tensor in state.items():
            if i and name.endswith("_scale"):
                state[name] = any_rows(tuple(tensor.shape), 31 * i + 2, torch.float32).abs().clamp(2.0**-94)
        states.append(state)
    steps = torch.tensor([0.0, 5.0, 5.0][: len(firsts)])
    return Batch(layout, "fp32", 2**63 + 5, params, states, steps, [3, 4, 9][: len(firsts)], firsts)


def assert_steps_as_eager(isa: str, strategy: str, dtype: torch.dtype, shape: tuple[int, ...], **options: Any) -> None:
    """Two steps on gradients of any bits and one on ordinary ones, with ``options`` that are fields of Inputs."""
    grad_dtype, firsts = options.pop("grad_dtype", dtype), options.pop("firsts", [0, 0])
    hyper = options.pop("hyper", Hyper(1e-2, 0.9, 0.95, 1e-8, 0.1))
    mine, eager = (any_batch(strategy, dtype, shape, firsts) for _ in range(2))
    assert native.serves(mine.layout, dtype)
    for step in range(3):
        make = any_rows if step < 2 else values
        inputs = Inputs(hyper, [make(shape, 10 * step + i, grad_dtype) for i in range(len(firsts))], **options)
        with native.using(isa):
            sums = kernels.step(mine, inputs, "native")
        wanted = kernels.step(eager, inputs, "eager")
        for one, other in ((mine.params, eager.params), ([mine.steps], [eager.steps])):
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))
        for a, b in zip(mine.states, eager.states, strict=True):
            assert [name for name in a if not torch.equal(bits(a[name]), bits(b[name]))] == []
        if sums is not None and wanted is not None:
            assert torch.equal(sums[:, 3:], wanted[:, 3:])
            assert sums.isnan().equal(wanted.isnan())


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("strategy", "dtype"), HALVES, ids=lambda case: str(case).removeprefix("torch."))
def test_any_state_steps_as_in_the_eager_definition(strategy: str, dtype: torch.dtype, isa: str) -> None:
    for shape, grad_dtype in itertools.product(ROWS, {dtype, torch.float32}):
        assert_steps_as_eager(isa, strategy, dtype, shape, grad_dtype=grad_dtype)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("strategy", "dtype"), HALVES, ids=lambda case: str(case).removeprefix("torch."))
def test_any_state_is_audited_unscaled_and_maximised_as_in_the_eager_definition(
    strategy: str, dtype: torch.dtype, isa: str
) -> None:
    for shape in ROWS:
        assert_steps_as_eager(isa, strategy, dtype, shape, audit=True)
        hyper = Hyper(3.0, 0.5, 0.5, 0.0, 0.0, maximize=True)
        assert_steps_as_eager(isa, strategy, dtype, shape, hyper=hyper, grad_scale=torch.tensor(3.0), audit=True)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("strategy", ["compact", "compact-4bit"])
def test_random_bits_of_blocks_are_those_of_the_whole_parameters_elements_across_32_bits_too(
    strategy: str, isa: str
) -> None:
    for shape, block in (((48, 256), 128), ((132, 32), 32)):
        assert_steps_as_eager(isa, strategy, torch.bfloat16, shape, firsts=[0, 2**32 - 3 * block, 7 * 2**33 + block])


@needs_library
@pytest.mark.parametrize("strategy", ["exact", "compact", "compact-4bit", "naive-8bit"])
def test_pieces_of_many_threads_are_whole_blocks(strategy: str) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in ((90, 976), (300, 256)):
            assert_steps_as_eager(native.instruction_sets()[0], strategy, torch.bfloat16, shape, audit=True)


@needs_library
def test_moments_in_blocks_that_the_kernels_do_not_know_are_left_to_the_eager_step() -> None:
    layout = collage.strategies()["compact"].layout(torch.bfloat16)
    assert native.serves(layout, torch.bfloat16)
    for block in (16, 256):
        other = replace(layout, exp_avg=Blockwise("softsign", block), exp_avg_sq=Blockwise("root4", block))
        assert not native.serves(other, torch.bfloat16)
    assert not native.serves(replace(layout, exp_avg=Blockwise("softsign", 64)), torch.bfloat16)
    nearest = replace(layout, param=Remainder(8))
    assert not native.serves(nearest, torch.bfloat16)
    assert kernels.choose(nearest, "fp32", torch.bfloat16, torch.device("cpu"), None) == "eager"


def all_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        *itertools.product(
            ["plain", "stochastic", "plus", "plus-nearest", "kahan", "compact"], [torch.bfloat16, torch.float16]
        ),
        ("exact", torch.bfloat16),
        ("fp16", torch.float16),
    ],
    ids=lambda case: str(case).removeprefix("torch."),
)
def test_every_number_of_the_format_as_parameter_and_as_gradient(strategy: str, dtype: torch.dtype, isa: str) -> None:
    found = []
    for backend in ("native", "eager"):
        params = [nn.Parameter(all_of(dtype)), nn.Parameter(torch.ones(2**16, dtype=dtype))]
        params[0].grad, params[1].grad = torch.full_like(params[0], 0.01), all_of(dtype)
        opt = collage.AdamW(params, lr=1e-3, strategy=strategy, backend=backend)
        with native.using(isa):
            opt.step()
            opt.step()
        found.append(opt)
    assert_same(*found)


def batch(firsts: list[int], size: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Batch, list[Tensor]]:
    layout = collage.strategies()["plus"].layout(dtype)
    params = [values((size,), seed + i, dtype) for i in range(len(firsts))]
    components = layout.components(dtype)
    states = [{name: torch.zeros(size, dtype=each.dtype) for name, each in components.items()} for _ in params]
    steps = torch.arange(len(firsts), dtype=torch.float32)
    made = Batch(layout, "fp32", seed, params, states, steps, [5 * i for i in range(len(firsts))], firsts)
    return made, [values((size,), 50 + seed + i, dtype) for i in range(len(firsts))]


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_random_bits_are_those_of_the_whole_parameters_elements_across_32_bits_too(isa: str) -> None:
    firsts = [0, 1, 2**32 - 50, 2**32 - 1, 2**32, 2**33 + 7, 5 * 2**32 - 33]
    found = []
    for backend in ("native", "eager"):
        made, grads = batch(firsts, 101, 3)
        with native.using(isa):
            kernels.step(made, Inputs(Hyper(1e-3, 0.9, 0.999, 1e-8, 0.01), grads), backend)
        found.append([*made.params, *(tensor for state in made.states for tensor in state.values()), made.steps])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))


@needs_library
def test_the_thread_count_and_a_missing_openmp_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    one = stepped("native", "plus", torch.bfloat16, torch.bfloat16)
    torch.set_num_threads(3)
    assert_same(stepped("native", "plus", torch.bfloat16, torch.bfloat16), one)
    monkeypatch.setattr(native, "_parallel", lambda: None)
    assert_same(stepped("native", "plus", torch.bfloat16, torch.bfloat16), one)


@needs_library
def test_large_tensors_among_runs_of_small_ones_are_stepped_once_each_by_any_number_of_threads() -> None:
    sizes = [1000] * 70 + [0, 2**15, 0, 2**15 + 1, 1, 150_001] + [999] * 70 + [2**16, 0]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        params = [nn.Parameter(values((size,), i)) for i, size in enumerate(sizes)]
        opt = collage.AdamW(params, lr=1e-2, backend="native")
        keeper = Keeper()
        opt.add_observer(keeper)
        for i, param in enumerate(params):
            param.grad = values((param.numel(),), 500 + i)
        opt.step()
        found.append((opt, torch.stack([row.sums for row in keeper.rows])))
    assert found[0][1][:, 3].equal(torch.tensor(sizes, dtype=torch.float64))
    for opt, sums in found[1:]:
        assert_same(opt, found[0][0])
        assert torch.equal(sums, found[0][1])


@needs_library
def test_torchs_own_threads_do_the_work() -> None:
    assert (native._parallel() is not None) == torch.backends.openmp.is_available()


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("strategy", "dtype"), CASES, ids=lambda case: str(case).removeprefix("torch."))
def test_audited_sums_are_the_eager_ones_and_the_step_has_the_same_bits(
    strategy: str, dtype: torch.dtype, isa: str
) -> None:
    found = []
    for backend in ("native", "eager"):
        shapes = [(1,), (37,), (40_009,), (300, 244)]
        params = [nn.Parameter(values(shape, i, dtype)) for i, shape in enumerate(shapes)]
        opt = collage.AdamW(params, lr=1e-4, weight_decay=0.1, strategy=strategy, backend=backend)
        keeper = Keeper()
        opt.add_observer(keeper)
        with native.using(isa):
            for step in range(3):
                for i, param in enumerate(params):
                    param.grad = values(tuple(param.shape), 10 * step + i, dtype)
                opt.step()
        found.append((opt, torch.stack([row.sums for row in keeper.rows])))
    (mine, sums), (eager, wanted) = found
    assert_same(mine, eager)
    # Sums are added up in another order; counts are exact.
    assert torch.equal(sums[:, 3:], wanted[:, 3:])
    scale = wanted[:, 2:3]
    assert ((sums[:, :3] - wanted[:, :3]).abs() <= 1e-12 * scale).all()


@needs_library
def test_sums_of_values_that_are_not_finite_count_as_in_the_eager_definition() -> None:
    found = []
    for backend in ("native", "eager"):
        param = nn.Parameter(any_bits((5000,), 1, torch.bfloat16))
        opt = collage.AdamW([param], lr=1e-2, strategy="plus", backend=backend)
        keeper = Keeper()
        opt.add_observer(keeper)
        param.grad = any_bits((5000,), 2, torch.bfloat16)
        opt.step()
        found.append(keeper.rows[0].sums)
    assert torch.equal(found[0][3:], found[1][3:])
    assert found[0].isnan().equal(found[1].isnan())


@needs_library
def test_every_strategy_is_served_in_every_format() -> None:
    assert {name for name, _ in HALVES} == set(LOW)
    for strategy, dtype in HALVES:
        assert native.serves(collage.strategies()[strategy].layout(dtype), dtype)
        for shape in ROWS:
            assert native.serves(collage.strategies()[strategy].layout(dtype, torch.Size(shape)), dtype)
    assert all(native.serves(collage.strategies()[name].layout(torch.float32), torch.float32) for name in STRATEGIES)


@needs_library
def test_instruction_sets_end_in_the_one_that_any_processor_has() -> None:
    assert native.instruction_sets()[-1] == "portable"
    assert collage.backends()["native"].detail == ", ".join(native.instruction_sets())
    with pytest.raises(ValueError, match=r"isa must be one of .*portable, got 'mmx'"), native.using("mmx"):
        pass


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 255, 70_001])
def test_the_null_step_reads_everything_and_changes_nothing(isa: str, size: int) -> None:
    written = [any_bits((size,), i, dtype) for i, dtype in enumerate((torch.bfloat16, torch.float32))]
    read = [any_bits((size,), 7, torch.bfloat16)]
    before = [bits(tensor).clone() for tensor in [*written, *read]]
    raw = [tensor.view(torch.uint8).clone() for tensor in [*written, *read]]
    with native.using(isa):
        kernels.null_step(written, read, "native")
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, [*written, *read], strict=True))
    assert all(torch.equal(a, b.view(torch.uint8)) for a, b in zip(raw, [*written, *read], strict=True))


def forget_the_library() -> None:
    library.native_library.cache_clear()
    looking._reader.cache_clear()


def test_without_the_library_the_eager_step_serves_and_insisting_says_why(
    monkeypatch: pytest.MonkeyPatch, ran: list[str]
) -> None:
    monkeypatch.setattr(library, "_find", lambda: None)
    forget_the_library()
    try:
        assert not collage.backends()["native"]
        assert "for want of a C++ compiler; install GCC or Clang" in collage.backends()["native"].reason
        param = nn.Parameter(values((10,), 0))
        opt = collage.AdamW([param])
        param.grad = values((10,), 1)
        opt.step()
        assert set(ran) == {"eager"}
        with pytest.raises(ValueError, match=r"backend 'native' cannot run here: it was not built .*Usable: eager"):
            collage.AdamW([param], backend="native")
        with pytest.raises(RuntimeError, match="the native kernels cannot run here: it was not built"):
            kernels.null_step([param.detach()], [], "native")
    finally:
        monkeypatch.undo()
        forget_the_library()


def test_a_library_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "_find", lambda: broken)
    forget_the_library()
    try:
        assert "its library cannot be loaded" in native.unavailable()
    finally:
        monkeypatch.undo()
        forget_the_library()

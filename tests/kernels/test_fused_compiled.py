"""The Triton kernels compiled for NVIDIA GPUs, without one: roundings, accesses, registers, recompilation.

A driver that loads and launches nothing stands in for a GPU's, so that the step's own calls are what is compiled.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_batches import (
    BLOCKED,
    CASES,
    HYPER,
    IN_TILES,
    gradients,
    layout_of,
    make_batch,
    normal,
    tile_batch,
    tile_layout,
)

from collage import Tiled, TiledTensor
from collage.kernels import fused
from collage.kernels.contract import Hyper, Inputs
from collage.kernels.fused.forms import all_stored, read_stored
from collage.numerics import E4M3FN
from collage.storage import Rounded
from comparing import STRATEGIES

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from collage.kernels.fused import advance, launching, null, tiles, update  # noqa: E402, they import triton


class Driver:
    """Compiles for one capability and takes down what is launched."""

    def __init__(self, capability: int) -> None:
        self.target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        self.launched: list[str] = []
        loaded = (None, "function", 0, 0, 1024)
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: loaded, get_device_properties=lambda device: properties
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # The caches of kernels go by device.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    @property
    def compiled(self) -> list[Any]:
        """All that has been compiled, in the order of KERNELS."""
        return [each for kernel in KERNELS for cache in kernel.device_caches.values() for each in cache[0].values()]

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: self.launched.append(metadata.name)


KERNELS = (
    advance.advance_kernel,
    update.step_kernel,
    update.sums_kernel,
    null.null_kernel,
    tiles.tile_kernel,
    tiles.read_kernel,
    tiles.round_kernel,
)


@pytest.fixture
def driver(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver(getattr(request, "param", 90))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield driver
    for kernel in KERNELS:
        kernel.device_caches.clear()


def stepped(
    driver: Driver, strategy: str, dtype: torch.dtype, grad: torch.dtype, audit: bool = False, block: int = 128
) -> list[Any]:
    """The kernels that a step of one strategy compiles."""
    batch = make_batch(layout_of(strategy, dtype, block), dtype, [5000])
    fused.step(batch, Inputs(HYPER, gradients(batch, grad, 0), audit=audit))
    return driver.compiled


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of the compiled code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    assert set(found) == {"REG", "STACK", "LOCAL"}, done.stdout
    return found


def operations(kernel: Any) -> str:
    """The PTX without its debug sections."""
    return kernel.asm["ptx"].split(".section")[0]


# Operations that round otherwise than they are written.
WRONG = r"\b(?:fma|mad)\.\S*f(?:32|64)|div\.full|\bapprox\b|\.approx|\.ftz"
BYTES = {"bf16": 2, "fp16": 2, "scaled fp16": 2, "fp32": 4, "int16": 2, "int8": 1, "uint8": 1, "nibbles": 0.5}


def wide_accesses(stored: Any, dtype: torch.dtype, grad: torch.dtype) -> tuple[list[int], list[int]]:
    """Loads and stores of 16 and of 8 bytes of a thread in a whole tile, if no access is narrower than it must be."""
    per_thread = launching.TILE // 32 // launching._warps(stored)
    written = [BYTES[name] for each in stored for name in (each.first, each.second) if name in BYTES]
    # The copy beside a master is not looked at.
    read = [*written, grad.itemsize]
    if stored[0].kind == "master":
        read.remove(dtype.itemsize)
    spans = [[int(per_thread * size) for size in each] for each in (read, written)]
    loads, stores = ([sum(n // 16 for n in each), sum(n == 8 for n in each)] for each in spans)
    return loads, stores


def accesses(text: str, kind: str) -> list[int]:
    """How many there are of 16 and of 8 bytes by a thread; the latter only of several elements."""
    return [len(re.findall(rf"{kind}\.global\S*\.{vector}", text)) for vector in (r"(?:v4\.b32|v2\.b64)", r"v2\.b32")]


@pytest.mark.parametrize("driver", [80, 90], indirect=True, ids="sm{}".format)
@pytest.mark.parametrize(
    ("strategy", "own"), [*((name, True) for name in STRATEGIES), ("plain", False), ("plus", False), ("compact", False)]
)
def test_every_strategy_rounds_as_written_in_16_byte_accesses_and_registers(
    driver: Driver, strategy: str, own: bool, tmp_path: Path
) -> None:
    dtype = next(dtype for name, dtype in CASES if name == strategy)
    grad = dtype if own else torch.float32
    advance, step = stepped(driver, strategy, dtype, grad)
    for kernel in (advance, step):
        assert not kernel.metadata.enable_fp_fusion
        assert not re.findall(WRONG, operations(kernel))
    assert {"div.rn.f64", "sqrt.rn.f64", "mul.rn.f64"} <= set(re.findall(r"[\w.]+", operations(advance)))
    text = operations(step)
    # Two paths: whole tiles, and one element per thread.
    per_thread = launching.TILE // 32 // step.metadata.num_warps
    found, blocked = all_stored(layout_of(strategy, dtype), dtype), (strategy, dtype) in BLOCKED
    if blocked:
        # And two divisions per softsign code, a root per root4 code, and three such operations per root4 scale.
        assert text.count("div.rn.f32") == 3 * (per_thread + 1) + 2
        assert text.count("sqrt.rn.f32") == 2 * (per_thread + 1) + 4
    else:
        assert text.count("div.rn.f32") == text.count("sqrt.rn.f32") == per_thread + 1
    loads, stores = wide_accesses(found, dtype, grad)
    assert accesses(text, "ld") == loads
    assert accesses(text, "st") == stores
    # Conversions between layouts: of scales alone, which the threads of a row share.
    assert set(re.findall(r"ttg.convert_layout.* : tensor<(\w+)xf32, .*->", step.asm["ttgir"])) <= {"8x1", "1x1"}
    assert blocked or "shared" not in text
    used = resources(step, tmp_path)
    assert used["LOCAL"] == 0
    # A pointer at most.
    assert used["STACK"] <= (8 if blocked else 0), "registers spill"
    assert used["REG"] <= (128 if blocked else 80)
    print(f"{strategy} {grad} sm{driver.target.arch}: {used['REG']} registers")


@pytest.mark.parametrize("strategy", ["plain", "plus", "kahan", "mixed", "exact", "compact-4bit"])
def test_an_audited_step_spills_a_pointer_at_most(driver: Driver, strategy: str, tmp_path: Path) -> None:
    _, step, sums = stepped(driver, strategy, torch.bfloat16, torch.bfloat16, audit=True)
    for kernel in (step, sums):
        used = resources(kernel, tmp_path)
        assert used["LOCAL"] == 0
        assert used["STACK"] <= 8
        assert not re.findall(r"\bfma\.\S*f(?:32|64)", operations(kernel))
    print(f"{strategy}: {resources(step, tmp_path)['REG']} registers")


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("strategy", ["stochastic", "plus", "kahan"])
def test_float16_rounds_by_the_conversion_to_nearest(driver: Driver, strategy: str, dtype, tmp_path: Path) -> None:
    _, step = stepped(driver, strategy, dtype, dtype)
    text = operations(step)
    assert set(re.findall(r"cvt\.\w+\.f16\S*f32", text)) <= {"cvt.rn.f16.f32", "cvt.rn.f16x2.f32"}
    assert "cvt.rn.f16" in text
    used = resources(step, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    print(f"{strategy}: {used['REG']} registers")


@pytest.mark.parametrize("driver", [80, 90], indirect=True, ids="sm{}".format)
@pytest.mark.parametrize(("strategy", "roundings"), [("plain", 3), ("light-nearest", 6), ("plus", 7), ("kahan", 8)])
def test_bfloat16_numbers_are_rounded_and_packed_in_pairs(driver: Driver, strategy: str, roundings: int) -> None:
    _, step = stepped(driver, strategy, torch.bfloat16, torch.bfloat16)
    text = operations(step)
    # One for each number that is stored and each on the way to it. Two paths: whole tiles, one element per thread.
    pairs = launching.TILE // 32 // step.metadata.num_warps // 2 + 1
    assert text.count("cvt.rn.bf16x2.f32") == roundings * pairs
    assert "cvt.rn.bf16.f32" not in text


@pytest.mark.parametrize("block", [122, 100, 96, 64, 32])
def test_rows_of_any_length_spill_a_pointer_at_most_and_those_of_16_bytes_are_read_in_wide_accesses(
    driver: Driver, block: int, tmp_path: Path
) -> None:
    dtype = torch.float16
    _, step = stepped(driver, "compact", dtype, dtype, block=block)
    if block % 8 == 0:
        loads, stores = wide_accesses(all_stored(layout_of("compact", dtype, block), dtype), dtype, dtype)
        assert (accesses(operations(step), "ld"), accesses(operations(step), "st")) == (loads, stores)
    used = resources(step, tmp_path)
    assert used["STACK"] <= 8
    assert used["LOCAL"] == 0
    print(f"blocks of {block}: {used['REG']} registers")


# 8-bit numbers and codes of an element: those of the parameter, and all.
NUMBERS = {"fp8": (2, 4), "fp8-native": (2, 4), "fp8-3": (3, 8), "naive-fp8": (1, 3)}


def stepped_tiles(driver: Driver, strategy: str, grad: torch.dtype, audit: bool = False, columns: int = 128) -> Any:
    """The kernel that steps parameters in tiles of 128 rows, and their batch."""
    batch = tile_batch(tile_layout(strategy, 2 * columns, 128, columns), [200])
    fused.step(batch, Inputs(HYPER, gradients(batch, grad, 0), audit=audit))
    (kernel,) = (each for each in driver.compiled if each.metadata.name == "tile_kernel")
    return kernel


@pytest.mark.parametrize(
    ("driver", "strategy"),
    [(80, "fp8"), (80, "naive-fp8"), *((90, name) for name in IN_TILES)],
    indirect=["driver"],
)
def test_tiles_round_as_written_in_accesses_of_8_elements_and_registers(
    driver: Driver, strategy: str, tmp_path: Path
) -> None:
    kernel = stepped_tiles(driver, strategy, torch.bfloat16)
    assert not kernel.metadata.enable_fp_fusion
    text = operations(kernel)
    assert not re.findall(WRONG, text)
    # Each element's update is computed twice. A softsign code takes a division when it is read and one when it is made;
    # a root4 code a root, and each of their scales two roots and a division.
    codes = strategy == "fp8"
    assert text.count("div.rn.f32") == 2 * 8 + (3 * 8 + 1 if codes else 0)
    assert text.count("sqrt.rn.f32") == 2 * 8 + (8 + 2 if codes else 0)
    assert accesses(text, "ld") == [2, 2 * NUMBERS[strategy][1]]
    assert accesses(text, "st") == [0, NUMBERS[strategy][1]]
    # Conversions between layouts: of scales alone, which the threads of a row share.
    assert set(re.findall(r"ttg.convert_layout.* : tensor<(\w+)x\w+, .*->", kernel.asm["ttgir"])) <= {"16x1", "16"}
    used = resources(kernel, tmp_path)
    assert used["LOCAL"] == used["STACK"] == 0, "registers spill"
    # The compiler of Triton 3.6 takes 184 for three numbers.
    assert used["REG"] <= (192 if strategy == "fp8-3" and triton.__version__.startswith("3.6.") else 128)
    print(f"{strategy} sm{driver.target.arch}: {used['REG']} registers")


@pytest.mark.parametrize(("audit", "columns"), [(True, 128), (False, 122)])
def test_audited_and_unaligned_tiles_spill_nothing(driver: Driver, audit: bool, columns: int, tmp_path: Path) -> None:
    kernel = stepped_tiles(driver, "fp8", torch.float32, audit, columns)
    assert not re.findall(WRONG, operations(kernel))
    used = resources(kernel, tmp_path)
    assert used["LOCAL"] == used["STACK"] == 0
    print(f"{used['REG']} registers")


@pytest.mark.parametrize("driver", [80, 90], indirect=True, ids="sm{}".format)
@pytest.mark.parametrize(("strategy", "forward"), [("fp8", "value"), ("fp8", "hi"), ("fp8-3", "value")])
def test_a_model_reads_tiles_in_accesses_of_8_elements(
    driver: Driver, strategy: str, forward: str, tmp_path: Path
) -> None:
    form = tile_layout(strategy, 256, 128, 128).param
    assert isinstance(form, Tiled)
    stored = read_stored(form, forward)
    assert stored is not None
    launching.read(TiledTensor.of(torch.ones(200, 256), form, forward), stored)
    (kernel,) = driver.compiled
    text = operations(kernel)
    assert not re.findall(WRONG, text)
    assert accesses(text, "ld") == [0, 1 if forward == "hi" else NUMBERS[strategy][0]]
    assert accesses(text, "st") == [1, 0]
    assert "convert_layout" not in kernel.asm["ttgir"]
    used = resources(kernel, tmp_path)
    assert used["LOCAL"] == used["STACK"] == 0


@pytest.mark.parametrize("driver", [80, 90], indirect=True, ids="sm{}".format)
def test_activations_are_rounded_in_accesses_of_8_elements(driver: Driver, tmp_path: Path) -> None:
    form = Tiled(Rounded(E4M3FN), 1, 128, width=256)
    stored = read_stored(form, "value")
    assert stored is not None
    launching.round_rows(torch.ones(200, 256, dtype=torch.bfloat16), form, stored)
    (kernel,) = driver.compiled
    text = operations(kernel)
    assert not re.findall(WRONG, text)
    assert accesses(text, "ld") == [1, 0]
    assert accesses(text, "st") == [0, 1]
    used = resources(kernel, tmp_path)
    assert used["LOCAL"] == used["STACK"] == 0
    print(f"sm{driver.target.arch}: {used['REG']} registers")


def test_other_parameters_in_tiles_compile_nothing_new(driver: Driver) -> None:
    for heights, rows, width in [([200], 128, 256), ([128, 5], 128, 512), ([1], 128, 1024)]:
        layout = tile_layout("naive-fp8", width, rows, 128)
        batch = tile_batch(layout, heights, steps=[3.0] * len(heights))
        fused.step(batch, Inputs(HYPER, gradients(batch, torch.bfloat16, 0)))
        assert len(driver.compiled) == 2


def test_a_null_step_is_not_optimised_away(driver: Driver, tmp_path: Path) -> None:
    fused.null_step([normal(9000, torch.bfloat16, 0)], [normal(9000, torch.bfloat16, 1)])
    (kernel,) = driver.compiled
    text = operations(kernel)
    per_thread = launching.NULL_BYTES // 128 // 16
    assert text.count("ld.global.v4.b32") == 2 * per_thread
    assert text.count("st.global.v4.b32") == per_thread
    assert resources(kernel, tmp_path)["LOCAL"] == 0


def test_new_numbers_gradients_and_counts_compile_nothing_new(driver: Driver) -> None:
    layout = layout_of("plus", torch.bfloat16)
    seeds = itertools.count()
    lr = torch.zeros(8)
    for sizes, value, decay in [
        ([5000], 1e-3, 0.1),
        ([16, 32, 1], 0.0, 0.0),
        ([64] * 16, 1.0, 1.0),
        ([7], 1e30, 5e-324),
    ]:
        hyper = Hyper(value, beta1=value and 0.9, beta2=0.999, eps=value, weight_decay=decay)
        batch = make_batch(
            layout, torch.bfloat16, sizes, seed=next(seeds) * 2**40, steps=[float(next(seeds))] * len(sizes)
        )
        fused.step(batch, Inputs(hyper, gradients(batch, torch.bfloat16, 0)))
        assert len(driver.compiled) == 2
    for place in range(3):
        batch.steps = torch.zeros(9)[place + 1 : place + 2]
        tensors = {"lr": lr[place], "found_inf": lr[place + 1], "grad_scale": lr[place + 2]}
        fused.step(batch, Inputs(hyper, gradients(batch, torch.bfloat16, 0), **tensors))
        assert len(driver.compiled) == 4
    assert driver.launched == ["advance_kernel", "step_kernel"] * 7

"""The Triton backend: where it runs, what it serves, and its kernels' values in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fused_batches import CASES, IN_TILES, layout_of, tile_layout

import collage
from collage.kernels import fused
from collage.kernels.contract import DRAWS, SUMS, Layout
from collage.kernels.fused import tables
from collage.kernels.fused.forms import FORMS, all_stored
from collage.numerics import E4M3FN, E5M2, FP16, FP32
from collage.storage import Blockwise, Expansion, Kahan, Master, Remainder, Rounded, Tiled, TiledTensor
from collage.storage.tensor import READERS

ROUNDED = Rounded()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.timeout(960)
@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("fused_values.py", ["-k", "combination"], 230),
        ("fused_values.py", ["-k", "not combination"], 140),
        ("fused_tile_values.py", [], 30),
    ],
)
def test_interpreted_kernels_are_bit_equal_to_the_eager_step(name: str, options: list[str], least: int) -> None:
    """Runs the file in a process of its own: see there. In parts, which may run beside each other."""
    file = Path(__file__).parent / name
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parents[2], timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed(, \d+ deselected)? in", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) > least


@pytest.mark.parametrize(("strategy", "dtype"), CASES)
def test_every_strategy_is_served(strategy: str, dtype: torch.dtype) -> None:
    assert fused.serves(layout_of(strategy, dtype), dtype)
    small = collage.strategies()[strategy].small
    assert small is None or fused.serves(small.layout(dtype), dtype)


@pytest.mark.parametrize("rows", [1, 7, 128, 256])
@pytest.mark.parametrize("strategy", IN_TILES)
def test_every_strategy_in_tiles_is_served(strategy: str, rows: int) -> None:
    layout = tile_layout(strategy, 4 * 122, rows, 122)
    assert fused.serves(layout, torch.bfloat16)
    assert not fused.serves(layout, torch.float16)


TILES = Tiled(Rounded(E4M3FN), width=256)
ROWS = Tiled(Rounded(E4M3FN), rows=1, width=256)
CODES = (Blockwise("softsign"), Blockwise("root4"))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(replace(TILES, columns=256), *CODES),
        Layout(replace(TILES, columns=64), *CODES),
        Layout(replace(TILES, columns=64), ROWS, ROWS),
        Layout(replace(TILES, root=True), *CODES),
        Layout(TILES, replace(ROWS, root=True), ROWS),
        Layout(TILES, replace(ROWS, rows=2), ROWS),
        Layout(TILES, replace(ROWS, of=Remainder(8, E4M3FN)), ROWS),
        Layout(replace(TILES, of=Rounded(E5M2)), *CODES),
        Layout(replace(TILES, of=Remainder(4, E4M3FN)), *CODES),
        Layout(replace(TILES, of=Expansion(2, E4M3FN)), *CODES),
        Layout(ROUNDED, ROWS, ROWS),
    ],
)
def test_tiles_that_the_kernels_do_not_cover_are_not_served(layout: Layout) -> None:
    assert fused.serves(Layout(TILES, *CODES), torch.bfloat16)
    assert not fused.serves(layout, torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (Layout(Expansion(3), ROUNDED, ROUNDED), torch.bfloat16),
        (Layout(Rounded(FP32), ROUNDED, ROUNDED), torch.bfloat16),
        (Layout(Rounded(FP16), ROUNDED, ROUNDED), torch.bfloat16),
        (Layout(ROUNDED, Kahan(), ROUNDED), torch.bfloat16),
        (Layout(ROUNDED, ROUNDED, Master()), torch.bfloat16),
        (Layout(Rounded(rounding="stochastic"), ROUNDED, ROUNDED), torch.float32),
        (Layout(Expansion(2), ROUNDED, ROUNDED), torch.float32),
        (Layout(ROUNDED, ROUNDED, Rounded("e4m3fn")), torch.bfloat16),
        (Layout(ROUNDED, ROUNDED, ROUNDED), torch.float64),
        (Layout(ROUNDED, Remainder(8), ROUNDED), torch.bfloat16),
        (Layout(ROUNDED, Blockwise("softsign", 130), ROUNDED), torch.bfloat16),
        (Layout(ROUNDED, Blockwise("softsign", 64), Blockwise("root4", 128)), torch.bfloat16),
    ],
)
def test_what_the_kernels_do_not_cover_is_not_served(layout: Layout, dtype: torch.dtype) -> None:
    assert not fused.serves(layout, dtype)


def test_a_storage_is_described_by_its_components() -> None:
    plain = ("", 0, False)
    fp32 = ("rounded", "fp32", "", False, 0, *plain)
    assert all_stored(layout_of("mixed", torch.float16), torch.float16) == (
        ("master", "fp16", "fp32", False, 0, *plain),
        fp32,
        fp32,
    )
    assert all_stored(layout_of("compact-4bit", torch.bfloat16, 96), torch.bfloat16) == (
        ("remainder", "bf16", "nibbles", True, 4, *plain),
        ("softsign", "int8", "scale", True, 96, *plain),
        ("root4", "uint8", "scale", True, 96, *plain),
    )
    assert all_stored(layout_of("fp16", torch.float16), torch.float16) == (
        ("expansion", "fp16", "scaled fp16", True, 0, *plain),
        ("rounded", "bf16", "", False, 0, *plain),
        ("expansion", "bf16", "bf16", True, 0, *plain),
    )
    assert all_stored(tile_layout("fp8-3", 96, 64, 48), torch.bfloat16) == (
        ("expansion", "e4m3fn", "scaled e4m3fn", False, 0, "twice scaled e4m3fn", 64, False),
        ("expansion", "e4m3fn", "scaled e4m3fn", False, 0, "", 1, False),
        ("expansion", "e4m3fn", "scaled e4m3fn", False, 0, "twice scaled e4m3fn", 1, True),
    )
    assert set(FORMS) == {Rounded, Expansion, Kahan, Master, Remainder, Blockwise}


def test_the_kernels_know_the_contracts_records() -> None:
    # step_tile draws, and sums_of adds up, in this order.
    assert DRAWS == {"param": 0, "exp_avg_sq": 1, "exp_avg": 2}
    assert len(SUMS) == 8
    assert SUMS[:3] == ("moved_dot_update", "moved_hi_dot_update", "update_dot_update")
    assert SUMS[3:] == ("updates", "lost", "lost_hi", "decays", "lost_decays")
    assert (tables.SCALARS, tables.POWERS, tables.ADDRESSES, tables.TILE_ADDRESSES) == (9, 5, 7, 13)


def test_gpus_read_parameters_in_tiles_by_these_kernels_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert READERS["cuda"] is fused.read
    tensor = TiledTensor.of(torch.ones(128, 128), Tiled(Rounded(E4M3FN), width=128))
    monkeypatch.setattr(fused, "_can_run", lambda: False)
    assert fused.read(tensor) is None


def test_importing_collage_and_asking_for_the_backend_loads_no_triton() -> None:
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport collage\nfrom collage.kernels import fused\n"
        "fused.unavailable(), fused.serves(collage.strategies()['plus'].layout(torch.bfloat16), torch.bfloat16)\n"
        "assert not [name for name in set(sys.modules) - before if name.split('.')[0] == 'triton']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reasons_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in fused.unavailable()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in fused.unavailable()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.unavailable() == ""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing")
    for capability, reason in [((7, 5), "Turing has compute capability 7.5"), ((8, 0), ""), ((12, 1), "")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert fused.unavailable().startswith(reason)
        assert bool(fused.unavailable()) == bool(reason)


def test_the_public_record_of_strategies_is_what_is_swept() -> None:
    assert {strategy for strategy, _ in CASES} == set(collage.strategies())

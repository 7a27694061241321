"""The Triton kernels of parameters in tiles: the step, what a model reads, and what it multiplies them with.

The exponent of a tile follows from the largest of all its new values, before any of them is stored. So a program goes
through its tile twice: it computes the new values for their magnitudes, then once more to store them, when the inputs
are in the caches. Nothing is written in between that the second time reads.
"""

# Triton's annotations are values, not types.
# pyright: reportArgumentType=false, reportInvalidTypeForm=false

from __future__ import annotations

import triton
import triton.language as tl

from collage.kernels.fused import tables
from collage.kernels.fused.advance import POWERS, SCALARS
from collage.kernels.fused.elements import nearest
from collage.kernels.fused.integers import square_root
from collage.kernels.fused.memory import load, load_parts, row_mask, store
from collage.kernels.fused.storages import exponent_of, finite_size, quotients, value_of
from collage.kernels.fused.update import (
    SUMS,
    decayed,
    first_moment,
    plain_gradient,
    second_moment,
    step_tile,
    update_of,
)

ADDRESSES = tl.constexpr(tables.TILE_ADDRESSES)


@triton.jit(do_not_specialize=["highs"], do_not_specialize_on_alignment=["grad_scale"])
def tile_kernel(
    addresses,
    shapes,
    owners,
    scalars,
    keys,
    powers,
    partials,
    grad_scale,
    highs: tl.int64,
    width,
    PARAM: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    GRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AUDIT: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Steps one tile of one parameter; where each row has an exponent of its own, ROWS rows of ENTRY elements.

    Args:
        addresses: int64 [tensors, TILE_ADDRESSES]; 0 where there is no such component.
        shapes: int64 [tensors, 3]: elements, index of the first one in the whole parameter, number of the first tile.
        width: elements of a row of the tensors.
        SIZE: elements of a slab of some rows, with room behind the rows' ends: what is loaded at a time.
        ROWS: height of a tile; a tensor's last ones may be less high.
        WIDE: whether rows of tiles begin at multiples of 16 bytes.

    The others are those of ``step_kernel``. No row of tiles crosses a boundary of the random keys.
    """
    tile = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owners + tile).to(tl.int64)
    scalar = scalars + tensor * SCALARS
    if tl.load(scalar + 8) != 0:
        return
    shape = shapes + tensor * 3
    first = tl.load(shape + 1)
    number = tile - tl.load(shape + 2)
    across = width // ENTRY
    top = number // across * ROWS
    start = top * width + number % across * ENTRY
    end = tl.minimum((top + ROWS) * width, tl.load(shape))
    row = addresses + tensor * ADDRESSES
    g_at = tl.load(row)
    p_at = (tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4))
    m_at = (tl.load(row + 5), tl.load(row + 6), tl.load(row + 7), tl.load(row + 8))
    v_at = (tl.load(row + 9), tl.load(row + 10), tl.load(row + 11), tl.load(row + 12))
    step = SIZE // COLUMNS * width
    exponent = tl.zeros([1, 1], tl.int32)
    new_exponent = exponent
    if PARAM[6] > 1:
        scale = p_at[3].to(tl.pointer_type(tl.uint8)) + number
        # Before the maximum, at which a program's threads wait for each other, all of them have read it.
        exponent += tl.load(scale).to(tl.int32)
        largest = tl.zeros([SIZE // COLUMNS, COLUMNS], tl.int32)
        slab = start
        while slab < end:
            size = new_sizes(
                g_at, p_at, m_at, v_at, slab, end, width, exponent, scalar, grad_scale,
                PARAM, EXP_AVG, EXP_AVG_SQ, GRAD, MAXIMIZE, SIZE, ENTRY, COLUMNS, WIDE,
            )  # fmt: skip
            largest = tl.maximum(largest, size)
            slab += step
        found = exponent_of(tl.max(tl.max(largest, 1), 0))
        tl.store(scale, found.to(tl.uint8))
        new_exponent += found
    sums = tl.zeros([SUMS], tl.float64)
    while start < end:
        sums += step_tile(
            g_at, p_at, m_at, v_at, start, first, end, width, exponent, new_exponent, scalar,
            keys + tensor * highs * WORDS * 2, highs, grad_scale, powers + tensor * POWERS + 4,
            PARAM, EXP_AVG, EXP_AVG_SQ, GRAD, MAXIMIZE, AUDIT, False, WORDS, SIZE, ENTRY, COLUMNS, WIDE,
        )  # fmt: skip
        start += step
    if AUDIT:
        tl.store(partials + tile * SUMS + tl.arange(0, SUMS), sums)


@triton.jit
def new_sizes(
    g_at,
    p_at,
    m_at,
    v_at,
    start,
    end,
    stride,
    exponent,
    scalar,
    grad_scale,
    PARAM: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    GRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Patterns of the magnitudes of a slab's new values, 0 where one is not finite or no element stands."""
    g = plain_gradient(load(g_at, start, end, stride, SIZE, ENTRY, COLUMNS, GRAD, WIDE), grad_scale, MAXIMIZE)
    m = load_parts(m_at, start, end, stride, 0, EXP_AVG, SIZE, ENTRY, COLUMNS, WIDE)
    v = load_parts(v_at, start, end, stride, 0, EXP_AVG_SQ, SIZE, ENTRY, COLUMNS, WIDE)
    p = value_of(load_parts(p_at, start, end, stride, exponent, PARAM, SIZE, ENTRY, COLUMNS, WIDE), PARAM)
    new_m = first_moment(value_of(m, EXP_AVG), g, scalar)
    root = square_root(second_moment(value_of(v, EXP_AVG_SQ), g, scalar), EXP_AVG_SQ)
    # Behind a row's end all is 0, or not finite where a scale is not.
    return finite_size(p + decayed(update_of(new_m, root, scalar), p, scalar))


@triton.jit(do_not_specialize=["hi", "lo", "lo2", "scale", "out", "numel"])
def read_kernel(
    hi: tl.int64,
    lo: tl.int64,
    lo2: tl.int64,
    scale: tl.int64,
    out: tl.int64,
    numel: tl.int64,
    width,
    PARAM: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What a model reads of some rows of a parameter's tiles: the value rounded to bfloat16.

    Args:
        hi, lo, lo2, scale: addresses of the components; 0 where there is no such component.
        out: address of the bfloat16 values.
    """
    number = tl.program_id(0).to(tl.int64)
    across = width // ENTRY
    top = number // across * (SIZE // COLUMNS)
    start = top * width + number % across * ENTRY
    rows = top + tl.arange(0, SIZE // COLUMNS)[:, None]
    exponents = scale.to(tl.pointer_type(tl.uint8)) + rows // PARAM[6] * across + number % across
    exponent = tl.load(exponents, mask=row_mask(start, numel, width, SIZE, COLUMNS), other=0).to(tl.int32)
    at = (hi, lo, lo2, scale)
    parts = load_parts(at, start, numel, width, exponent, PARAM, SIZE, ENTRY, COLUMNS, WIDE)
    value = nearest(value_of(parts, PARAM), "bf16")
    store(out, start, numel, width, value, SIZE, ENTRY, COLUMNS, "bf16", WIDE)


@triton.jit(do_not_specialize=["x", "codes", "scale", "numel"])
def round_kernel(
    x: tl.int64,
    codes: tl.int64,
    scale: tl.int64,
    numel: tl.int64,
    width,
    STORED: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rounds bfloat16 numbers of some rows to nearest in e4m3, of which ENTRY in a row share an exponent.

    Args:
        x, codes, scale: addresses of the numbers, of the rounded ones and of their exponents.
    """
    number = tl.program_id(0).to(tl.int64)
    across = width // ENTRY
    top = number // across * (SIZE // COLUMNS)
    start = top * width + number % across * ENTRY
    value = load(x, start, numel, width, SIZE, ENTRY, COLUMNS, "bf16", WIDE)
    exponent = exponent_of(tl.max(finite_size(value), 1))[:, None]
    code = nearest(quotients(value, exponent, STORED), "e4m3fn")
    store(codes, start, numel, width, code, SIZE, ENTRY, COLUMNS, "e4m3fn", WIDE)
    rows = top + tl.arange(0, SIZE // COLUMNS)[:, None]
    exponents = scale.to(tl.pointer_type(tl.uint8)) + rows * across + number % across
    tl.store(exponents, exponent.to(tl.uint8), mask=row_mask(start, numel, width, SIZE, COLUMNS))

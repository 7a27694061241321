"""The Triton kernels of the step itself: all tensors of a batch in one launch, and the sums of an audited step.

How a role is stored reaches the kernels as a compile-time tuple, ``forms.Stored``.
"""

# Triton's annotations are values, not types.
# pyright: reportArgumentType=false, reportInvalidTypeForm=false

from __future__ import annotations

import triton
import triton.language as tl

from collage.kernels import contract
from collage.kernels.fused import tables
from collage.kernels.fused.advance import POWERS, SCALARS
from collage.kernels.fused.elements import random_word
from collage.kernels.fused.integers import square_root
from collage.kernels.fused.memory import alignment, load, load_parts, mask_of, offsets_of, store_parts
from collage.kernels.fused.storages import exact, moved, parts_of, seen, to_be_stored, value_of

ADDRESSES = tl.constexpr(tables.ADDRESSES)
SUMS = tl.constexpr(len(contract.SUMS))


@triton.jit(do_not_specialize=["highs"], do_not_specialize_on_alignment=["grad_scale"])
def step_kernel(
    addresses,
    shapes,
    owners,
    scalars,
    keys,
    powers,
    partials,
    grad_scale,
    highs: tl.int64,
    PARAM: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    GRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AUDIT: tl.constexpr,
    CROSSES: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Steps one tile of one tensor.

    Args:
        addresses: int64 [tensors, ADDRESSES]; 0 where there is no such component.
        shapes: int64 [tensors, 3]: elements, index of the first one in the whole parameter, number of the first tile.
        owners: int32 [tiles]: each tile's tensor.
        scalars, keys, powers: as ``advance_kernel`` has left them.
        partials: float64 [tiles, SUMS], written if AUDIT.
        grad_scale: one float32 that the gradient is divided by, or None.
        highs: high halves of indices per tensor in ``keys``.
        PARAM, EXP_AVG, EXP_AVG_SQ: a ``forms.Stored`` each.
        GRAD: format of the gradients.
        CROSSES: whether a high half may grow within a tile.
        WORDS: 32-bit random words per element.
        SIZE: elements of a tile and, where these are in rows, room behind the rows' ends.
        PIECE: the same of a piece of a tile that is not aligned or not whole.
        ENTRY: elements that share a scale, a row of the tile; 1 where the tile has one dimension.
        COLUMNS: the power of two not less than ENTRY.
    """
    tile = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owners + tile).to(tl.int64)
    scalar = scalars + tensor * SCALARS
    if tl.load(scalar + 8) != 0:
        return
    shape = shapes + tensor * 3
    numel = tl.load(shape)
    first = tl.load(shape + 1)
    start = (tile - tl.load(shape + 2)) * (SIZE // COLUMNS * ENTRY)
    row = addresses + tensor * ADDRESSES
    g_at = tl.load(row)
    p_at = (tl.load(row + 1), tl.load(row + 2))
    m_at = (tl.load(row + 3), tl.load(row + 4))
    v_at = (tl.load(row + 5), tl.load(row + 6))
    unaligned = (g_at | alignment(p_at, PARAM) | alignment(m_at, EXP_AVG) | alignment(v_at, EXP_AVG_SQ)) & 15
    tensor_keys = keys + tensor * highs * WORDS * 2
    beta2 = powers + tensor * POWERS + 4
    sums = tl.zeros([SUMS], tl.float64)
    end = tl.minimum(start + SIZE // COLUMNS * ENTRY, numel)
    wide = unaligned == 0
    if ENTRY == 1:
        # A mask whose length is known at run time alone makes narrow accesses. Rows are whole, and theirs is harmless.
        wide &= start + SIZE <= numel
    if wide:
        sums += step_tile(
            g_at, p_at, m_at, v_at, start, first, numel, ENTRY, 0, 0, scalar, tensor_keys, highs, grad_scale, beta2,
            PARAM, EXP_AVG, EXP_AVG_SQ, GRAD, MAXIMIZE, AUDIT, CROSSES, WORDS, SIZE, ENTRY, COLUMNS, True,
        )  # fmt: skip
    else:
        # One element per thread keeps the registers of the other path at half of what they would be.
        while start < end:
            sums += step_tile(
                g_at, p_at, m_at, v_at, start, first, numel, ENTRY, 0, 0, scalar, tensor_keys, highs, grad_scale,
                beta2, PARAM, EXP_AVG, EXP_AVG_SQ, GRAD, MAXIMIZE, AUDIT, CROSSES, WORDS, PIECE, ENTRY, COLUMNS, False,
            )  # fmt: skip
            start += PIECE // COLUMNS * ENTRY
    if AUDIT:
        tl.store(partials + tile * SUMS + tl.arange(0, SUMS), sums)


@triton.jit
def step_tile(
    g_at,
    p_at,
    m_at,
    v_at,
    start,
    first,
    end,
    stride,
    exponent,
    new_exponent,
    scalar,
    keys,
    highs,
    grad_scale,
    beta2,
    PARAM: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    GRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AUDIT: tl.constexpr,
    CROSSES: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``eager._fp32`` of one tile, in its order. Returns its row of sums; zeros unless AUDIT.

    ``exponent`` and ``new_exponent`` are those of the parameter's tile, of which this one is some rows; see
    ``tiles.py``.
    """
    g = load(g_at, start, end, stride, SIZE, ENTRY, COLUMNS, GRAD, WIDE)
    old_m = load_parts(m_at, start, end, stride, 0, EXP_AVG, SIZE, ENTRY, COLUMNS, WIDE)
    old_v = load_parts(v_at, start, end, stride, 0, EXP_AVG_SQ, SIZE, ENTRY, COLUMNS, WIDE)
    old_p = load_parts(p_at, start, end, stride, exponent, PARAM, SIZE, ENTRY, COLUMNS, WIDE)
    g = plain_gradient(g, grad_scale, MAXIMIZE)
    offsets = offsets_of(stride, SIZE, ENTRY, COLUMNS)
    # contract.DRAWS: param and exp_avg_sq share the first word.
    FIRST_WORD: tl.constexpr = PARAM[3] or EXP_AVG_SQ[3]
    SECOND_WORD: tl.constexpr = EXP_AVG[3]
    # Each moment is stored as soon as it can be: of registers, the most are wanted here.
    m = first_moment(value_of(old_m, EXP_AVG), g, scalar)
    word2 = words_of(keys, first, start, offsets, highs, 1, SECOND_WORD, CROSSES, WORDS)
    draw = (word2 & 0xFFFF).to(tl.int32)
    new_m = parts_of(m, m, old_m, 0, draw, EXP_AVG)
    written = to_be_stored(m, new_m, draw, EXP_AVG)
    store_parts(m_at, start, end, stride, written, EXP_AVG, SIZE, ENTRY, COLUMNS, WIDE)

    v = second_moment(value_of(old_v, EXP_AVG_SQ), g, scalar)
    word = words_of(keys, first, start, offsets, highs, 0, FIRST_WORD, CROSSES, WORDS)
    draw = (word >> 16).to(tl.int32)
    new_v = parts_of(v, v, old_v, 0, draw, EXP_AVG_SQ)
    written = to_be_stored(v, new_v, draw, EXP_AVG_SQ)
    store_parts(v_at, start, end, stride, written, EXP_AVG_SQ, SIZE, ENTRY, COLUMNS, WIDE)

    u = update_of(m, square_root(v, EXP_AVG_SQ), scalar)
    p = value_of(old_p, PARAM)
    u = decayed(u, p, scalar)
    draw = (word & 0xFFFF).to(tl.int32)
    new_p = parts_of(p + u, u, old_p, new_exponent, draw, PARAM)
    written = to_be_stored(p + u, new_p, draw, PARAM)
    store_parts(p_at, start, end, stride, written, PARAM, SIZE, ENTRY, COLUMNS, WIDE)
    if AUDIT:
        e = moved(new_p, old_p, PARAM)
        e_hi = seen(new_p, PARAM) - seen(old_p, PARAM)
        moved_v = moved(new_v, old_v, EXP_AVG_SQ)
        before = exact(old_v, EXP_AVG_SQ)
        mask = mask_of(start, end, stride, SIZE, ENTRY, COLUMNS)
        return sums_of(mask, u.to(tl.float64), e, e_hi, g.to(tl.float64), before, moved_v, tl.load(beta2))
    else:
        return tl.zeros([SUMS], tl.float64)


@triton.jit
def plain_gradient(g, grad_scale, MAXIMIZE: tl.constexpr):
    """``eager._gradient``."""
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale) + tl.zeros(g.shape, tl.float32))
    if MAXIMIZE:
        g = g * -1.0
    return g


@triton.jit
def first_moment(m, g, scalar):
    """b1 m + (1 - b1) g."""
    return m * tl.load(scalar) + g * tl.load(scalar + 1)


@triton.jit
def second_moment(v, g, scalar):
    """b2 v + (1 - b2) (g g)."""
    return v * tl.load(scalar + 2) + (g * g) * tl.load(scalar + 3)


@triton.jit
def update_of(m, root, scalar):
    """The update by the new m and the square root of the new v, without weight decay."""
    return tl.div_rn(m * tl.load(scalar + 4), root * tl.load(scalar + 5) + tl.load(scalar + 6))


@triton.jit
def decayed(u, p, scalar):
    """The intended update of p."""
    decay = tl.load(scalar + 7)
    # Without decay, a parameter that is not finite leaves the update alone.
    return tl.where(decay != 0, u - p * decay, u)


@triton.jit
def words_of(
    keys,
    first,
    start,
    offsets,
    highs,
    NUMBER: tl.constexpr,
    WANTED: tl.constexpr,
    CROSSES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A random word for each element of the tile at ``start`` of a tensor whose first element has the index ``first``;
    zeros unless WANTED."""
    if not WANTED:
        return tl.zeros(offsets.shape, tl.uint32)
    else:
        low = ((first + start) & 0xFFFFFFFF).to(tl.uint32)
        index = low + offsets.to(tl.uint32)
        high = ((first + start) >> 32) - (first >> 32)
        first_key, second_key = load_keys(keys + (high * WORDS + NUMBER) * 2)
        if CROSSES:
            next_high = tl.minimum(high + 1, highs - 1)
            next_first, next_second = load_keys(keys + (next_high * WORDS + NUMBER) * 2)
            first_key = tl.where(index < low, next_first, first_key)
            second_key = tl.where(index < low, next_second, second_key)
        return random_word(index, first_key, second_key)


@triton.jit
def load_keys(at):
    """The two keys of a stream, as uint32."""
    return tl.load(at).to(tl.uint32, bitcast=True), tl.load(at + 1).to(tl.uint32, bitcast=True)


@triton.jit
def sums_of(mask, u, e, e_hi, g, v, moved_v, beta2):
    """``eager._sums`` of one tile: float64 [SUMS]."""
    wanted = mask & (u != 0)
    decaying = mask & (v > 0) & (tl.abs((v * beta2 + (g * g) * (1.0 - beta2)) - v) > 0)
    sums = column(0, tl.where(mask, e * u, 0.0)) + column(1, tl.where(mask, e_hi * u, 0.0))
    sums += column(2, tl.where(mask, u * u, 0.0))
    sums += column(3, wanted) + column(4, wanted & (e == 0)) + column(5, wanted & (e_hi == 0))
    return sums + column(6, decaying) + column(7, decaying & (moved_v == 0))


@triton.jit
def column(NUMBER: tl.constexpr, terms):
    """The total of the terms in one column of a row of sums."""
    return tl.where(tl.arange(0, SUMS) == NUMBER, tl.sum(terms.to(tl.float64)), 0.0)


@triton.jit(do_not_specialize=["count", "tiles"])
def sums_kernel(sums, partials, shapes, scalars, count: tl.int64, tiles: tl.int64, LINES: tl.constexpr):
    """Adds up the tiles of one tensor, in an order that depends on their number alone; zeros if the step was skipped.

    Args:
        sums: float64 [count, SUMS], written.
        partials: float64 [tiles, SUMS].
    """
    tensor = tl.program_id(0).to(tl.int64)
    line = tl.load(shapes + tensor * 3 + 2)
    end = tl.load(shapes + tensor * 3 + 5, mask=tensor + 1 < count, other=tiles)
    end = tl.where(tl.load(scalars + tensor * SCALARS + 8) != 0, line, end)
    columns = tl.arange(0, SUMS)
    total = tl.zeros([LINES, SUMS], tl.float64)
    while line < end:
        lines = line + tl.arange(0, LINES)[:, None]
        total += tl.load(partials + lines * SUMS + columns[None, :], mask=lines < end, other=0.0)
        line += LINES
    tl.store(sums + tensor * SUMS + columns, tl.sum(total, 0))

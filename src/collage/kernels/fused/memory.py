"""Which elements a tile has, and how the kernels read and write its components, in Triton.

A tile is one-dimensional, or, where elements share a scale, has a block of them in each row; rows of COLUMNS, a power
of two, of which the first ENTRY are elements, and ``stride`` elements from one row to the next. A component's values
live as float32 that are numbers of its format, or as int32.
"""

# Triton's annotations are values, not types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from collage.kernels.fused.elements import bf16_number, bf16_pattern, e4m3_number, e4m3_pattern

# What a lo of float16 or of e4m3 is kept times, where it is kept scaled (``Expansion._factor``).
FACTOR = tl.constexpr(2.0**11)
FACTOR8 = tl.constexpr(2.0**4)


@triton.jit
def offsets_of(stride, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr):
    """Each element's place behind the tile's first one."""
    if ENTRY == 1:
        return tl.arange(0, SIZE)
    else:
        return tl.arange(0, SIZE // COLUMNS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def mask_of(start, end, stride, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of the tile's elements there are. Of a row there are all or none: a constant along it, the mask leaves
    accesses wide."""
    if ENTRY == 1:
        return start + tl.arange(0, SIZE) < end
    else:
        inside = row_mask(start, end, stride, SIZE, COLUMNS)
        if ENTRY == COLUMNS:
            return tl.broadcast_to(inside, [SIZE // COLUMNS, COLUMNS])
        else:
            return inside & (tl.arange(0, COLUMNS)[None, :] < ENTRY)


@triton.jit
def row_mask(start, end, stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of the tile's rows there are: those that begin before ``end``."""
    return start + tl.arange(0, SIZE // COLUMNS)[:, None] * stride < end


@triton.jit
def pointers(address, start, offsets, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to the elements of a tile. WIDE promises 16-byte alignment, without which no access is a wide one."""
    if FORMAT == "fp32":
        base = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == "fp16" or FORMAT == "scaled fp16":
        base = address.to(tl.pointer_type(tl.float16))
    elif FORMAT == "int8":
        base = address.to(tl.pointer_type(tl.int8))
    elif FORMAT == "bf16" or FORMAT == "int16":
        base = address.to(tl.pointer_type(tl.int16))
    else:
        base = address.to(tl.pointer_type(tl.uint8))
    if WIDE:
        base = tl.multiple_of(base, 16)
        start = tl.multiple_of(start, 8 if FORMAT == "nibbles" else 16)
    return base + start + offsets


@triton.jit
def load(
    address, start, end, stride, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of a component: float32, or int32 for integers; 0 where there is no element."""
    where = pointers(address, start, offsets_of(stride, SIZE, ENTRY, COLUMNS), FORMAT, WIDE)
    if WIDE and ENTRY == 1:
        x = tl.load(where)
    else:
        x = tl.load(where, mask=mask_of(start, end, stride, SIZE, ENTRY, COLUMNS), other=0)
    if FORMAT == "bf16":
        return bf16_number(x)
    elif FORMAT == "scaled fp16":
        return x.to(tl.float32) * (1.0 / FACTOR)
    elif FORMAT == "fp16" or FORMAT == "fp32":
        return x.to(tl.float32)
    elif FORMAT == "e4m3fn":
        return e4m3_number(x.to(tl.int32))
    elif FORMAT == "scaled e4m3fn":
        return e4m3_number(x.to(tl.int32)) * (1.0 / FACTOR8)
    elif FORMAT == "twice scaled e4m3fn":
        return e4m3_number(x.to(tl.int32)) * (1.0 / (FACTOR8 * FACTOR8))
    else:
        return x.to(tl.int32)


@triton.jit
def store(
    address, start, end, stride, x, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The opposite of :func:`load`."""
    where = pointers(address, start, offsets_of(stride, SIZE, ENTRY, COLUMNS), FORMAT, WIDE)
    if FORMAT == "bf16":
        x = bf16_pattern(x)
    elif FORMAT == "scaled fp16":
        x = (x * FACTOR).to(tl.float16)
    elif FORMAT == "fp16":
        x = x.to(tl.float16)
    elif FORMAT == "int16":
        x = x.to(tl.int16)
    elif FORMAT == "int8":
        x = x.to(tl.int8)
    elif FORMAT == "e4m3fn":
        x = e4m3_pattern(x).to(tl.uint8)
    elif FORMAT == "scaled e4m3fn":
        x = e4m3_pattern(x * FACTOR8).to(tl.uint8)
    elif FORMAT == "twice scaled e4m3fn":
        x = e4m3_pattern(x * (FACTOR8 * FACTOR8)).to(tl.uint8)
    elif FORMAT != "fp32":
        x = x.to(tl.uint8)
    if WIDE and ENTRY == 1:
        tl.store(where, x)
    else:
        tl.store(where, x, mask=mask_of(start, end, stride, SIZE, ENTRY, COLUMNS))


# ---- two elements in a byte ------------------------------------------------------------------------------------------


@triton.jit
def load_nibbles(
    address, start, end, stride, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """``unpack_nibbles`` of a tile: int32 in [-8, 8). ``start`` and ``end`` are even, or ENTRY and ``stride`` are."""
    if ENTRY == 1:
        both = load(address, start // 2, end // 2, 1, SIZE // 2, 1, 1, "nibbles", WIDE)
        nibbles = tl.reshape(tl.join(both & 15, both >> 4), [SIZE])
    else:
        both = load(address, start // 2, end // 2, stride // 2, SIZE // 2, ENTRY // 2, COLUMNS // 2, "nibbles", WIDE)
        nibbles = tl.reshape(tl.join(both & 15, both >> 4), [SIZE // COLUMNS, COLUMNS])
    return (nibbles ^ 8) - 8


@triton.jit
def store_nibbles(
    address, start, end, stride, x, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """``pack_nibbles``: the opposite of :func:`load_nibbles`."""
    if ENTRY == 1:
        low, high = tl.split(tl.reshape(x & 15, [SIZE // 2, 2]))
        store(address, start // 2, end // 2, 1, low | (high << 4), SIZE // 2, 1, 1, "nibbles", WIDE)
    else:
        low, high = tl.split(tl.reshape(x & 15, [SIZE // COLUMNS, COLUMNS // 2, 2]))
        store(
            address, start // 2, end // 2, stride // 2, low | (high << 4), SIZE // 2, ENTRY // 2, COLUMNS // 2,
            "nibbles", WIDE,
        )  # fmt: skip


# ---- a number per row ------------------------------------------------------------------------------------------------


@triton.jit
def scales_at(
    address, start, stride, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Pointers to the scales of a tile's rows: [rows, 1]."""
    rows = tl.arange(0, SIZE // COLUMNS)[:, None]
    return address.to(tl.pointer_type(KIND)) + start // ENTRY + rows * (stride // ENTRY)


@triton.jit
def load_scales(
    address, start, end, stride, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """The scales of a tile's rows, of the type KIND: [rows, 1]."""
    where = scales_at(address, start, stride, SIZE, ENTRY, COLUMNS, KIND)
    return tl.load(where, mask=row_mask(start, end, stride, SIZE, COLUMNS), other=0)


@triton.jit
def store_scales(
    address, start, end, stride, x, SIZE: tl.constexpr, ENTRY: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """The opposite of :func:`load_scales`."""
    where = scales_at(address, start, stride, SIZE, ENTRY, COLUMNS, KIND)
    tl.store(where, x.to(KIND), mask=row_mask(start, end, stride, SIZE, COLUMNS))


# ---- the components of a role ----------------------------------------------------------------------------------------


@triton.jit
def load_parts(
    at, start, end, stride, exponent, STORED: tl.constexpr, SIZE: tl.constexpr, ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The two components of a role, the first one twice where there is one; before a remainder, the pattern. Of a role
    in tiles three numbers, and the exponents of the rows or, where tiles are higher, ``exponent``."""
    PATTERN: tl.constexpr = "int8" if STORED[1] == "e4m3fn" else "int16"
    FIRST: tl.constexpr = PATTERN if STORED[0] == "remainder" else STORED[1]
    SECOND: tl.constexpr = STORED[2]
    THIRD: tl.constexpr = STORED[5]
    first = load(at[0], start, end, stride, SIZE, ENTRY, COLUMNS, FIRST, WIDE)
    if SECOND == "":
        second = first
    elif SECOND == "scale":
        second = load_scales(at[1], start, end, stride, SIZE, ENTRY, COLUMNS, tl.float32)
    elif SECOND == "nibbles":
        second = load_nibbles(at[1], start, end, stride, SIZE, ENTRY, COLUMNS, WIDE)
    else:
        second = load(at[1], start, end, stride, SIZE, ENTRY, COLUMNS, SECOND, WIDE)
    if STORED[6] == 0:
        return first, second
    else:
        third = first
        if THIRD != "":
            third = load(at[2], start, end, stride, SIZE, ENTRY, COLUMNS, THIRD, WIDE)
        if STORED[6] == 1:
            exponent = load_scales(at[3], start, end, stride, SIZE, ENTRY, COLUMNS, tl.uint8).to(tl.int32)
        return first, second, third, exponent


@triton.jit
def store_parts(
    at, start, end, stride, parts, STORED: tl.constexpr, SIZE: tl.constexpr, ENTRY: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The opposite of :func:`load_parts`, but for the exponent of a tile of several rows, which stays as it is."""
    PATTERN: tl.constexpr = "int8" if STORED[1] == "e4m3fn" else "int16"
    FIRST: tl.constexpr = PATTERN if STORED[0] == "remainder" else STORED[1]
    SECOND: tl.constexpr = STORED[2]
    THIRD: tl.constexpr = STORED[5]
    store(at[0], start, end, stride, parts[0], SIZE, ENTRY, COLUMNS, FIRST, WIDE)
    if SECOND == "scale":
        store_scales(at[1], start, end, stride, parts[1], SIZE, ENTRY, COLUMNS, tl.float32)
    elif SECOND == "nibbles":
        store_nibbles(at[1], start, end, stride, parts[1], SIZE, ENTRY, COLUMNS, WIDE)
    elif SECOND != "":
        store(at[1], start, end, stride, parts[1], SIZE, ENTRY, COLUMNS, SECOND, WIDE)
    if THIRD != "":
        store(at[2], start, end, stride, parts[2], SIZE, ENTRY, COLUMNS, THIRD, WIDE)
    if STORED[6] == 1:
        store_scales(at[3], start, end, stride, parts[3], SIZE, ENTRY, COLUMNS, tl.uint8)


@triton.jit
def alignment(at, STORED: tl.constexpr):
    """Bits of the addresses of which wide accesses are made: not those of scales."""
    if STORED[2] == "scale":
        return at[0]
    else:
        return at[0] | at[1]

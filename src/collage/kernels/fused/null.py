"""A Triton kernel that reads and writes what a step does and changes nothing: the bandwidth that a step could have."""

# Triton's annotations are values, not types.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["zero", "read_write_blocks", "read_only_blocks"])
def null_kernel(
    read_write,
    read_write_owners,
    read_only,
    read_only_owners,
    read_write_blocks: tl.int64,
    read_only_blocks: tl.int64,
    zero: tl.int32,
    BYTES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Writes one block back as it was, after reading its share of what is only read.

    Args:
        read_write, read_only: int64 [tensors, 3]: address, bytes, number of the first block.
        read_write_owners, read_only_owners: int32 [blocks]: each block's tensor.
        zero: 0, which the compiler does not know: all that was read could decide what is written.
        BYTES: of a block.
        PIECE: bytes at a time where a block is not whole or not aligned.
    """
    block = tl.program_id(0).to(tl.int64)
    seen = tl.zeros([BYTES // 4], tl.int32)
    other = block
    while other < read_only_blocks:
        address, length = place(read_only, read_only_owners, other, BYTES)
        if ((address & 15) == 0) & (length >= BYTES):
            seen ^= tl.load(words_at(address, BYTES // 4))
        else:
            end = address + tl.minimum(length, BYTES)
            while address < end:
                pointers, mask = bytes_at(address, end, PIECE)
                seen ^= tl.sum(tl.load(pointers, mask=mask, other=0).to(tl.int32), 0)
                address += PIECE
        other += read_write_blocks
    address, length = place(read_write, read_write_owners, block, BYTES)
    if ((address & 15) == 0) & (length >= BYTES):
        pointers = words_at(address, BYTES // 4)
        tl.store(pointers, tl.load(pointers) ^ (seen & zero))
    else:
        change = (tl.max(seen, 0) & zero).to(tl.int8)
        end = address + tl.minimum(length, BYTES)
        while address < end:
            pointers, mask = bytes_at(address, end, PIECE)
            tl.store(pointers, tl.load(pointers, mask=mask, other=0) ^ change, mask=mask)
            address += PIECE


@triton.jit
def place(tensors, owners, block, BYTES: tl.constexpr):
    """Address of a block, and the bytes of its tensor from there on."""
    row = tensors + tl.load(owners + block).to(tl.int64) * 3
    start = (block - tl.load(row + 2)) * BYTES
    return tl.load(row) + start, tl.load(row + 1) - start


@triton.jit
def words_at(address, WORDS: tl.constexpr):
    """Pointers to an aligned block, as int32."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + tl.arange(0, WORDS)


@triton.jit
def bytes_at(address, end, PIECE: tl.constexpr):
    """Pointers to PIECE bytes, and which of them lie before ``end``."""
    offsets = tl.arange(0, PIECE)
    return address.to(tl.pointer_type(tl.int8)) + offsets, offsets < end - address

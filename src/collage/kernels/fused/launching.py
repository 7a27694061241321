"""The host's side of the Triton step. Imports triton; :mod:`collage.kernels.fused` imports this when first needed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from collage.kernels.contract import SUMS, Batch, Inputs
from collage.kernels.fused.advance import advance_kernel
from collage.kernels.fused.forms import Stored, all_stored, block_of
from collage.kernels.fused.null import null_kernel
from collage.kernels.fused.tables import Tables
from collage.kernels.fused.tiles import read_kernel, round_kernel, tile_kernel
from collage.kernels.fused.update import step_kernel, sums_kernel
from collage.kernels.looking import look
from collage.numerics import format_of
from collage.storage import Tiled, TiledTensor
from collage.storage.tensor import new_parts

# Elements of a tile: with 4 warps, 8 per thread, which is one access of 16 bytes to a 16-bit component.
TILE = 1024
# Rows of a parameter in tiles that a program takes at a time.
SLAB_ROWS = 16
# How many times fewer they are where rows do not begin at multiples of 16 bytes.
NARROWER = 4
# Tensors that one program advances, and lines of partial sums that one adds up at a time.
ROWS = 128
# Bytes of a block of the null step.
NULL_BYTES = 8192
WARP = 32


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """The one place that launches. Without fused multiply-adds, which round once where the definition rounds twice."""
    kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


def step(batch: Batch, inputs: Inputs) -> Tensor | None:
    """See :func:`collage.kernels.fused.step`."""
    count = len(batch.params)
    if count == 0:
        return torch.zeros(0, len(SUMS), dtype=torch.float64) if inputs.audit else None
    with _on(batch.steps.device):
        tables = _tables(batch)
        grads, seen = inputs.grads, inputs.addresses
        if seen is None:
            grads = _of_one_dtype(grads)
            seen = look(grads).addresses
        addresses = tables.addresses(seen)
        _advance(batch, inputs, tables)
        partials = tables.partials() if inputs.audit else None
        scale = None if inputs.grad_scale is None else inputs.grad_scale.to(tables.device, torch.float32)
        args = (addresses, tables.shapes, tables.owners, tables.scalars, tables.keys, tables.powers, partials, scale)
        constants = {
            **_described(tables.stored),
            "GRAD": format_of(grads[0]).name,
            "MAXIMIZE": inputs.hyper.maximize,
            "AUDIT": inputs.audit,
            "WORDS": tables.words,
            "ENTRY": tables.entry,
            "COLUMNS": _columns(tables.entry),
        }
        if tables.tiles and batch.layout.param.borne:
            _step_tiles(batch, tables, args, constants)
        elif tables.tiles:
            warps = _warps(tables.stored)
            launch(
                step_kernel,
                tables.tiles,
                *args,
                tables.highs,
                CROSSES=tables.highs > 1,
                SIZE=TILE,
                PIECE=warps * WARP,
                num_warps=warps,
                **constants,
            )
        if partials is None:
            return None
        sums = torch.empty(count, len(SUMS), dtype=torch.float64, device=tables.device)
        args = (sums, partials, tables.shapes, tables.scalars, count, tables.tiles)
        launch(sums_kernel, count, *args, LINES=ROWS)
        return sums


def _step_tiles(batch: Batch, tables: Tables, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    form = batch.layout.param
    assert isinstance(form, Tiled)
    wide = tables.aligned and _wide_rows(form)
    # Elements one by one take more registers.
    rows = SLAB_ROWS if wide else SLAB_ROWS // NARROWER
    size = min(_columns(tables.rows), rows) * constants["COLUMNS"]
    launch(
        tile_kernel,
        tables.tiles,
        *args,
        tables.highs,
        form.width,
        SIZE=size,
        ROWS=tables.rows,
        WIDE=wide,
        num_warps=_slab_warps(size if wide else size * NARROWER),
        **constants,
    )


def read(tensor: TiledTensor, stored: Stored) -> Tensor:
    """See :func:`collage.kernels.fused.read`."""
    out = torch.empty(tensor.hi.shape, dtype=torch.bfloat16, device=tensor.hi.device)
    read = (stored.first, stored.second, stored.third)
    numbers = [part for part, each in zip(tensor.parts, read, strict=False) if each]
    addresses = (*(part.data_ptr() for part in numbers), 0, 0)[:3]
    args = (*addresses, tensor.scale.data_ptr(), out.data_ptr())
    _launch_slabs(read_kernel, args, [*numbers, out], tensor.form, PARAM=tuple(stored))
    return out


def round_rows(x: Tensor, form: Tiled, described: Stored) -> list[Tensor]:
    """See :func:`collage.kernels.fused.round_rows`."""
    codes, scale = new_parts(form, x.shape, x.device)
    args = (x.data_ptr(), codes.data_ptr(), scale.data_ptr())
    _launch_slabs(round_kernel, args, [x, codes], form, STORED=tuple(described))
    return [codes, scale]


def _launch_slabs(
    kernel: Any, addresses: tuple[int, ...], tensors: list[Tensor], form: Tiled, **constants: Any
) -> None:
    """A program per slab of rows of one column of tiles. ``tensors`` have the elements, in rows of equal length."""
    rows, width = tensors[0].shape
    columns = _columns(form.columns)
    programs = -(-rows // SLAB_ROWS) * (width // form.columns)
    if not programs:
        return
    with _on(tensors[0].device):
        launch(
            kernel,
            programs,
            *addresses,
            rows * width,
            width,
            SIZE=SLAB_ROWS * columns,
            ENTRY=form.columns,
            COLUMNS=columns,
            WIDE=_wide_rows(form) and not any(tensor.data_ptr() % 16 for tensor in tensors),
            num_warps=_slab_warps(SLAB_ROWS * columns),
            **constants,
        )


def _slab_warps(size: int) -> int:
    """They give a thread 8 elements: 8 bytes of each component and 16 of bfloat16, which threads need not exchange."""
    return max(1, size // (8 * WARP))


def _wide_rows(form: Tiled) -> bool:
    """Whether each row of a tile begins at a multiple of 16 bytes if the tensor does."""
    return form.width % 16 == 0 and form.columns % 16 == 0


def null_step(read_write: Sequence[Tensor], read_only: Sequence[Tensor]) -> None:
    """See :func:`collage.kernels.fused.null_step`."""
    device = read_write[0].device
    with _on(device):
        written, written_owners = _streams(read_write)
        read, read_owners = _streams(read_only)
        blocks = len(written_owners)
        if blocks:
            args = (written, written_owners, read, read_owners, blocks, len(read_owners), 0)
            launch(null_kernel, blocks, *args, BYTES=NULL_BYTES, PIECE=512)


def _tables(batch: Batch) -> Tables:
    """The batch's tables, made at its first step."""
    tables = batch.kept.get("triton")
    if tables is None:
        stored = all_stored(batch.layout, batch.params[0].dtype)
        if stored is None:
            raise ValueError(
                f"the Triton kernels do not serve {batch.layout} with parameters of {batch.params[0].dtype}; use "
                "backend='eager'"
            )
        entry = block_of(batch.layout)
        form = batch.layout.param
        if isinstance(form, Tiled):
            # Where each row has an exponent of its own, a program takes several rows.
            rows = form.rows if form.rows > 1 else SLAB_ROWS
            tables = Tables(batch, stored, entry, rows, rows * form.width, form.width // entry)
        else:
            tables = Tables(batch, stored, entry, 1, TILE // _columns(entry) * entry, 1)
        batch.kept["triton"] = tables
    return tables


def _described(stored: Sequence[Stored]) -> dict[str, tuple[Any, ...]]:
    return dict(zip(("PARAM", "EXP_AVG", "EXP_AVG_SQ"), map(tuple, stored), strict=True))


def _advance(batch: Batch, inputs: Inputs, tables: Tables) -> None:
    hyper = inputs.hyper
    numbers = (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
    launch(
        advance_kernel,
        -(-len(batch.params) // ROWS),
        batch.steps,
        tables.powers,
        tables.scalars,
        tables.keys,
        tables.ordinals,
        tables.shapes,
        inputs.lr,
        inputs.found_inf,
        len(batch.params),
        tables.highs,
        _signed(batch.seed),
        *(_pattern(number) for number in numbers),
        WORDS=tables.words,
        ROWS=ROWS,
    )


def _of_one_dtype(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients as they are, or where their dtypes differ all as float32, which is exact."""
    if len({grad.dtype for grad in grads}) == 1:
        return grads
    return [grad.to(torch.float32) for grad in grads]


def _warps(stored: Sequence[Stored]) -> int:
    """4 warps give a thread 8 elements: one 16-byte access of a 16-bit component. A 32-bit component has 4 elements in
    one, and storing it from another number per thread would go through shared memory."""
    return 8 if any("fp32" in (each.first, each.second) for each in stored) else 4


def _columns(entry: int) -> int:
    """The power of two not less than ``entry``."""
    return 1 << (entry - 1).bit_length()


def _pattern(number: float) -> int:
    """The bits of a float64 as an int64, since Triton passes a Python float as float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _signed(number: int) -> int:
    """The int64 with the lowest 64 bits of an integer."""
    low = number % 2**64
    return low - 2**64 if low >= 2**63 else low


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Lists of streams whose tables are kept.
KNOWN = 64
_known_streams: dict[tuple[tuple[int, int], ...], tuple[Tensor, Tensor]] = {}


def _streams(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Address, bytes and first block of each tensor, and the owner of each block; kept for as many lists
    of tensors as a benchmark has."""
    places = tuple((tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors)
    if places not in _known_streams:
        if len(_known_streams) >= KNOWN:
            del _known_streams[next(iter(_known_streams))]
        blocks = torch.tensor([-(-length // NULL_BYTES) for _, length in places], dtype=torch.int64)
        firsts = torch.cumsum(blocks, 0) - blocks
        rows = torch.tensor([(*place, first) for place, first in zip(places, firsts.tolist(), strict=True)])
        owners = torch.repeat_interleave(torch.arange(len(places), dtype=torch.int32), blocks)
        device = tensors[0].device if tensors else torch.device("cpu")
        _known_streams[places] = (rows.to(device, torch.int64), owners.to(device))
    return _known_streams[places]

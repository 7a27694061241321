"""The step on CPUs: the kernels of the library built from csrc/, called through ctypes, on torch's own threads."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from collage.kernels.contract import ROLES, SUMS, Batch, Inputs, Layout, Scalars
from collage.kernels.library import native_library
from collage.kernels.looking import look
from collage.numerics import E4M3FN, FP16, format_of
from collage.storage import Blockwise, Expansion, Kahan, Master, Remainder, Rounded, Storage, Tiled, TiledTensor
from collage.storage.tensor import READERS

# The columns of a row of scalars in csrc/job.h.
_SCALARS = tuple(field.name for field in fields(Scalars) if field.name != "bias_correction2_sqrt")
# COLLAGE_MIN_BLOCK, COLLAGE_MAX_BLOCK and COLLAGE_MAX_ROWS of csrc/job.h.
_LEAST_BLOCK, _LARGEST_BLOCK, _MOST_ROWS = 32, 128, 128
# Runtimes of OpenMP that torch may have loaded; each has the entry point that compilers call.
_RUNTIMES = ("libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.so.5")


class _Job(ctypes.Structure):
    """``collage_job`` of csrc/job.h."""

    _fields_ = [
        ("count", ctypes.c_int64),
        ("sizes", ctypes.c_void_p),
        ("firsts", ctypes.c_void_p),
        ("ordinals", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("scalar_rows", ctypes.c_void_p),
        ("scalars", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
        ("elements", ctypes.c_void_p),
        ("span", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("tile_rows", ctypes.c_int64),
        ("beta2", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("grad_scale", ctypes.c_float),
        ("scaled", ctypes.c_int32),
        ("maximize", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    ]


def unavailable() -> str:
    """Why the backend cannot run here, in plain words; empty if it can."""
    return native_library().missing


def devices() -> tuple[str, ...]:
    """The device types that the kernels serve."""
    return ("cpu",)


def instruction_sets() -> tuple[str, ...]:
    """Those of the library that this processor has, best first; empty without the library."""
    return native_library().isas


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Within it the kernels of one of :func:`instruction_sets` run, in place of the best. For tests and benchmarks."""
    library = native_library()
    if isa not in library.isas:
        raise ValueError(f"isa must be one of {', '.join(library.isas) or '(none here)'}, got {isa!r}")
    before, library.isa = library.isa, isa
    try:
        yield
    finally:
        library.isa = before


def serves(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this layout with parameters of ``dtype``."""
    return unavailable() == "" and _kernel(layout, dtype, dtype) is not None


def _kernel(layout: Layout, dtype: torch.dtype, grad: torch.dtype) -> int | None:
    """Its place in the library's tables, which are alike for every instruction set."""
    names = [_storage_name(storage, dtype) for _, storage in layout.roles]
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or None in names:
        return None
    blocks = set()
    for role, storage in layout.roles:
        if isinstance(storage, Blockwise):
            blocks.add(storage.block)
        if isinstance(storage, Tiled):
            blocks.add(storage.columns)
            if storage.rows > (_MOST_ROWS if role == "param" else 1):
                return None
    if len(blocks) > 1 or not all(_LEAST_BLOCK <= block <= _LARGEST_BLOCK for block in blocks):
        return None
    name = "/".join([format_of(dtype).name, *map(str, names), "own" if grad == dtype else "fp32"])
    library = native_library()
    if library.handle is None:
        return None
    place = library.handle.collage_find(library.isa.encode(), name.encode())
    return place if place >= 0 else None


def _storage_name(storage: Storage, dtype: torch.dtype) -> str | None:
    """What csrc/kernel.cpp calls a storage, or None if it has none of the kind."""
    if type(storage) is Tiled:
        kept = _storage_name(storage.of, dtype)
        return kept and f"tiled-{kept}{'-root' if storage.root else ''}"
    fmt = storage.format_for(dtype)
    own = fmt.dtype == dtype
    prefix = "" if own else f"{fmt.name}-"
    suffix = "-stochastic" if storage.stochastic else ""
    # A subclass has a store of its own.
    if type(storage) is Rounded:
        if own:
            return "stochastic" if suffix else "nearest"
        return f"{fmt.name}{suffix}"
    if type(storage) is Expansion:
        scaled = "-scaled" if storage.scaled and fmt in (FP16, E4M3FN) else ""
        return f"{prefix}expansion{'' if storage.n == 2 else storage.n}{scaled}{suffix}"
    if type(storage) is Remainder:
        # 16 bits drop nothing that could be rounded.
        return f"{prefix}remainder{storage.bits}{suffix if storage.bits < 16 else ''}"
    if type(storage) is Blockwise:
        return f"{storage.companding}{suffix}"
    if type(storage) in (Kahan, Master) and own:
        return type(storage).__name__.lower()
    return None


class _Prepared:
    """What stays the same from step to step of a batch."""

    def __init__(self, batch: Batch) -> None:
        dtype = batch.params[0].dtype
        columns: list[list[Tensor]] = []
        for role in ROLES:
            parts = [batch.layout.parts(role, p, s) for p, s in zip(batch.params, batch.states, strict=True)]
            columns += [list(column) for column in zip(*parts, strict=True)]
        self._layout, self._dtype = batch.layout, dtype
        self._kernels: dict[torch.dtype, int] = {}
        self.cells = [column[0].element_size() for column in columns]
        components = (each for _, storage in batch.layout.roles for each in storage.components(dtype))
        self.elements = array("i", (component.elements * component.rows for component in components))
        tiles = batch.layout.param
        self.span = batch.layout.block(dtype)
        self.tiles = (tiles.columns, tiles.width, tiles.rows) if isinstance(tiles, Tiled) else (self.span, 0, 0)
        self.parts = array("Q", (tensor.data_ptr() for column in columns for tensor in column))
        self.sizes = array("q", map(Tensor.numel, batch.params))
        self.firsts = array("Q", batch.firsts)
        self.ordinals = array("q", batch.ordinals)

    def kernel(self, grad: torch.dtype) -> int:
        """The kernel's place for gradients of this dtype."""
        if grad not in self._kernels:
            place = _kernel(self._layout, self._dtype, grad)
            assert place is not None, "the batch was made for another backend"
            self._kernels[grad] = place
        return self._kernels[grad]


def _count(steps: Tensor) -> tuple[array[int], array[int], list[int]]:
    """The numbers of this step, each tensor's row of scalars, and the number that each row is for."""
    least, most = map(int, steps.aminmax())
    if least == most:
        return array("q", [least + 1]) * len(steps), array("q", [0]) * len(steps), [least + 1]
    taken = steps.tolist()
    distinct = sorted(set(taken))
    row = {value: place for place, value in enumerate(distinct)}
    numbers = array("q", (int(value) + 1 for value in taken))
    return numbers, array("q", map(row.__getitem__, taken)), [int(value) + 1 for value in distinct]


def step(batch: Batch, inputs: Inputs) -> Tensor | None:
    """One AdamW step over all tensors of a batch, in place: :func:`collage.kernels.eager.step`, bit for bit.

    Raises:
        MemoryError: no memory for the sums of an audited step; nothing has changed.
    """
    library = native_library()
    assert library.handle is not None
    count = len(batch.params)
    sums = torch.zeros(count, len(SUMS), dtype=torch.float64, device="cpu") if inputs.audit else None
    if count == 0:
        return sums
    kept: _Prepared = batch.kept.get("native") or batch.kept.setdefault("native", _Prepared(batch))
    grad_dtype = inputs.grads[0].dtype
    cells = array("i", [*kept.cells, grad_dtype.itemsize])
    grads = look(inputs.grads).addresses if inputs.addresses is None else inputs.addresses
    numbers, rows, distinct = _count(batch.steps)
    scalars = array("f")
    for number in distinct:
        values = Scalars.of(inputs.hyper, number, "fp32")
        scalars.extend(getattr(values, name) for name in _SCALARS)
    job = _Job(
        count=count,
        sizes=_address(kept.sizes),
        firsts=_address(kept.firsts),
        ordinals=_address(kept.ordinals),
        steps=_address(numbers),
        scalar_rows=_address(rows),
        scalars=_address(scalars),
        parts=_address(kept.parts),
        grads=_address(grads),
        sums=None if sums is None else sums.data_ptr(),
        cells=_address(cells),
        elements=_address(kept.elements),
        span=kept.span,
        block=kept.tiles[0],
        width=kept.tiles[1],
        tile_rows=kept.tiles[2],
        beta2=inputs.hyper.beta2,
        seed=batch.seed & (2**64 - 1),
        grad_scale=1.0 if inputs.grad_scale is None else float(inputs.grad_scale),
        scaled=inputs.grad_scale is not None,
        maximize=inputs.hyper.maximize,
        threads=torch.get_num_threads(),
        parallel=_parallel(),
    )
    if library.handle.collage_step(library.isa.encode(), kept.kernel(grad_dtype), ctypes.byref(job)):
        raise MemoryError("no memory for the sums of an audited step; nothing has changed")
    batch.steps.add_(1.0)
    return sums


def read(tensor: TiledTensor) -> Tensor | None:
    """What a model reads of a parameter in tiles, as its components stand: bfloat16; None where no kernel serves it.
    One pass over its bytes."""
    form, library = tensor.form, native_library()
    kept = form.of if tensor.forward == "value" else Rounded(form.format)
    name = _storage_name(kept, torch.bfloat16)
    *numbers, scale = tensor.parts
    parts = [*(numbers if tensor.forward == "value" else numbers[:1]), scale]
    if library.handle is None or name is None or form.columns < _LEAST_BLOCK:
        return None
    if not all(part.is_contiguous() for part in parts):
        return None
    out, addresses = torch.empty(tensor.hi.shape, dtype=torch.bfloat16), array("Q", map(Tensor.data_ptr, parts))
    # How what is kept was rounded is nothing to a reader.
    failed = library.handle.collage_read(
        *(library.isa.encode(), name.removesuffix("-stochastic").encode()),
        *(_address(addresses), len(parts), out.data_ptr()),
        *(*tensor.hi.shape, form.rows, form.columns, torch.get_num_threads(), _parallel()),
    )
    return None if failed else out


READERS["cpu"] = read


def null_step(read_write: Sequence[Tensor], read_only: Sequence[Tensor]) -> None:
    """Reads every tensor once and writes those of ``read_write`` back unchanged, all in one pass: the time that the
    memory traffic of a step takes by itself. Contiguous CPU tensors with equally many elements."""
    library = native_library()
    if library.handle is None:
        raise RuntimeError(f"the native kernels cannot run here: {library.missing}")
    tensors = [*read_write, *read_only]
    streams = array("Q", map(Tensor.data_ptr, tensors))
    cells = array("i", (tensor.element_size() for tensor in tensors))
    library.handle.collage_null(
        *(library.isa.encode(), _address(streams), _address(cells), len(read_write), len(tensors)),
        *(tensors[0].numel(), 0, torch.get_num_threads(), _parallel()),
    )


def _address(values: array[int] | array[float]) -> int:
    return values.buffer_info()[0]


@cache
def _parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded, so that its threads serve; else None,
    and the calling thread does the work. A second pool would fight torch's, whose idle threads spin for a while."""
    for name in (None, *_RUNTIMES):
        try:
            runtime = ctypes.CDLL(name, mode=os.RTLD_NOW | getattr(os, "RTLD_NOLOAD", 0)) if name else ctypes.CDLL(None)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (AttributeError, OSError):
            continue
    return None

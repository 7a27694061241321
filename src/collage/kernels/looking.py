"""Facts about many tensors in one call: a step over thousands of small ones has no time for a call about each.

torch publishes C functions that read a tensor, for other libraries' use (DLPack's exchange table, from torch 2.10 on).
The library built from csrc/ calls them for a whole list; without table or library torch's own methods tell the same.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from collage.kernels.library import native_library

# Whose elements stand at their addresses; a subclass may compute them.
PLAIN = frozenset({Tensor, torch.nn.Parameter})


class Looks(NamedTuple):
    """What was seen of tensors, in their order; equal where nothing changed.

    Attributes:
        addresses: of their first elements; 0 where there are none.
        sizes: numbers of elements; -1 where they do not stand one after the other, or where the tensor's dtype or
            device is not that of the example.
        classes: all that the tensors are of.
    """

    addresses: array[int]
    sizes: array[int]
    classes: set[type]


def look(tensors: Sequence[Tensor], example: Tensor | None = None, records: array[int] | None = None) -> Looks:
    """Looks at tensors.

    Args:
        example: a plain tensor of the dtype and device that are wanted; None: any are.
        records: :func:`records` of these tensors, fetched ahead of the look: it then takes half as long where they are
            no longer in the cache. If a tensor's have moved since, it is waited for as without them.

    Raises:
        AttributeError, RuntimeError, TypeError: one is no tensor, or has no memory (sparse).
    """
    listed = tensors if isinstance(tensors, list) else list(tensors)
    classes, read = set(map(type, listed)), _reader()
    if read is not None and classes <= PLAIN:
        addresses, sizes = array("Q", bytes(8 * len(listed))), array("q", bytes(8 * len(listed)))
        known = None if example is None else id(example)
        ahead = records.buffer_info()[0] if records is not None and len(records) == 2 * len(listed) else None
        try:
            read(listed, len(listed), known, ahead, addresses.buffer_info()[0], sizes.buffer_info()[0])
            return Looks(addresses, sizes, classes)
        except (BufferError, RuntimeError):
            # DLPack has no word for a device such as "meta"; of a sparse tensor torch's methods say what it is.
            pass
    return look_by_methods(listed, example)


def records(tensors: Sequence[Tensor]) -> array[int] | None:
    """Where torch keeps what it knows of each tensor and of its storage; None unless all are plain."""
    if not set(map(type, tensors)) <= PLAIN:
        return None
    return array("Q", chain.from_iterable((tensor._cdata, tensor.untyped_storage()._cdata) for tensor in tensors))


def look_by_methods(tensors: list[Tensor], example: Tensor | None = None) -> Looks:
    """:func:`look` in torch's own methods, which defines it."""
    addresses = array("Q", list(map(Tensor.data_ptr, tensors)))
    sizes = array("q", (tensor.numel() if tensor.is_contiguous() else -1 for tensor in tensors))
    if example is not None:
        kind = (example.dtype, example.device)
        unlike = (place for place, tensor in enumerate(tensors) if (tensor.dtype, tensor.device) != kind)
        for place in unlike:
            sizes[place] = -1
    return Looks(addresses, sizes, set(map(type, tensors)))


class _Table(ctypes.Structure):
    """The head of ``DLPackExchangeAPI`` of dlpack.h, the same in every version 1.x."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("export", ctypes.c_void_p),
        ("take", ctypes.c_void_p),
        ("view", ctypes.c_void_p),
    ]


def _table() -> _Table | None:
    """torch's table, if it has one."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address_of = pointer(("PyCapsule_GetPointer", ctypes.pythonapi))
    return _Table.from_address(address_of(capsule, b"dlpack_exchange_api"))


@cache
def _reader() -> Callable[..., int] | None:
    """``collage_look`` of csrc/look.cpp with its first two arguments, or None where it cannot run."""
    locked, table = native_library().locked, _table()
    if locked is None or table is None or table.major != 1 or not table.view:
        return None
    item = ctypes.cast(ctypes.pythonapi.PyList_GetItem, ctypes.c_void_p)
    return partial(locked.collage_look, table.view, item)

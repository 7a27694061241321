"""The library built from csrc/: where it is, and what of it runs here.

It is built without a header of torch or Python: it gets addresses. One file of it serves every Python and every torch,
and holds its kernels once for each instruction set; the best one that the processor has is taken.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass
class Library:
    """The loaded library, or why there is none.

    Attributes:
        handle: its functions, None where there is none.
        locked: the same functions for calls that keep Python's lock, because they call back into Python.
        missing: why there is none; empty where there is one.
        isas: the instruction sets that run here, best first.
        isa: the one that is taken.
    """

    handle: ctypes.CDLL | None = None
    locked: ctypes.PyDLL | None = None
    missing: str = ""
    isas: tuple[str, ...] = ()
    isa: str = ""


def _find() -> Path | None:
    """The library beside this package; an editable install keeps it in a second folder of the package's path."""
    package = sys.modules[__package__ or "collage.kernels"]
    found = (Path(folder) / "_native.so" for folder in package.__path__)
    return next((path for path in found if path.is_file()), None)


@cache
def native_library() -> Library:
    """The library, loaded once."""
    path = _find()
    if path is None:
        return Library(
            missing="it was not built when torch-collage was installed, for want of a C++ compiler; install GCC or "
            "Clang, then torch-collage again from its sources"
        )
    try:
        handle, locked = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    except OSError as error:
        return Library(missing=f"its library cannot be loaded: {error}")
    names = (ctypes.c_char_p * 8)()
    isas = tuple(name.decode() for name in names[: handle.collage_isas(names, len(names))] if name)
    handle.collage_null.argtypes = [
        *(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_int64, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p),
    ]
    handle.collage_read.argtypes = [
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p),
    ]
    locked.collage_look.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.py_object, ctypes.c_int64, ctypes.c_void_p),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
    ]
    return Library(handle, locked, isas=isas, isa=isas[0])

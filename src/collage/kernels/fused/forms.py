"""Which storages the Triton kernels serve, and how each is described to them at compile time. Needs no triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from collage.kernels.contract import MOMENTS, ROLES, Layout
from collage.numerics import E4M3FN, format_of
from collage.storage import Blockwise, Expansion, Kahan, Master, Remainder, Rounded, Storage, Tiled


class Stored(NamedTuple):
    """How one role is stored: what ``storages.value_of``, ``parts_of``, ``exact`` and ``moved`` decide by.

    Attributes:
        kind: which of their branches.
        first: format of the leading component.
        second: format of the other component, or empty where there is none.
        stochastic: whether a store takes random bits.
        width: bits of a remainder, or elements of a block; else 0.
        third: format of a third component, or empty where there is none.
        height: rows that share an exponent, of numbers in tiles; else 0.
        root: whether the square root is what is kept, of numbers in tiles.
    """

    kind: str
    first: str
    second: str
    stochastic: bool
    width: int = 0
    third: str = ""
    height: int = 0
    root: bool = False


@dataclass(frozen=True)
class Form:
    """A row of the table of storages.

    Attributes:
        kind: see :class:`Stored`; empty where the storage's companding is the kind.
        roles: the roles it serves.
        formats: the formats of the leading component with which it serves them.
    """

    kind: str
    roles: tuple[str, ...] = ROLES
    formats: tuple[str, ...] = ("bf16", "fp16")


# Of parameters.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS: dict[type[Storage], Form] = {
    Rounded: Form("rounded", formats=("bf16", "fp16", "fp32")),
    Expansion: Form("expansion"),
    Kahan: Form("kahan", roles=("param",)),
    Master: Form("master", roles=("param",)),
    Remainder: Form("remainder", roles=("param",)),
    Blockwise: Form("", roles=MOMENTS, formats=("int8", "uint8")),
}
# Elements of a block, or of a tile's row: a row of a tile of 1024.
LARGEST_BLOCK = 128
_INTEGERS = {torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8"}


def stored(storage: Storage, role: str, dtype: torch.dtype) -> Stored | None:
    """The description of a role's storage for parameters of ``dtype``; None where the kernels do not serve it."""
    if type(storage) is Tiled:
        return _tiled(storage, role, dtype)
    form = FORMS.get(type(storage))
    components = storage.components(dtype)
    if form is None or role not in form.roles or len(components) > 2:
        return None
    first, *rest = (_INTEGERS.get(each.dtype) or format_of(each.dtype).name for each in components)
    second = rest[0] if rest else ""
    # Rounding float32 values to float32 stochastically would need its own definition of the discarded bits.
    if first not in form.formats or (storage.stochastic and first == "fp32"):
        return None
    kind, width = form.kind, 0
    if isinstance(storage, Expansion) and storage.scaled and second == "fp16":
        second = "scaled fp16"
    elif isinstance(storage, Remainder):
        width = storage.bits
        second = "nibbles" if width == 4 else second
    elif isinstance(storage, Blockwise):
        kind, second, width = storage.companding, "scale", storage.block
        if width > LARGEST_BLOCK:
            return None
    return Stored(kind, first, second, storage.stochastic, width)


def _tiled(storage: Tiled, role: str, dtype: torch.dtype) -> Stored | None:
    """Of numbers in tiles, which are those of a moment's row or a parameter's rows."""
    of, moment = storage.of, role != "param"
    numbers = len(of.components(dtype))
    if of.format != E4M3FN or type(of) not in (Rounded, Expansion, Remainder) or numbers > 3:
        return None
    if (moment and storage.rows > 1) or (storage.root and role != "exp_avg_sq") or storage.columns > LARGEST_BLOCK:
        return None
    rest = ("scaled e4m3fn", "twice scaled e4m3fn")[: numbers - 1]
    if isinstance(of, Remainder):
        if moment or of.bits not in (8, 16):
            return None
        rest, width = (f"int{of.bits}",), of.bits
    elif isinstance(of, Expansion) and not of.scaled:
        return None
    else:
        width = 0
    second, third = (*rest, "", "")[:2]
    kind = FORMS[type(of)].kind
    return Stored(kind, E4M3FN.name, second, storage.stochastic, width, third, storage.rows, storage.root)


def all_stored(layout: Layout, dtype: torch.dtype) -> tuple[Stored, ...] | None:
    """The descriptions of all roles, in the order of ROLES; None where one is not served, or blocks differ in size."""
    borne = layout.param.borne
    if dtype not in DTYPES or dtype != (torch.bfloat16 if borne else layout.param.components(dtype)[0].dtype):
        return None
    found = [stored(storage, role, dtype) for role, storage in layout.roles]
    served = [each for each in found if each is not None]
    if len(served) < len(found) or len(_row_lengths(layout)) > 1:
        return None
    # Moments in tiles go with a parameter in tiles alone.
    return tuple(served) if borne or not any(each.height for each in served) else None


@lru_cache(maxsize=256)
def read_stored(form: Tiled, forward: str) -> Stored | None:
    """The description of what a model reads of a parameter in tiles, with another ``forward`` than "value" of the
    leading numbers; None where the kernels do not serve it."""
    return stored(replace(form, of=Rounded(form.format)) if forward != "value" else form, "param", torch.bfloat16)


def _row_lengths(layout: Layout) -> set[int]:
    """Elements of the rows that have a scale, or of a tile."""
    blocks = {storage.block for _, storage in layout.roles if isinstance(storage, Blockwise)}
    return blocks | {storage.columns for _, storage in layout.roles if isinstance(storage, Tiled)}


def block_of(layout: Layout) -> int:
    """Elements of a row that share a scale; 1 where none do."""
    return max(_row_lengths(layout), default=1)

"""Which storages the Triton kernels serve, and how each is described to them at compile time. Needs no triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from collage.kernels.contract import MOMENTS, ROLES, Layout
from collage.numerics import format_of
from collage.storage import Blockwise, Expansion, Kahan, Master, Remainder, Rounded, Storage


class Stored(NamedTuple):
    """How one role is stored: what ``storages.value_of``, ``parts_of``, ``exact`` and ``moved`` decide by.

    Attributes:
        kind: which of their branches.
        first: format of the leading component.
        second: format of the other component, or empty where there is none.
        stochastic: whether a store takes random bits.
        width: bits of a remainder, or elements of a block; else 0.
    """

    kind: str
    first: str
    second: str
    stochastic: bool
    width: int = 0


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
# Elements of a block: a row of a tile of 1024.
LARGEST_BLOCK = 128
_INTEGERS = {torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8"}


def stored(storage: Storage, role: str, dtype: torch.dtype) -> Stored | None:
    """The description of a role's storage for parameters of ``dtype``; None where the kernels do not serve it."""
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


def all_stored(layout: Layout, dtype: torch.dtype) -> tuple[Stored, ...] | None:
    """The descriptions of all roles, in the order of ROLES; None where one is not served, or blocks differ in size."""
    if dtype not in DTYPES or layout.param.components(dtype)[0].dtype != dtype:
        return None
    found = [stored(storage, role, dtype) for role, storage in layout.roles]
    served = [each for each in found if each is not None]
    sizes = {each.width for each in served if each.second == "scale"}
    return tuple(served) if len(served) == len(found) and len(sizes) <= 1 else None


def block_of(stored: Sequence[Stored]) -> int:
    """Elements that share a scale; 1 where none do."""
    return max(each.width if each.second == "scale" else 1 for each in stored)

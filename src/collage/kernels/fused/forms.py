"""Which storages the Triton kernels serve, and how each is described to them at compile time. Needs no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from collage.kernels.contract import ROLES, Layout
from collage.numerics import format_of
from collage.storage import Expansion, Kahan, Master, Rounded, Storage


class Stored(NamedTuple):
    """How one role is stored: what ``elements.value_of``, ``parts_of``, ``exact`` and ``moved`` decide by.

    Attributes:
        kind: which of their branches.
        first: format of the leading component.
        second: format of the other component, or empty where there is none.
        stochastic: whether a store takes random bits.
    """

    kind: str
    first: str
    second: str
    stochastic: bool


@dataclass(frozen=True)
class Form:
    """A row of the table of storages.

    Attributes:
        kind: see :class:`Stored`.
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
}


def stored(storage: Storage, role: str, dtype: torch.dtype) -> Stored | None:
    """The description of a role's storage for parameters of ``dtype``; None where the kernels do not serve it."""
    form = FORMS.get(type(storage))
    components = storage.components(dtype)
    if form is None or role not in form.roles or len(components) > 2:
        return None
    first, *rest = (format_of(component.dtype).name for component in components)
    # Rounding float32 values to float32 stochastically would need its own definition of the discarded bits.
    if first not in form.formats or (storage.stochastic and first == "fp32"):
        return None
    return Stored(form.kind, first, rest[0] if rest else "", storage.stochastic)


def all_stored(layout: Layout, dtype: torch.dtype) -> tuple[Stored, ...] | None:
    """The descriptions of all roles, in the order of ROLES; None where one is not served."""
    if dtype not in DTYPES or layout.param.components(dtype)[0].dtype != dtype:
        return None
    found = [stored(storage, role, dtype) for role, storage in layout.roles]
    served = [each for each in found if each is not None]
    return tuple(served) if len(served) == len(found) else None

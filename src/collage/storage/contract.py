"""What every storage promises.

A storage keeps a logical tensor (a parameter, a moment) in one or more *components*: ordinary tensors. The step loads
the logical values as float32, applies its rule, and stores what came out; nothing above this floor knows what the
components mean. All methods work on flat pieces as well as on whole tensors, so that the step can go through a large
tensor piece by piece on kept buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from collage.numerics import Format, format_of

Parts = Sequence[Tensor]
FormatLike = Format | torch.dtype | str | None


@dataclass(frozen=True)
class Component:
    """One tensor of a storage.

    Attributes:
        name: its name in ``optimizer.state``, with ``{role}`` for the logical tensor's own name (``param``,
            ``exp_avg``, ``exp_avg_sq``). The leading component of a parameter is the parameter itself and stands in no
            state.
        dtype: its torch dtype.
        elements: how many consecutive elements of a row one entry serves (1, or the size of a block).
        rows: how many rows it serves: 1, or the height of a tile; a tensor's last tiles may be less high.
        width: elements of a row where the entries are of tiles, of which whole rows are stepped together.
    """

    name: str
    dtype: torch.dtype
    elements: int = 1
    rows: int = 1
    width: int = 0

    @property
    def bytes_per_element(self) -> float:
        """Bytes that one element of the logical tensor takes in this component."""
        return self.dtype.itemsize / (self.elements * self.rows)

    @property
    def span(self) -> int:
        """Consecutive elements of the tensor that are stepped together: a block, or a row of tiles."""
        return self.rows * self.width if self.width else self.elements

    def shape(self, whole: torch.Size) -> tuple[int, ...]:
        """Its shape for a logical tensor of the shape ``whole``: the same, or [rows of entries, entries of a row], so
        that it is sharded along the first dimension as the tensor is."""
        if self.elements == 1:
            return tuple(whole)
        return (-(-whole[0] // self.rows), row_length(whole) // self.elements)

    def cut(self, part: Tensor, start: int, end: int) -> Tensor:
        """The entries, flat, of a tensor's elements from ``start`` to ``end``: whole spans, but for a tensor's end."""
        entries = self.width // self.elements if self.width else 1
        return part.view(-1)[start // self.span * entries : -(-end // self.span) * entries]


class Storage(ABC):
    """Loads a logical tensor from its components as float32 and stores it back. Each storage is a frozen dataclass.

    Attributes:
        format: format of the components (a dtype or a format's name will do), or None for the parameter's own.
    """

    format: FormatLike

    def __post_init__(self) -> None:
        if self.format is not None:
            object.__setattr__(self, "format", format_of(self.format))

    def format_for(self, dtype: torch.dtype) -> Format:
        """The format in force for parameters of ``dtype``."""
        return format_of(dtype if self.format is None else self.format)

    @abstractmethod
    def components(self, dtype: torch.dtype) -> tuple[Component, ...]:
        """The components, leading one first, for parameters of ``dtype``."""

    @property
    def borne(self) -> bool:
        """Whether a parameter bears all components itself (:class:`collage.storage.TiledTensor`): none of them stands
        in ``optimizer.state``, and the parameter's own dtype is none of theirs."""
        return False

    def param_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter that is kept so, where ``dtype`` is wanted.

        Raises:
            ValueError: it cannot be kept so.
        """
        return self.components(dtype)[0].dtype

    def seen(self, parts: Parts) -> Tensor:
        """What a model reads of a parameter that these components keep: float64."""
        return parts[0].to(torch.float64)

    @property
    def stochastic(self) -> bool:
        """Whether a store takes random bits."""
        return False

    @property
    def has_working_arithmetic(self) -> bool:
        """Whether the arithmetic that rounds every operation to the format is defined for this storage."""
        return False

    def fitted(self, shape: torch.Size) -> Storage | None:
        """This storage for logical tensors of ``shape``, or None if it cannot keep such tensors."""
        return self

    def bytes_per_element(self, dtype: torch.dtype) -> float:
        """Bytes per element of the logical tensor, over all components."""
        return sum(component.bytes_per_element for component in self.components(dtype))

    def state_names(self, role: str, dtype: torch.dtype) -> tuple[str, ...]:
        """Names of all components in ``optimizer.state``; the first is the parameter itself where role is "param"."""
        return tuple(component.name.format(role=role) for component in self.components(dtype))

    def clear(self, parts: Parts) -> None:
        """Makes fresh components hold zeros."""
        for part in parts:
            part.zero_()

    @abstractmethod
    def load(self, parts: Parts, out: Tensor) -> Tensor:
        """Writes the logical values into ``out`` (float32, the parts' shape) and returns it: one rounding at most."""

    @abstractmethod
    def store(self, value: Tensor, parts: Parts, bits: Tensor | None, scratch: Tensor) -> None:
        """Stores float32 values in place.

        Args:
            value: float32; its contents are lost.
            parts: the components, overwritten.
            bits: int32 in [0, 2**16) where the storage is stochastic, else None (then: to nearest). May be lost.
            scratch: float32 of the same shape.
        """

    @abstractmethod
    def exact(self, parts: Parts) -> Tensor:
        """The value that the components hold together, as a new float64 tensor."""

    def add(self, parts: Parts, value: Tensor, update: Tensor, bits: Tensor | None, scratch: Tensor) -> None:
        """Adds ``update`` to the stored ``value`` (as loaded, float32; both are lost)."""
        self.store(value.add_(update), parts, bits, scratch)

    def moved(self, new: Parts, old: Parts) -> Tensor:
        """How far the stored value went between two sets of components: float64, not zero if any of it changed."""
        return self.exact(new) - self.exact(old)

    def working_add(self, parts: Parts, update: Tensor) -> None:
        """Adds ``update``, a tensor of the format, with every operation rounded to the format."""
        raise TypeError(f"{self!r} has no arithmetic of its own format; use arithmetic='fp32'")

    def working_average(self, parts: Parts, beta: float, addend: Tensor) -> None:
        """``value = beta * value + addend``, with every operation rounded to the format."""
        raise TypeError(f"{self!r} has no arithmetic of its own format; use arithmetic='fp32'")


def row_length(shape: torch.Size) -> int:
    """Elements of a row: of everything behind the first dimension. A tensor of one dimension is one column; its rows
    hold one element."""
    return prod(shape[1:])


def operand(part: Tensor) -> Tensor:
    """A component as an operand beside float32: torch promotes 16-bit dtypes by itself, 8-bit ones not at all."""
    return part.to(torch.float32) if part.dtype.itemsize == 1 else part


def check_rounding(rounding: str) -> None:
    """Raises ValueError unless ``rounding`` is one of the two there are."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")

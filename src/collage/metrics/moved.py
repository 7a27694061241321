"""Two checkpoints of a training side by side: which tensors moved between them, by layer kind.

This is what is left of the audit where the training is over: no intended update is known, only what came of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Elements that are compared at a time, in float64.
PIECE = 1 << 20
KINDS = ("norm gains", "biases", "embeddings", "attention", "mlp", "other weights")
# Of a kind's elements, how many must not have moved for a line in the verdict.
_UNCHANGED = 0.5


@dataclass(frozen=True)
class Moved:
    """What one tensor did.

    Attributes:
        name: its name.
        kind: one of :data:`KINDS`.
        dtype: of the second checkpoint's.
        elements: its number of elements.
        unchanged: of these, how many are the same number in both.
        squares: sum of the squared differences.
        norm: Euclidean norm in the first checkpoint.
        ones: whether every element is exactly 1 in both, as fresh norm gains are.
    """

    name: str
    kind: str
    dtype: str
    elements: int
    unchanged: int
    squares: float
    norm: float
    ones: bool

    @property
    def still(self) -> bool:
        """Whether no element moved."""
        return self.unchanged == self.elements

    @property
    def displacement(self) -> float:
        """Euclidean norm of the difference."""
        return self.squares**0.5


@dataclass(frozen=True)
class Difference:
    """Two checkpoints compared.

    Attributes:
        tensors: those that both have with one shape.
        only_first, only_second: names that one of them has.
        reshaped: names whose shapes differ.
    """

    tensors: list[Moved]
    only_first: list[str]
    only_second: list[str]
    reshaped: list[str]

    def kinds(self) -> dict[str, list[Moved]]:
        """The tensors of each kind that there is, in the order of :data:`KINDS`."""
        found = {kind: [each for each in self.tensors if each.kind == kind] for kind in KINDS}
        return {kind: each for kind, each in found.items() if each}

    def to_json(self) -> dict[str, Any]:
        """Plain types: the verdict, the sums of each kind, every tensor."""
        tensors = [asdict(each) | {"displacement": each.displacement} for each in self.tensors]
        return {
            "verdict": self.verdict(),
            "kinds": {kind: summed(each) for kind, each in self.kinds().items()},
            "tensors": [{key: value for key, value in each.items() if key != "squares"} for each in tensors],
            "only_first": self.only_first,
            "only_second": self.only_second,
            "reshaped": self.reshaped,
        }

    def verdict(self) -> list[str]:
        """In plain words, a line for each kind that stands still."""
        if not self.tensors:
            return ["the two have no tensor in common"]
        if all(each.still for each in self.tensors):
            return ["nothing moved: the two hold the same weights"]
        lines = [line for kind, each in self.kinds().items() if (line := _stands(kind, each)) is not None]
        return lines or ["every kind of layer moved"]


def summed(tensors: list[Moved]) -> dict[str, Any]:
    """The figures of some tensors together."""
    elements = sum(each.elements for each in tensors)
    unchanged, norm = sum(each.unchanged for each in tensors), sum(each.norm**2 for each in tensors) ** 0.5
    displacement = sum(each.squares for each in tensors) ** 0.5
    return {
        "tensors": len(tensors),
        "still": sum(each.still for each in tensors),
        "elements": elements,
        "unchanged_fraction": unchanged / elements if elements else None,
        "displacement": displacement,
        "relative_displacement": displacement / norm if norm else None,
    }


def _stands(kind: str, tensors: list[Moved]) -> str | None:
    figures = summed(tensors)
    share, still = figures["unchanged_fraction"], [each for each in tensors if each.still]
    if not still and (share is None or share < _UNCHANGED):
        return None
    line = f"{kind}: {100 * (share or 0):.3g} % of the elements did not move"
    if still:
        line += f", {len(still)} of {len(tensors)} tensors not at all"
        ones = sum(each.ones for each in still)
        line += f" ({ones} of them stand at exactly 1)" if ones else ""
    dtypes = {each.dtype for each in tensors}
    if dtypes <= {"bfloat16", "float16"}:
        line += "; updates below half a unit of a 16-bit weight are lost, strategy light would keep them"
    return line


def difference(first: dict[str, Callable[[], Tensor]], second: dict[str, Callable[[], Tensor]]) -> Difference:
    """Compares the tensors of two checkpoints, one at a time.

    Args:
        first, second: name -> what reads the tensor.
    """
    moved, reshaped = [], []
    for name in (name for name in first if name in second):
        before, after = first[name](), second[name]()
        if before.shape != after.shape:
            reshaped.append(name)
        elif before.is_floating_point() and after.is_floating_point():
            moved.append(compare(name, before, after))
    only_first, only_second = ([name for name in a if name not in b] for a, b in ((first, second), (second, first)))
    return Difference(moved, only_first, only_second, reshaped)


def compare(name: str, before: Tensor, after: Tensor) -> Moved:
    """One tensor of both, piece by piece."""
    unchanged, squares, norm, ones = 0, 0.0, 0.0, True
    for a, b in zip(_pieces(before), _pieces(after), strict=True):
        unchanged += int((a == b).sum())
        squares += float(((b - a) ** 2).sum())
        norm += float((a**2).sum())
        ones = ones and bool((a == 1).all() & (b == 1).all())
    dtype = str(after.dtype).removeprefix("torch.")
    return Moved(name, kind_of(name, before.dim()), dtype, before.numel(), unchanged, squares, norm**0.5, ones)


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    for piece in tensor.detach().reshape(-1).split(PIECE):
        yield piece.to(torch.float64)


def kind_of(name: str, dimensions: int) -> str:
    """The kind of layer that a parameter's name and number of dimensions tell: one of :data:`KINDS`."""
    *path, last = name.lower().split(".")
    words = ".".join(path)
    if last == "bias" or last.endswith("_bias"):
        return "biases"
    is_norm = re.search(r"norm|\bln(_\w+|\d*)\b|\bln_?\d|(^|\.)bn\d*($|\.)", f"{words}.{last}") is not None
    if dimensions <= 1:
        return "norm gains" if is_norm or last in ("weight", "scale", "gamma", "gain") else "biases"
    if re.search(r"embed|\bw[tp]e\b|lm_head|\bhead\b|\boutput$", words or last):
        return "embeddings"
    if re.search(r"attn|attention|\b(q|k|v|o|qkv|out)_?proj\b", f"{words}.{last}"):
        return "attention"
    if re.search(r"mlp|ffn|feed_?forward|\bfc\d*\b|expert|(gate|up|down)_proj|\bw[123]\b|dense_", words):
        return "mlp"
    return "other weights"

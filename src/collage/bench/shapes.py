"""Named sets of parameter shapes, and the values and gradients that every contender gets on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from collage.train.config import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeSet:
    """The shapes of the parameters that one optimizer steps.

    Attributes:
        name: for `--shapes` and the rows.
        summary: what the shapes are and where they are from.
        shapes: one for each parameter.
        joined: whether the same elements are also timed as a single tensor, in the same rounds.
    """

    name: str
    summary: str
    shapes: tuple[Shape, ...]
    joined: bool = False

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(map(prod, self.shapes))

    def as_one(self) -> ShapeSet:
        """The same number of elements in a single tensor."""
        return ShapeSet(f"{self.name}-joined", f"the elements of {self.name} in one tensor", ((self.parameters,),))


def _gpt(hidden: int, layers: int, vocabulary: int) -> tuple[Shape, ...]:
    """A GPT with pre-LayerNorm, rotary positions, biases and untied embeddings."""
    norm: list[Shape] = [(hidden,), (hidden,)]
    layer: list[Shape] = [*norm, (3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    layer += [*norm, (4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)]
    embedding: Shape = (vocabulary, hidden)
    return (embedding, *(layer * layers), *norm, embedding)


def _llama_layer(hidden: int, keys: int, intermediate: int) -> tuple[Shape, ...]:
    """A LLaMA layer; `keys` is the width of all its key (and value) heads together."""
    attention: list[Shape] = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    feed_forward: list[Shape] = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return (*attention, *feed_forward, (hidden,), (hidden,))


_LLAMA_1B = _llama_layer(2048, 512, 8192)
_TABLE = (
    ShapeSet("10m", "10 x [1024, 976] and 10 x [976]", ((1024, 976),) * 10 + ((976,),) * 10),
    ShapeSet(
        "gpt-125m",
        "GPT-125M of arXiv 2405.03637: hidden 768, 12 layers, vocabulary 50257, untied embeddings",
        _gpt(768, 12, 50257),
    ),
    ShapeSet("llama-1b", "a layer of meta-llama/Llama-3.2-1B: hidden 2048, keys 512, intermediate 8192", _LLAMA_1B),
    ShapeSet(
        "llama-7b",
        "a layer of meta-llama/Llama-2-7b-hf: hidden 4096, intermediate 11008",
        _llama_layer(4096, 4096, 11008),
    ),
    ShapeSet("many-small", "2,000 x [1000], and beside it the same elements in one tensor", ((1000,),) * 2000, True),
    ShapeSet(
        "llama-1b-whole",
        "meta-llama/Llama-3.2-1B: 16 layers, vocabulary 128256, tied embeddings; for GPUs",
        ((128256, 2048), *(_LLAMA_1B * 16), (2048,)),
    ),
)
SHAPES = {each.name: each for each in _TABLE}
DEFAULT = {"cpu": ("10m",), "cuda": ("gpt-125m", "llama-1b-whole")}
"""The sets that are timed where none is named, by type of device."""


def shape_sets(names: Iterable[str]) -> list[ShapeSet]:
    """The sets of these names.

    Raises:
        UserError: no set bears a name.
    """
    found = []
    for name in names:
        if name not in SHAPES:
            raise UserError(f"--shapes must name sets of {', '.join(SHAPES)}, got {name!r}; see --list")
        found.append(SHAPES[name])
    return found


@dataclass(frozen=True)
class Values:
    """What every contender's parameters and gradients begin as."""

    params: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    @staticmethod
    def of(shapes: ShapeSet, dtype: torch.dtype, device: torch.device) -> Values:
        """Parameters of N(0, .02), gradients of N(0, .01), from a fixed seed."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: Shape, spread: float) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(spread).to(dtype)

        pairs = [(normal(shape, 0.02), normal(shape, 0.01)) for shape in shapes.shapes]
        return Values(tuple(param for param, _ in pairs), tuple(grad for _, grad in pairs))

    def parameters(self, dtype: torch.dtype) -> list[nn.Parameter]:
        """Fresh parameters of `dtype` with gradients of `dtype`, sharing no memory with others."""
        made = [nn.Parameter(value.to(dtype, copy=True)) for value in self.params]
        for param, grad in zip(made, self.grads, strict=True):
            param.grad = grad.to(dtype, copy=True)
        return made

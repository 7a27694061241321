"""What the tests of the benchmark are made of: tiny shapes, and peers that need no package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from collage.bench.contenders import HYPER, Streams
from collage.bench.peers import Peer, Variant
from collage.bench.shapes import ShapeSet

TINY = ShapeSet("tiny", "two tensors", ((8, 16), (16,)))
MANY = ShapeSet("many", "tensors of 8, and as one", ((8,),) * 5, joined=True)
SMALL = ("--rounds", 2, "--threads", 1)

Bench = Callable[..., dict[str, Any]]


def fails(params: Any, **hyper: Any) -> Any:
    """An optimizer that cannot be built."""
    raise RuntimeError("no such instruction\nand more lines")


def sleeps(params: Any, **hyper: Any) -> Any:
    """An optimizer whose steps change nothing."""
    return torch.optim.SGD(params, lr=0.0)


def adamw(params: Any, **hyper: Any) -> Any:
    """An optimizer that works."""
    return torch.optim.AdamW(params, **{**HYPER, **hyper})


def peer(name: str, module: str, *variants: Variant, **options: Any) -> Peer:
    """A peer whose distribution is torch's, so that it counts as installed where its module is."""
    return Peer(name, "torch", module, variants or (Variant("one", adamw, Streams((2, 2, 2), (2,))),), **options)

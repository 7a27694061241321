"""A look at what a backend really does, the first time that it steps a layout in this process.

Compilers, drivers and processor modes can take the low parts away without a word. So two tiny tensors are stepped first
by the backend and by the definition, and the sum of the components is held against float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from collage.kernels import eager
from collage.kernels.contract import MOMENTS, Batch, Hyper, Inputs
from collage.storage import Expansion, Tiled, TiledTensor

_HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
_SIZES = (33, 70)


def check(name: str, step: Callable[[Batch, Inputs], Tensor | None], like: Batch, grad_dtype: torch.dtype) -> None:
    """Steps two small tensors of the layout and dtypes of ``like`` by ``step`` and by the eager definition.

    Raises:
        RuntimeError: the bits differ, or an expansion does not hold what it should.
    """
    device = like.params[0].device
    mine, theirs = (_sample(like, grad_dtype, place) for place in (device, torch.device("cpu")))
    before = [param.to(torch.float64) for param in theirs[0].params]
    step(*mine)
    eager.step(*theirs)
    for kept, wanted in zip(_tensors(mine[0]), _tensors(theirs[0]), strict=True):
        if not torch.equal(_integers(kept.cpu()), _integers(wanted)):
            raise RuntimeError(
                f"backend {name!r} does not step as defined on {device}: it would train wrongly, and nothing has been "
                "stepped. Is torch.set_flush_denormal on, or another floating-point mode changed? backend='eager' is "
                "the definition; please report this"
            )
    if isinstance(like.layout.param, Expansion):
        _check_sum(theirs, before)


def _sample(like: Batch, grad_dtype: torch.dtype, device: torch.device) -> tuple[Batch, Inputs]:
    dtype, components = like.params[0].dtype, like.layout.components(like.params[0].dtype)
    block = like.layout.block(dtype)
    param = like.layout.param
    # Of a parameter in tiles a few rows are a row of tiles that are less high.
    width = param.width if isinstance(param, Tiled) else block
    shapes = [torch.Size((size,)) if block == 1 else torch.Size((rows, width)) for rows, size in enumerate(_SIZES, 2)]
    # Of every magnitude from 2^-10 to 1, so that the low parts are not 0.
    values = [
        torch.logspace(-10, 0, shape.numel(), base=2.0, dtype=torch.float64).to(dtype).view(shape) for shape in shapes
    ]
    params = [value.to(device, copy=True) for value in values]
    batch = Batch(
        layout=like.layout,
        arithmetic=like.arithmetic,
        seed=7,
        params=[TiledTensor.of(value, param) for value in params] if isinstance(param, Tiled) else params,
        states=[
            {name: torch.zeros(each.shape(shape), dtype=each.dtype, device=device) for name, each in components.items()}
            for shape in shapes
        ],
        steps=torch.zeros(
            len(shapes), dtype=torch.float32, device=like.steps.device if device.type != "cpu" else device
        ),
        ordinals=[0, 1],
        # The second tensor passes a boundary of the random keys, if its blocks can.
        firsts=[0, 2**32 - 40 if block == 1 else 7 * block],
    )
    for param, state in zip(batch.params, batch.states, strict=True):
        for role in MOMENTS:
            getattr(batch.layout, role).clear(batch.layout.parts(role, param, state))
        if not batch.layout.param.borne:
            parts = batch.layout.parts("param", param, state)
            batch.layout.param.store(param.to(torch.float32), parts, None, torch.empty_like(param, dtype=torch.float32))
    grads = [
        torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).to(device, grad_dtype).view(shape) for shape in shapes
    ]
    return batch, Inputs(_HYPER, grads)


def _tensors(batch: Batch) -> list[Tensor]:
    params: list[Tensor] = []
    for param in batch.params:
        # The components, and what a model reads of them.
        params.extend([*param.parts, param.dequantize()] if isinstance(param, TiledTensor) else [param])
    return [*params, *(tensor for state in batch.states for tensor in state.values()), batch.steps]


def _integers(tensor: Tensor) -> Tensor:
    """Torch compares no 8-bit numbers that are not integers."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _check_sum(stepped: tuple[Batch, Inputs], before: list[Tensor]) -> None:
    """The first AdamW step moves a parameter by lr (sign of g + weight decay); half the format's bits are in lo."""
    batch, inputs = stepped
    for param, state, start, grad in zip(batch.params, batch.states, before, inputs.grads, strict=True):
        g = grad.to(torch.float64)
        wanted = start - _HYPER.lr * (g / (g.abs() + _HYPER.eps) + _HYPER.weight_decay * start)
        held = batch.layout.param.exact(batch.layout.parts("param", param, state))
        if ((held - wanted).abs() > 2.0**-14 * wanted.abs()).any():
            raise RuntimeError(
                "hi + lo does not hold the value it should: the low part is lost. Nothing has been stepped. Has a "
                "compiler been let into the step? Compile the model, or a training step as a whole; please report this"
            )

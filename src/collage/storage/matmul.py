"""Matrix products of a parameter in tiles whose model reads it with ``forward="fp8"``.

The other factor, activations, is rounded to e4m3 as well, with a power of two per row and tile's width; the product is
that of the two, added up in float32. Both factors are bfloat16 numbers too, so that every device can multiply them;
where it multiplies float8 numbers, and takes their scales for 128 at a time, it is handed the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from collage.numerics import E4M3FN
from collage.storage.contract import Parts
from collage.storage.rounded import Rounded
from collage.storage.tensor import TiledTensor
from collage.storage.tiled import Tiled

# A faster way than torch's operations to round activations, per device type: (x, form) -> components, or None.
ROUNDERS: dict[str, Callable[[Tensor, Tiled], Parts | None]] = {}
# The scales of Hopper's products: per 128 of a row, and per 128 x 128; CUDA's library has them from 12.9 on.
_SIDE, _CAPABILITY, _CUDA = 128, (9, 0), (12, 9)
# The library wants rows of activations, and blocks along a row of square tiles, in fours; weights in whole square
# tiles, or else rows of them in sixteens.
_ROWS = _BLOCKS = 4
_HEIGHTS = {_SIDE: _SIDE, 1: 16}


def rounded(x: Tensor, columns: int) -> TiledTensor:
    """Activations [rows, width] to nearest in e4m3, with a power of two per row and ``columns`` elements of it."""
    form = Tiled(Rounded(E4M3FN), rows=1, columns=columns, width=x.shape[1])
    rounder = ROUNDERS.get(x.device.type) if type(x) is Tensor else None
    parts = None if rounder is None else rounder(x, form)
    return TiledTensor.of(x, form) if parts is None else TiledTensor(parts, form)


def product(func: Any, bias: Tensor | None, x: Tensor, weight: TiledTensor, kwargs: dict[str, Any]) -> Tensor:
    """``x @ weight``, plus a bias.

    Args:
        func: ``aten.mm`` or ``aten.addmm``, which do the product where no float8 numbers are multiplied.
        x: bfloat16 [m, k].
        weight: transposed: [k, n], kept as [n, k].
        kwargs: those of ``func``.
    """
    factor = rounded(x, weight.form.columns)
    if multiplies_in_float8(weight) and not kwargs:
        return _in_float8(factor, weight, bias)
    others = () if bias is None else (bias,)
    return func(*others, factor.dequantize(), weight.dequantize(), **kwargs)


def multiplies_in_float8(weight: TiledTensor) -> bool:
    """Whether products with it are of float8 numbers on its device: on NVIDIA's Hopper with CUDA 12.9 and torch 2.10 or
    later, of e4m3 in tiles of 128 x 128 that are all whole, or of 1 x 128."""
    form, rows = weight.form, weight.hi.shape[0]
    fits = form.columns == _SIDE and form.rows in _HEIGHTS and rows % _HEIGHTS[form.rows] == 0
    return weight.forward == "fp8" and fits and form.format == E4M3FN and _has_float8_products(weight.device)


def _has_float8_products(device: torch.device) -> bool:
    # torch has the function from 2.10 on.
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(functional, "scaled_mm"):
        return False
    version = tuple(int(number) for number in torch.version.cuda.split(".")[:2])
    return version >= _CUDA and torch.cuda.get_device_capability(device) == _CAPABILITY


def _in_float8(x: TiledTensor, weight: TiledTensor, bias: Tensor | None) -> Tensor:
    """The bytes and the scales as the library wants them: of a row at a time, the next row's scale is the next in
    memory; of square tiles, that of the row's next tile."""
    rows, blocks = x.shape[0], weight.scale.shape[1]
    codes, scale = _padded(x.hi, -rows % _ROWS), _padded(x.scale, -rows % _ROWS)
    of_rows, of_tiles = functional.ScalingType.BlockWise1x128, functional.ScalingType.BlockWise128x128
    if weight.form.rows == 1:
        weight_scale, of_weight = _powers(weight.scale.t().contiguous()).t(), of_rows
    else:
        weight_scale, of_weight = _powers(functional.pad(weight.scale, (0, -blocks % _BLOCKS))).t(), of_tiles
    scale = _powers(scale.t().contiguous()).t()
    found = functional.scaled_mm(
        *(codes, weight.hi.t(), scale, of_rows, weight_scale, of_weight), bias=bias, output_dtype=torch.bfloat16
    )
    return found[:rows]


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """With so many more rows of zeros."""
    if not rows:
        return tensor
    return functional.pad(tensor.view(torch.uint8), (0, 0, 0, rows)).view(tensor.dtype)


def _powers(exponents: Tensor) -> Tensor:
    """The scales as float32; that of padding, whose exponent byte is 0, does not matter but is finite."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.float32)

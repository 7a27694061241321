"""Matrix products in 16 bits on CPUs that have none.

Where a processor lacks the instructions, torch multiplies 16-bit matrices ten times slower than float32 ones. Products
of the operands in float32, rounded once to their format, are what the instructions compute too, but for the order in
which they add; so a run differs no more than it does between processors anyway.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from collage.optim.sharding import local
from collage.storage import TiledTensor
from collage.storage.matmul import multiplies_in_float8
from collage.storage.operations import dispatch

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
NATIVE, WIDENED = "native", "float32, rounded"


def in_float8(model: nn.Module) -> str | None:
    """How many of the weights whose products the model wants in float8 the device multiplies so; None where it wants
    none."""
    linear = (local(module.weight) for module in model.modules() if isinstance(module, nn.Linear))
    wanted = [weight for weight in linear if isinstance(weight, TiledTensor) and weight.forward == "fp8"]
    return f"{sum(map(multiplies_in_float8, wanted))} of {len(wanted)} weights" if wanted else None


def products(device: torch.device, dtype: torch.dtype) -> str:
    """How a model of ``dtype`` on ``device`` multiplies matrices: as torch does, or in float32 with one rounding."""
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        return NATIVE
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return NATIVE if dtype not in fast or fast[dtype]() else WIDENED


def multiplying(how: str) -> AbstractContextManager[object]:
    """Within it, forward and backward, matrices are multiplied as :func:`products` says."""
    return _Widened() if how == WIDENED else nullcontext()


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and any(isinstance(arg, TiledTensor) for arg in args):
            # What is multiplied then are ordinary tensors that parameters in tiles decide upon.
            with self:
                return dispatch(func, args, kwargs or {})
        if func in _PRODUCTS and args[-1].dtype in (torch.bfloat16, torch.float16):
            wide = [arg.to(torch.float32) if isinstance(arg, torch.Tensor) else arg for arg in args]
            return func(*wide, **(kwargs or {})).to(args[-1].dtype)
        return func(*args, **(kwargs or {}))

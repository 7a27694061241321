"""What a parameter group and its gradients must be: every check before anything of an optimizer changes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from collage import kernels
from collage.numerics import format_of
from collage.optim.batches import called
from collage.optim.strategies import Strategy, layout_of, resolve, strategies
from collage.storage import form_of

ARITHMETICS = ("fp32", "working")


def known_on_host(value: float | Tensor) -> bool:
    """Whether reading it costs no wait for a device."""
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _check_hyper(group: dict[str, Any]) -> None:
    """Raises ValueError for a hyper-parameter out of its range; nan is out of every range. A learning rate on a device
    is not read: the host would wait for it in every step."""
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} as a tensor must have one element, got shape {tuple(value.shape)}")
        if name == "lr" and isinstance(value, Tensor) and not known_on_host(value):
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"lr as a tensor on a device must be torch.float32 or torch.float64, got {value.dtype}")
            continue
        if not 0.0 <= float(value) < float("inf"):
            raise ValueError(f"{name} must be finite and >= 0, got {float(value)}")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']!r}")
    for index, beta in enumerate(group["betas"]):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas[{index}] must be in [0, 1), got {float(beta)}")


def check_options(group: dict[str, Any]) -> Strategy:
    """The strategy of a parameter group; raises unless the group's options, which people may set at any time, and a
    loaded state does set, are ones that a step can follow."""
    _check_hyper(group)
    kernels.check_backend(group["backend"])
    strategy = resolve(group["strategy"])
    arithmetic = group["arithmetic"]
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}")
    if arithmetic == "working" and not strategy.has_working_arithmetic:
        able = ", ".join(each.name for each in strategies().values() if each.has_working_arithmetic)
        raise ValueError(f"arithmetic='working' is not defined for strategy {strategy.name!r}; it is for {able}")
    if arithmetic == "working" and group["backend"] not in (None, "eager"):
        raise ValueError(f"arithmetic='working' runs on backend 'eager' alone, got {group['backend']!r}")
    return strategy


def check_group(group: dict[str, Any]) -> None:
    """Raises unless a parameter group can be stepped."""
    strategy = check_options(group)
    names = group.get("param_names", [None] * len(group["params"]))
    for param, name in zip(group["params"], names, strict=True):
        if not param.is_floating_point():
            raise TypeError(
                f"{called(name)} is {param.dtype}; allowed: floating-point parameters (not complex, integer)"
            )
        layout_of(strategy, param)
        check_working_eps(group, param.dtype)
    _warn_of_underflow(group, strategy)
    _warn_of_untiled(group, strategy)


def _warn_of_untiled(group: dict[str, Any], strategy: Strategy) -> None:
    """Warns of large parameters in 16 bits where the strategy's point is that there are none."""
    if not strategy.param.borne:
        return
    low = [p for p in group["params"] if p.dtype == torch.bfloat16 and form_of(p) is None]
    count = sum(strategy.param.fitted(p.shape) is not None for p in low)
    if count:
        warnings.warn(
            f"{count} parameters that strategy {strategy.name!r} could keep in tiles are not kept so, and take wider "
            "storages: convert the model with collage.to_fp8_ before its optimizer is constructed. Parameters that are "
            "no weights of Linear or Embedding layers stay as they are",
            stacklevel=4,
        )


def _warn_of_underflow(group: dict[str, Any], strategy: Strategy) -> None:
    """Warns where v is kept in float16 and eps is too small to make up for what underflows there."""
    held = {layout_of(strategy, param).exp_avg_sq.components(param.dtype)[0].dtype for param in group["params"]}
    # An element whose v is 0 has |g| < 2**-12 or so, and moves by up to lr |m| / eps.
    largest = 2.0**-12 / float(group["eps"]) if group["eps"] else float("inf")
    if torch.float16 in held and largest > 16:
        warnings.warn(
            f"strategy {strategy.name!r} keeps the second moment of float16 parameters in float16, which holds nothing "
            f"below 6e-8 (gradients below 2e-4) nor above 65,504: with eps = {float(group['eps']):g} an element may "
            f"move by {largest:g} times lr in a step, or become nan. Take strategy 'fp16' or 'compact', one with "
            "float32 moments such as 'fp32-states', or eps >= 2e-5",
            stacklevel=4,
        )


def check_working_eps(group: dict[str, Any], dtype: torch.dtype) -> None:
    """Raises ValueError where "working" arithmetic would round eps away: torch's default in float16. v underflows there
    for gradients below .005 already, and the update is a division by zero."""
    eps = float(group["eps"])
    smallest = format_of(dtype).smallest_subnormal
    if group["arithmetic"] == "working" and dtype != torch.float32 and 0 < eps <= smallest / 2:
        raise ValueError(
            f"eps must be 0 or > {smallest / 2:.1e} with arithmetic='working' on parameters of {dtype}, got {eps}, "
            "which that format rounds to 0; take a larger eps, or arithmetic='fp32'"
        )


def check_grad(param: Tensor, grad: Tensor, name: str | None) -> None:
    """Raises unless a gradient can be used."""
    if grad.layout != torch.strided:
        raise ValueError(
            f"{called(name)} has a gradient of layout {grad.layout}; allowed: dense gradients. Construct the "
            "embedding with sparse=False, or step it with torch.optim.SparseAdam"
        )
    if grad.dtype not in (param.dtype, torch.float32):
        raise TypeError(f"{called(name)} is {param.dtype} with a gradient of {grad.dtype}; allowed: its own or float32")
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"{called(name)} has shape {tuple(param.shape)} on {param.device}, its gradient {tuple(grad.shape)} on "
            f"{grad.device}; they must agree"
        )

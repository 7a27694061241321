"""One step of an optimizer's own rule on copies: in float64 for what it intended, in its own dtypes for what it stores.

A replay runs the optimizer's own ``step`` on a shell: an object of the same class that holds copies of one parameter,
its gradient and its state. No formula stands here, so that whatever the class does is what is replayed.
"""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# Ways of doing the same arithmetic; the plain loop serves every dtype and device.
LOOP = {"foreach": False, "fused": False, "capturable": False, "differentiable": False, "triton": False}
NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum")
# Tensors of this many elements that are no state of a parameter are copied with the optimizer's attributes.
_SMALL = 1 << 16
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, types.BuiltinFunctionType)


def widened(state: dict[str, Any]) -> dict[str, Any]:
    """The state with its floating-point tensors in float64 and everything else copied."""
    wide = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            wide[name] = value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
        else:
            wide[name] = _plain(value) if is_plain(value) else value
    return wide


def in_float64(
    optimizer: Optimizer, group: dict[str, Any], value: Tensor, grad: Tensor, state: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The value and the state after the optimizer's next step, done in float64.

    Args:
        optimizer: whose class and attributes are taken; it is not touched.
        group: the options of the parameter's group.
        value: float64, the whole value before the step.
        grad: float64.
        state: as :func:`widened` gives it; updated in place.
    """
    options = {**group_copy(group), **{name: off for name, off in LOOP.items() if name in group}}
    options |= {name: _number(options[name]) for name in NUMBERS if name in options}
    param = value.clone()
    state = _run(optimizer, options, param, grad.clone(), state)
    return param, state


def as_it_is(
    optimizer: Optimizer, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any], **changed: Any
) -> Tensor:
    """What the optimizer's next step stores as the parameter, in its own dtypes and its own implementation (for-loop,
    foreach, fused), with ``changed`` options."""
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    param = param.clone()
    _run(optimizer, {**group_copy(group), **changed}, param, grad.clone(), copies)
    return param


def group_copy(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options without its parameters; tensors among them cloned, since some count steps there."""
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}


def is_plain(value: Any) -> bool:
    """Whether a value can be copied without touching anything else: numbers, words and containers of them, functions,
    small tensors."""
    if isinstance(value, (*_PLAIN, types.FunctionType)):
        return True
    if isinstance(value, Tensor):
        return value.numel() <= _SMALL
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return type(value) in (list, tuple, set) and all(map(is_plain, value))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple, set) else value


def _run(optimizer: Optimizer, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> Any:
    """Steps a shell that holds this one parameter, in place; returns its state."""
    cls = type(optimizer)
    shell = cls.__new__(cls)
    # "step" of an instance is a wrapper that somebody (a scheduler, a loss scaler) has put round the class's own.
    apart = {*HOOKS, "step", "state", "param_groups"}
    kept = {name: value for name, value in vars(optimizer).items() if name not in apart and is_plain(value)}
    shell.__dict__.update({name: _plain(value) for name, value in kept.items()})
    shell.__dict__.update({name: OrderedDict() for name in HOOKS})
    param.grad = grad
    shell.state = defaultdict(dict)
    if state:
        shell.state[param] = state
    shell.param_groups = [{**group, "params": [param]}]
    step: Any = cls.step
    # Without torch's wrapper, which runs the hooks that are registered for all optimizers.
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    with torch.no_grad():
        step(shell)
    return shell.state[param]


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else value
    return tuple(map(_number, value)) if isinstance(value, (tuple, list)) else value

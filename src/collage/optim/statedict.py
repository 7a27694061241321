"""State dicts that keep every dtype and share no memory with the optimizer; and the loss scaler's handshake.

:meth:`torch.optim.Optimizer.load_state_dict` casts every floating and integer state to the parameter's dtype and its
casting policy cannot be overridden, so the tensors are kept out of its hands and put in afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim.optimizer import Optimizer

from collage.optim.strategies import Strategy, layout_of, resolve

COUNTERS = ("step", "ordinal", "param_step")


def detached(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with cloned tensors and strategies in plain form."""
    state = {
        key: {name: value.clone() if isinstance(value, Tensor) else value for name, value in entry.items()}
        for key, entry in state_dict["state"].items()
    }
    groups = []
    for group in state_dict["param_groups"]:
        strategy = group.get("strategy")
        plain = {"strategy": strategy.to_dict()} if isinstance(strategy, Strategy) else {}
        # Deep: betas may be a tuple of tensors, and people keep lists under keys of their own.
        groups.append(copy.deepcopy({**group, **plain}))
    return {**state_dict, "state": state, "param_groups": groups}


@contextmanager
def exact_loading(
    optimizer: Optimizer, check: Callable[[Optimizer, dict[str, Any]], None] | None = None
) -> Iterator[None]:
    """Within it ``optimizer``'s base ``load_state_dict`` runs ``check`` on the whole state first, before anything
    changes, then loads it bit for bit."""
    stash: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = []

    def check_and_stash(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if check is not None:
            check(optimizer, state_dict)
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], saved["params"], strict=True):
                if state_dict["state"].get(key):
                    stash.append((param, group, state_dict["state"][key]))
        return {**state_dict, "state": {}}

    def counters_on_cpu(group: dict[str, Any]) -> bool:
        # torch's own capturable and fused steps want theirs on the device; collage's options of that name do nothing.
        return "strategy" in group or not (group.get("capturable") or group.get("fused"))

    def put_in(_: Optimizer) -> None:
        for param, group, entry in stash:
            counters = COUNTERS if counters_on_cpu(group) else ()
            optimizer.state[param] = {name: placed(name, value, param, counters) for name, value in entry.items()}

    hooks = (
        optimizer.register_load_state_dict_pre_hook(check_and_stash),
        optimizer.register_load_state_dict_post_hook(put_in, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def placed(name: str, value: Any, param: Tensor, counters: Collection[str] = COUNTERS) -> Any:
    """A clone on the parameter's device; counters stay on the CPU, where the step reads them."""
    if not isinstance(value, Tensor):
        return value
    device = torch.device("cpu") if name in counters else param.device
    return value.detach().to(device, copy=True).contiguous()


def check_strategies(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Raises ValueError unless every tensor of the state belongs to the optimizer's parameters and strategies."""
    saved_groups = state_dict["param_groups"]
    groups = optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        raise ValueError(
            f"the state has parameter groups of {[len(group['params']) for group in saved_groups]} parameters, the "
            f"optimizer of {[len(group['params']) for group in groups]}; construct it with the same groups"
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        if "strategy" not in saved:
            raise ValueError(
                "this is not a state of a collage optimizer (no strategy in its groups): see collage.convert"
            )
        missing = sorted(set(optimizer.defaults) - set(saved))
        if missing:
            raise ValueError(f"a parameter group of the state lacks {', '.join(missing)}; add them with their defaults")
        mine, theirs = resolve(group["strategy"]), resolve(saved["strategy"])
        if mine != theirs:
            raise ValueError(
                f"the state was saved with strategy {theirs.name!r}, the optimizer has {mine.name!r}; construct it "
                f"with strategy={theirs.name!r}, or change the state with collage.convert"
            )
        for param, key in zip(group["params"], saved["params"], strict=True):
            entry = state_dict["state"].get(key)
            if entry:
                _check_entry(entry, param, mine, key)
    unknown = set(state_dict["state"]) - {key for saved in saved_groups for key in saved["params"]}
    if unknown:
        raise ValueError(f"the state has entries {sorted(map(str, unknown))} that belong to no parameter")


def _check_entry(entry: dict[str, Any], param: Tensor, strategy: Strategy, key: Any) -> None:
    layout = layout_of(strategy, param)
    wanted = layout.components(param.dtype)
    counters = {"step"} | ({"ordinal"} if layout.stochastic else set())
    if set(entry) != set(wanted) | counters:
        raise ValueError(
            f"the state of parameter {key} has {sorted(entry)}; strategy {strategy.name!r} on {param.dtype} keeps "
            f"{sorted(set(wanted) | counters)}. See collage.convert"
        )
    expected = {name: (each.dtype, torch.Size(each.shape(param.shape))) for name, each in wanted.items()}
    # A step kept in bfloat16 stops counting at 256.
    expected["step"] = (torch.float32, torch.Size())
    if layout.stochastic:
        expected["ordinal"] = (torch.int64, torch.Size())
    for name, (dtype, shape) in expected.items():
        found = entry[name]
        if not isinstance(found, Tensor) or found.dtype != dtype or found.shape != shape:
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{name} of parameter {key} is {what}; strategy {strategy.name!r} keeps {dtype} {tuple(shape)} there"
            )


def unscale_(optimizer: Optimizer, scaler: GradScaler) -> None:
    """See :meth:`collage.AdamW.unscale_`. Follows the scaler's own ``unscale_``, which refuses float16 gradients; the
    scaler has no public way to be told."""
    if not scaler.is_enabled():
        return
    record = scaler._per_optimizer_states[id(optimizer)]
    if record["stage"] is not OptState.READY:
        raise RuntimeError("unscale_ has been called, or the step made, since the last scaler.update(); call it once")
    scale = scaler._scale
    if scale is None:
        raise RuntimeError("the scaler has scaled no loss yet: call scaler.scale(loss).backward() before unscale_")
    inverse = scale.double().reciprocal().float()
    found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
    record["found_inf_per_device"] = scaler._unscale_grads_(optimizer, inverse, found_inf, True)
    record["stage"] = OptState.UNSCALED

"""Checkpoints between float32 AdamW and precision strategies, both ways, before or after the first step.

A checkpoint here is a pair: a model's ``state_dict()`` and an optimizer's. The float32 side is what
``torch.optim.AdamW`` (or ``collage.AdamW(strategy="fp32")``) saves for a float32 model. To float32 the conversion is
exact wherever the components' sum fits 24 bits, which holds for everything that a float32 step stored; from float32 it
is as exact as the strategy's storages, and says how exact that was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from collage.kernels import Layout
from collage.optim.strategies import Strategy, layout_of, resolve
from collage.storage import Storage, Tiled, TiledTensor, form_of

OWN_OPTIONS = ("strategy", "arithmetic", "backend", "seed")


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        model: the model's state.
        optimizer: the optimizer's state, or None if none was given.
        worst: per logical tensor (``param``, ``exp_avg``, ``exp_avg_sq``) the largest difference between what was to be
            stored and what is, as a share of the tensor's largest magnitude; 0 where the conversion was exact.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    worst: dict[str, float] = field(default_factory=dict)


def from_fp32(
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any] | None = None,
    *,
    strategy: str | Strategy = "plus",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    names: Sequence[str] | None = None,
    like: Mapping[str, Tensor] | None = None,
) -> Conversion:
    """A float32 checkpoint as one of ``collage.AdamW(strategy=...)`` on a model of ``dtype``.

    Args:
        model: a float32 model's ``state_dict()``.
        optimizer: its AdamW's ``state_dict()``. It may be from before the first step; without one there is nowhere to
            keep low parts, and the model is rounded to nearest.
        strategy: a name of :func:`collage.strategies` or a record.
        dtype: of the low-precision model.
        seed: of the strategy's stochastic roundings from here on.
        names: the parameters' names in the optimizer's order; needed where the optimizer was not constructed on named
            parameters and the model's state has other entries too.
        like: the ``state_dict()`` of a model that :func:`collage.to_fp8_` has converted: what it keeps in tiles the
            conversion keeps in such tiles. None: nothing.

    Raises:
        ValueError: entries that do not fit each other, moments that AdamW does not keep (amsgrad).
    """
    record = resolve(strategy)
    low = {name: tensor.detach().clone() for name, tensor in model.items()}
    forms = {name: form_of(tensor) for name, tensor in (like or {}).items()}
    if optimizer is None:
        for name, tensor in low.items():
            rounds = tensor.dtype == torch.float32
            low[name] = _rounded(tensor, record, dtype, forms.get(name)) if rounds else tensor
        return Conversion(low, None, _worst_of(model, low))
    worst = {"param": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    state: dict[Any, dict[str, Tensor]] = {}
    for ordinal, (key, name) in enumerate(_named_keys(model, optimizer, names)):
        entry = _fp32_entry(optimizer["state"].get(key), model[name], name)
        param, state[key], errors = _encode(record, dtype, entry, ordinal, forms.get(name))
        worst = {role: max(worst[role], errors[role]) for role in worst}
        for same in _tied(model, name):
            low[same] = param
    own = {"strategy": record.to_dict() if isinstance(strategy, Strategy) else strategy}
    own |= {"arithmetic": "fp32", "backend": None, "seed": seed}
    groups = [{**group, **own} for group in optimizer["param_groups"]]
    return Conversion(low, {"state": state, "param_groups": groups}, worst)


def to_fp32(
    model: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None = None, *, names: Sequence[str] | None = None
) -> Conversion:
    """A checkpoint of ``collage.AdamW`` as a float32 one that ``torch.optim.AdamW`` on a float32 model loads.

    Args:
        model: the low-precision model's ``state_dict()``.
        optimizer: its ``collage.AdamW``'s ``state_dict()``; without one, or before the first step, the parameters are
            what the model holds.
        names: as in :func:`from_fp32`.

    Raises:
        ValueError: entries that do not fit each other.
    """
    full = {name: _full(tensor.detach()) for name, tensor in model.items()}
    if optimizer is None:
        return Conversion(full, None)
    records = {key: resolve(group["strategy"]) for group in optimizer["param_groups"] for key in group["params"]}
    state: dict[Any, dict[str, Tensor]] = {}
    for key, name in _named_keys(model, optimizer, names):
        entry = optimizer["state"].get(key)
        if not entry:
            continue
        layout = layout_of(records[key], model[name])
        values = {role: _decode(layout, role, model[name], entry) for role, _ in layout.roles}
        state[key] = {"step": entry["step"].clone(), "exp_avg": values["exp_avg"], "exp_avg_sq": values["exp_avg_sq"]}
        for same in _tied(model, name):
            full[same] = values["param"]
    groups = [{k: v for k, v in group.items() if k not in OWN_OPTIONS} for group in optimizer["param_groups"]]
    return Conversion(full, {"state": state, "param_groups": groups})


def _full(tensor: Tensor) -> Tensor:
    """A new tensor: float32 of a low-precision one, which in tiles holds more than it shows."""
    if isinstance(tensor, TiledTensor):
        return tensor.exact()
    low = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.to(torch.float32, copy=True) if low else tensor.clone()


def _decode(layout: Layout, role: str, param: Tensor, entry: dict[str, Tensor]) -> Tensor:
    return getattr(layout, role).exact(layout.parts(role, param, entry)).to(torch.float32)


def _encode(
    strategy: Strategy, dtype: torch.dtype, entry: dict[str, Tensor], ordinal: int, form: Tiled | None
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """One parameter's components from its float32 values; and the error of each logical tensor."""
    # What the strategy fixes (fp32) stays as it is fixed.
    own = strategy.param_dtype(dtype)
    param = _rounded(entry["param"], strategy, own, form)
    layout = layout_of(strategy, param)
    state = {"step": entry["step"].clone()}
    if layout.stochastic:
        state["ordinal"] = torch.tensor(ordinal, dtype=torch.int64)
    for name, component in layout.components(own).items():
        state[name] = torch.zeros(component.shape(param.shape), dtype=component.dtype, device=param.device)
    errors = {}
    for role, storage in layout.roles:
        parts = layout.parts(role, param, state)
        value = entry[role].contiguous()
        storage.store(value.clone(), parts, None, torch.empty_like(value))
        errors[role] = _error(storage, parts, value)
    return param, state, errors


def _error(storage: Storage, parts: Sequence[Tensor], value: Tensor) -> float:
    return _share(storage.exact(parts), value)


def _share(stored: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest magnitude."""
    size = wanted.abs().max().item() if wanted.numel() else 0.0
    return (stored.to(torch.float64) - wanted.to(torch.float64)).abs().max().item() / size if size else 0.0


def _rounded(tensor: Tensor, strategy: Strategy, dtype: torch.dtype, form: Tiled | None) -> Tensor:
    """Rounded to nearest into the dtype in which the strategy's model is, or into tiles."""
    if form is not None:
        return TiledTensor.of(tensor, form)
    out = torch.empty_like(tensor, dtype=strategy.param_dtype(dtype))
    return out.copy_(tensor)


def _worst_of(wanted: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, float]:
    errors = [_share(_full(stored[name]), t) for name, t in wanted.items() if t.dtype == torch.float32]
    return {"param": max(errors, default=0.0)}


def _fp32_entry(saved: Mapping[str, Any] | None, param: Tensor, name: str) -> dict[str, Tensor]:
    """One parameter's float32 values, zero moments at step 0 where none were saved."""
    if param.dtype != torch.float32:
        raise ValueError(f"{name!r} is {param.dtype}; allowed: float32. A low-precision checkpoint goes to_fp32 first")
    if not saved:
        moments = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        return {"param": param, **moments}
    if set(saved) != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(
            f"the state of {name!r} has {sorted(saved)}; allowed: step, exp_avg, exp_avg_sq (AdamW, no amsgrad)"
        )
    for moment in ("exp_avg", "exp_avg_sq"):
        if saved[moment].dtype != torch.float32 or saved[moment].shape != param.shape:
            got = f"{saved[moment].dtype} {tuple(saved[moment].shape)}"
            raise ValueError(f"{moment} of {name!r} is {got}; allowed: float32 {tuple(param.shape)}")
    step = torch.as_tensor(saved["step"], dtype=torch.float32)
    return {"param": param, "step": step, "exp_avg": saved["exp_avg"], "exp_avg_sq": saved["exp_avg_sq"]}


def _tied(model: Mapping[str, Tensor], name: str) -> Iterator[str]:
    """The names under which the state holds this very tensor."""
    tensor = model[name]
    for other, candidate in model.items():
        if other == name or (_address(candidate) == _address(tensor) != 0 and candidate.shape == tensor.shape):
            yield other


def _address(tensor: Tensor) -> int:
    return tensor.hi.data_ptr() if isinstance(tensor, TiledTensor) else tensor.data_ptr()


def _named_keys(
    model: Mapping[str, Tensor], optimizer: Mapping[str, Any], names: Sequence[str] | None
) -> list[tuple[Any, str]]:
    """(key in the optimizer's state, name in the model's), in the optimizer's order."""
    keys = [key for group in optimizer["param_groups"] for key in group["params"]]
    if names is None:
        if all("param_names" in group for group in optimizer["param_groups"]):
            names = [name for group in optimizer["param_groups"] for name in group["param_names"]]
        else:
            names = list(model)
    if len(names) != len(keys):
        raise ValueError(
            f"the optimizer has {len(keys)} parameters, {len(names)} names were found; give names=, the parameters' "
            "names in the optimizer's order ([name for name, _ in model.named_parameters()] for a single group)"
        )
    for key, name in zip(keys, names, strict=True):
        if name not in model:
            raise ValueError(f"the model's state has no {name!r}; it has {', '.join(list(model)[:5])}, ...")
        moment = optimizer["state"].get(key, {}).get("exp_avg")
        if moment is not None and moment.shape != model[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(model[name].shape)}, its moments {tuple(moment.shape)}; give names= in the "
                "optimizer's order"
            )
    return list(zip(keys, names, strict=True))

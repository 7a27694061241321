"""Any torch optimizer, its low-precision parameters kept as expansions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import LBFGS
from torch.optim.optimizer import Optimizer

from collage.numerics import random_bits
from collage.optim import statedict
from collage.optim.lowprecision import take_full_value, warn_of_replaced
from collage.storage import Expansion, Storage

LOW_PRECISION = (torch.bfloat16, torch.float16)
OWN_COUNTERS = ("param_step", "ordinal")


class Compensated(Optimizer):
    """Runs another optimizer's rule in float32 on hi + lo, and splits what comes out.

    During a step each bfloat16 or float16 parameter that has a gradient stands as the float32 value hi + lo before the
    inner optimizer, with its gradient in float32; afterwards the value is stored again. The inner optimizer's state is
    therefore float32. The step takes 8 transient bytes per parameter; where AdamW is wanted, :class:`collage.AdamW`
    does without them. Parameters of other dtypes step as the inner optimizer steps them.

    Parameter groups are the inner optimizer's own: schedulers may hold either of the two.

    Args:
        optimizer: any constructed torch optimizer that steps without reevaluating the model (not LBFGS).
        param: how parameters are stored: any storage of :mod:`collage.storage`.
        seed: of its stochastic rounding.

    Raises:
        TypeError: not a torch optimizer, or one that reevaluates the model.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        param: Storage = Expansion(2, rounding="stochastic"),  # noqa: B008  frozen
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, (LBFGS, Compensated)):
            raise TypeError(
                f"optimizer must be a torch optimizer that steps without reevaluating the model, got "
                f"{type(optimizer).__name__}"
            )
        self.inner = optimizer
        self.storage = param
        self.seed = seed
        super().__init__(optimizer.param_groups, optimizer.defaults)
        # One list for both, so that schedulers and add_param_group reach the inner optimizer.
        self.param_groups = optimizer.param_groups
        for ordinal, each in enumerate(self._params()):
            if each.dtype in LOW_PRECISION and (value := take_full_value(each)) is not None:
                self._create_state(each, ordinal, value)
        warn_of_replaced()

    def __getstate__(self) -> dict[str, Any]:
        """Everything, the inner optimizer included."""
        own = {"inner": self.inner, "storage": self.storage, "seed": self.seed}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Shares the groups with the inner optimizer again."""
        super().__setstate__(state)
        self.param_groups = self.inner.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to the inner optimizer, whose groups these are."""
        if getattr(self, "param_groups", None) is self.inner.param_groups:
            self.inner.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the inner optimizer. If it raises, the parameters are as they were.

        Args:
            closure: reevaluates the model and returns the loss; called once, before the step.

        Raises:
            ValueError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._widened() as widened:
            self.inner.step()
            values = [param.detach() for param, _ in widened]
        for (param, ordinal), value in zip(widened, values, strict=True):
            self._store(param, ordinal, value)
        return loss

    @contextmanager
    def _widened(self) -> Iterator[list[tuple[Tensor, int]]]:
        """Low-precision parameters with gradients as float32, and back to their own components when it ends."""
        members = [
            (param, ordinal)
            for ordinal, param in enumerate(self._params())
            if param.grad is not None and param.dtype in LOW_PRECISION
        ]
        for param, ordinal in members:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise ValueError(f"a gradient has layout {param.grad.layout}; allowed: dense gradients")
            if not self.state[param]:
                self._create_state(param, ordinal, param.detach().to(torch.float32))
        kept = [(param, param.data, param.grad) for param, _ in members]
        try:
            for param, data, grad in kept:
                param.grad = None
                param.data = self.storage.load(self._parts(param), torch.empty_like(data, dtype=torch.float32))
                param.grad = None if grad is None else grad.to(torch.float32, copy=True)
            yield members
        finally:
            for param, data, grad in kept:
                param.grad = None
                param.data = data
                param.grad = grad

    def _store(self, param: Tensor, ordinal: int, value: Tensor) -> None:
        state = self.state[param]
        state["param_step"] += 1
        bits = None
        if self.storage.stochastic:
            step = int(state["param_step"])
            bits = random_bits(self.seed, int(state["ordinal"]), step, 0, param.numel()).view(param.shape)
            bits = bits.to(param.device)
        self.storage.store(value, self._parts(param), bits, torch.empty_like(value))

    def _create_state(self, param: Tensor, ordinal: int, value: Tensor) -> None:
        state = {"param_step": torch.zeros((), dtype=torch.float32), "ordinal": torch.tensor(ordinal)}
        for component in self.storage.components(param.dtype)[1:]:
            state[component.name.format(role="param")] = torch.zeros_like(param, dtype=component.dtype)
        self.state[param] = state
        with torch.no_grad():
            self.storage.store(value.clone(), self._parts(param), None, torch.empty_like(value))

    def _parts(self, param: Tensor) -> list[Tensor]:
        names = self.storage.state_names("param", param.dtype)[1:]
        return [param.data, *(self.state[param][name] for name in names)]

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def full_param(self, param: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The value that is really held for a parameter, float32 or float64: see :meth:`collage.AdamW.full_param`."""
        if not any(each is param for each in self._params()):
            raise ValueError("full_param takes a parameter of this optimizer; this tensor is in none of its groups")
        if not self.state.get(param):
            return param.detach().to(dtype, copy=True)
        return self.storage.exact(self._parts(param)).to(dtype)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and the components, cloned, with their own dtypes."""
        merged = statedict.detached(self.inner.state_dict())
        for key, param in enumerate(self._params()):
            own = self.state.get(param)
            if own:
                copies = {name: value.clone() for name, value in own.items()}
                merged["state"][key] = {**merged["state"].get(key, {}), **copies}
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads both, with every dtype kept.

        Raises:
            ValueError: components that do not fit the parameters; nothing has changed then.
        """
        own, inner = {}, {}
        for key, param in zip(self._saved_keys(state_dict), self._params(), strict=True):
            entry = state_dict["state"].get(key, {})
            names = self._own_names(param)
            own[param] = {name: value for name, value in entry.items() if name in names}
            self._check_own(own[param], names, param, key)
            inner[key] = {name: value for name, value in entry.items() if name not in names}
        with statedict.exact_loading(self.inner):
            self.inner.load_state_dict({**state_dict, "state": {k: entry for k, entry in inner.items() if entry}})
        self.param_groups = self.inner.param_groups
        self.state.clear()
        for param, entry in own.items():
            if entry:
                self.state[param] = {name: statedict.placed(name, value, param) for name, value in entry.items()}

    def _own_names(self, param: Tensor) -> set[str]:
        if param.dtype not in LOW_PRECISION:
            return set()
        return {*OWN_COUNTERS, *self.storage.state_names("param", param.dtype)[1:]}

    def _saved_keys(self, state_dict: dict[str, Any]) -> list[Any]:
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        if len(keys) != len(self._params()):
            raise ValueError(f"the state has {len(keys)} parameters, the optimizer {len(self._params())}")
        return keys

    def _check_own(self, entry: dict[str, Tensor], names: set[str], param: Tensor, key: Any) -> None:
        if entry and set(entry) != names:
            raise ValueError(f"the state of parameter {key} has {sorted(entry)} of the components {sorted(names)}")
        for name, value in entry.items():
            if name not in OWN_COUNTERS and value.shape != param.shape:
                raise ValueError(f"{name} of parameter {key} has shape {tuple(value.shape)}, not {tuple(param.shape)}")

"""AdamW over storages (paper section 4): one rule, any precision strategy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from collage import kernels
from collage.kernels import MOMENTS, Hyper, Inputs, Layout
from collage.optim import statedict
from collage.optim.batches import Gradients, GradOf, Member, Plan, Together
from collage.optim.checks import check_grad, check_group, check_options, check_working_eps, known_on_host
from collage.optim.lowprecision import take_full_value, warn_of_replaced
from collage.optim.operator import register, traced_step
from collage.optim.sharding import any_on_all_processes, is_sharded, local, local_parts, new_component, placed_as
from collage.optim.states import States
from collage.optim.strategies import Strategy, layout_of


@dataclass(frozen=True)
class StepRow:
    """What one parameter contributes to an audited step.

    Attributes:
        group: index of its parameter group.
        param: the parameter.
        name: its name if the optimizer was given named parameters, else None.
        sums: float64 tensor of :data:`collage.kernels.SUMS`, over the whole parameter even where it is sharded.
    """

    group: int
    param: Tensor
    name: str | None
    sums: Tensor


class Observer(Protocol):
    """What :meth:`AdamW.add_observer` takes."""

    def wants(self, step: int) -> bool:
        """Whether the step with this number (from 1) should return its sums."""
        ...

    def record(self, step: int, rows: Sequence[StepRow]) -> None:
        """Receives them."""
        ...


class AdamW(Optimizer):
    """AdamW whose parameters and moments are kept as a precision strategy says.

    A drop-in for :class:`torch.optim.AdamW` on parameters of torch.bfloat16 or torch.float16. Parameters of
    torch.float32 in the same model step as plain float32. Gradients may be of the parameter's dtype or float32 and are
    never written. Weight decay is part of the compensated update.

    A gradient that is not finite makes the elements it touches (moments and parameter) not finite, as in torch; the
    other elements step as usual. Moments kept in blocks (strategy "compact") are spoiled block by block. Use a loss
    scaler or a check before the step where that may happen.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups. A group may set any option below but those
            after ``maximize`` for itself.
        lr: learning rate, >= 0; a float or a tensor of one element.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        strategy: a name of :func:`collage.strategies` or a :class:`collage.Strategy`.
        arithmetic: "fp32": load, do the rule in float32, store. "working": every operation rounded to the parameter's
            format, as the paper has it; for study, and only where no component is rounded stochastically.
        backend: None chooses by device; a name of :func:`collage.backends` insists on it.
        maximize: ascend instead of descend.
        seed: of the stochastic roundings.
        amsgrad: must be False.
        differentiable: must be False.
        foreach, fused, capturable: accepted for compatibility, without effect.

    Raises:
        ValueError: an option out of its range, a parameter that the strategy cannot serve.
        TypeError: a parameter that is not a floating-point tensor.
    """

    # GradScaler then hands grad_scale and found_inf to the step instead of refusing float16 gradients.
    _step_supports_amp_scaling = True
    number: int

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        strategy: str | Strategy = "plus",
        arithmetic: str = "fp32",
        backend: str | None = None,
        maximize: bool = False,
        seed: int = 0,
        amsgrad: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad=True is not served: the method has no third moment; use amsgrad=False")
        if differentiable:
            raise ValueError("differentiable=True is not served: the step rounds; use differentiable=False")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "strategy": strategy,
            "arithmetic": arithmetic,
            "backend": backend,
            "maximize": maximize,
            "seed": seed,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        self._observers: list[Observer] = []
        self._plan: Plan | None = None
        self._constructed = False
        super().__init__(params, defaults)
        self.state = States(self.state)
        register(self)
        # Only now: a group that is refused must leave the low parts of those before it for another attempt.
        self._take_full_values(0)
        self._constructed = True
        warn_of_replaced()

    def __getstate__(self) -> dict[str, Any]:
        """Defaults, state and groups; tensors that are views of a larger one by themselves."""
        state = {param: {name: _by_itself(t) for name, t in entry.items()} for param, entry in self.state.items()}
        return {**super().__getstate__(), "state": defaultdict(dict, state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from a pickle, a deep copy or a loaded state dict; observers stay with the original."""
        super().__setstate__(state)
        self.__dict__.setdefault("_observers", [])
        self.state = States(self.state)
        register(self)
        self._plan = None
        self.__dict__.setdefault("_constructed", True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, checked before anything of the optimizer changes. See :class:`torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._constructed:
            self._take_full_values(len(self.param_groups) - 1)

    def _take_full_values(self, first: int) -> None:
        """Creates the state of parameters that :func:`collage.to_low_precision` cast, from group ``first`` on."""
        ordinal = sum(len(group["params"]) for group in self.param_groups[:first])
        for group in self.param_groups[first:]:
            for param in group["params"]:
                value = take_full_value(param)
                if value is not None:
                    self._create_state(param, layout_of(group["strategy"], param), ordinal, value)
                ordinal += 1

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step. All gradients are checked before the first parameter changes.

        On a fresh optimizer a step with lr = 0 and zero gradients, as FSDP and DCP make them to create the state, does
        that and nothing else; it is not counted. Within ``torch.compile`` the step is one opaque operator.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError, TypeError: a gradient that cannot be used; parameters and state are as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            traced_step(self)
        else:
            self.advance()
        return loss

    @torch.no_grad()
    def advance(self, given: dict[int, Tensor] | None = None) -> None:
        """What :meth:`step` does after the closure.

        Args:
            given: gradients by ``id`` of their parameter, in place of the parameters' own.
        """
        grad_of: GradOf = attrgetter("grad") if given is None else lambda param: given.get(id(param))
        for group in self.param_groups:
            check_options(group)
        plan, grads = self._plan_and_gradients(grad_of)
        on_device = all(each.backend == "triton" for each in plan.together)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not on_device and bool(found_inf):
            return
        number = plan.number + 1
        observers = [observer for observer in self._observers if plan.together and observer.wants(number)]
        rows: list[StepRow] = []
        for each, its in zip(plan.together, grads, strict=True):
            inputs = self._inputs(each, its, found_inf if on_device else None, audit=bool(observers))
            sums = kernels.step(each.batch, inputs, each.backend)
            each.write_copies()
            if sums is not None:
                rows += [
                    StepRow(m.group, m.param, m.name, row)
                    for m, row in zip(each.members, each.by_member(sums), strict=True)
                ]
        plan.number = number
        for observer in observers:
            observer.record(number, rows)

    def _plan_and_gradients(self, grad_of: GradOf) -> tuple[Plan, list[Gradients]]:
        """The batches of this step with their gradients: those of the step before if they still hold."""
        plan = self._plan
        grads = None if plan is None else plan.gradients(self, grad_of)
        if plan is None or grads is None:
            if not isinstance(self.state, States):
                self.state = States(self.state)
            members = self._members(grad_of)
            for member in members:
                if not self.state[member.param]:
                    self._create_state(member.param, member.layout, member.ordinal)
            plan = Plan(self, members, grad_of)
            grads = plan.gradients_of_all(grad_of, fresh=True)
            self._plan = plan if plan.lasts else None
        if grads is None:
            raise RuntimeError("gradients or parameters changed while they were sorted for the step")
        if plan.number == 0 and self._only_creates_state(grads):
            return Plan(self, [], grad_of), []
        return plan, grads

    def _inputs(self, each: Together, grads: Gradients, found_inf: Tensor | None, audit: bool) -> Inputs:
        group = self.param_groups[each.members[0].group]
        lr = group["lr"]
        on_device = each.backend == "triton" and isinstance(lr, Tensor) and lr.device.type != "cpu"
        scale = getattr(self, "grad_scale", None)
        return Inputs(
            hyper=_hyper(group, lr=float("nan") if on_device else float(lr)),
            grads=grads.tensors,
            addresses=grads.addresses,
            lr=lr if on_device else None,
            grad_scale=None if scale is None else torch.as_tensor(scale, dtype=torch.float32),
            found_inf=found_inf,
            audit=audit,
        )

    def _members(self, grad_of: GradOf) -> list[Member]:
        """Every parameter that has a gradient, checked."""
        members = []
        ordinal = -1
        for index, group in enumerate(self.param_groups):
            strategy = check_options(group)
            served = set()
            names = group.get("param_names", [None] * len(group["params"]))
            for param, name in zip(group["params"], names, strict=True):
                ordinal += 1
                grad = grad_of(param)
                if grad is None:
                    continue
                check_grad(param if is_sharded(grad) else local(param), grad, name)
                layout = layout_of(strategy, param)
                # A float32 parameter steps as plain float32 whatever the strategy and its arithmetic.
                arithmetic = "fp32" if param.dtype == torch.float32 else group["arithmetic"]
                check_working_eps(group, param.dtype)
                case = (layout, arithmetic, param.dtype, local(param).device)
                if case not in served:
                    kernels.choose(*case, group["backend"])
                    served.add(case)
                members.append(Member(index, ordinal, param, name, layout, arithmetic))
        return members

    def _only_creates_state(self, grads: list[Gradients]) -> bool:
        """Whether a first step has learning rates and gradients of zero throughout, on every process that shares it."""
        rates = [group["lr"] for group in self.param_groups]
        if not all(known_on_host(lr) and float(lr) == 0 for lr in rates):
            return False
        params = [param for group in self.param_groups for param in group["params"]]
        return not any_on_all_processes(any(bool(g.any()) for each in grads for g in each.tensors), params)

    def _create_state(self, param: Tensor, layout: Layout, ordinal: int, value: Tensor | None = None) -> None:
        """Zero moments and a parameter that holds ``value`` (float32), or itself."""
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32)}
        if layout.stochastic:
            state["ordinal"] = torch.tensor(ordinal, dtype=torch.int64)
        for name, component in layout.components(param.dtype).items():
            state[name] = new_component(param, component)
        with torch.no_grad():
            here, parts = local(param.detach()), local_parts(layout, param, state)
            for role in MOMENTS:
                getattr(layout, role).clear(parts[role])
            # A parameter that bears its components holds its value already.
            if not layout.param.borne:
                full = (here if value is None else local(value)).to(torch.float32, copy=True).contiguous()
                layout.param.store(full, parts["param"], None, torch.empty_like(full))
        self.state[param] = state

    # ---- what people ask of it -------------------------------------------------------------------------------------

    def full_param(self, param: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The value that the strategy really holds for a parameter: hi + lo, or the master copy.

        Args:
            param: a parameter of this optimizer.
            dtype: torch.float32 or torch.float64 (exact).

        Returns:
            A new tensor of the parameter's shape.

        Raises:
            ValueError: not a parameter of this optimizer, or another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        for group in self.param_groups:
            if any(each is param for each in group["params"]):
                layout, state = layout_of(group["strategy"], param), self.state.get(param)
                if not state and not layout.param.borne:
                    return param.detach().to(dtype, copy=True)
                parts = [local(part) for part in layout.parts("param", local(param.detach()), state or {})]
                held = layout.param.exact(parts).to(dtype)
                return placed_as(held, param)
        raise ValueError("full_param takes a parameter of this optimizer; this tensor is in none of its groups")

    def unscale_(self, scaler: torch.amp.GradScaler) -> None:
        """Divides the gradients by a scaler's loss scale, before clipping: ``scaler.unscale_`` refuses float16
        gradients. ``scaler.step(optimizer)`` then knows that it is done.

        Raises:
            RuntimeError: already unscaled since the last ``scaler.update()``.
        """
        statedict.unscale_(self, scaler)

    def add_observer(self, observer: Observer) -> None:
        """Lets ``observer`` have the sums of the steps it wants."""
        self._observers.append(observer)

    def remove_observer(self, observer: Observer) -> None:
        """The opposite of :meth:`add_observer`; nothing if it does not observe."""
        self._observers = [each for each in self._observers if each is not observer]

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state in its own dtypes, cloned: it does not change with later steps. Plain types and tensors only."""
        return statedict.detached(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of the same strategy with every dtype kept, cloned.

        Raises:
            ValueError: another strategy, other tensors, dtypes or shapes; the optimizer is as it was. To change the
                strategy, use ``collage.convert``.
        """
        with statedict.exact_loading(self, statedict.check_strategies):
            super().load_state_dict(state_dict)


def _by_itself(value: Any) -> Any:
    shares = type(value) is Tensor and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if shares else value


def _hyper(group: dict[str, Any], lr: float) -> Hyper:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return Hyper(lr, beta1, beta2, float(group["eps"]), float(group["weight_decay"]), bool(group["maximize"]))

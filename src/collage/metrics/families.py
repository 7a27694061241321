"""The kinds of optimizers that the audit knows beside torch's own, and which of them one is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from collage.kernels import MOMENTS
from collage.metrics import replay
from collage.metrics.family import SERVED, Family, parts_of
from collage.numerics import Format, format_of
from collage.optim import AdamW, Compensated
from collage.optim.sharding import local, local_parts
from collage.optim.strategies import layout_of
from collage.storage import Kahan, Rounded, Storage, TiledTensor

# Of a group of collage.AdamW, what its constructor takes and a step depends on.
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "strategy", "arithmetic", "backend", "maximize", "seed")
# Elements per scale in bitsandbytes' 8-bit states.
_BNB_BLOCK = 256


class Optimi(Family):
    """torch-optimi: a bfloat16 parameter comes with the compensation ``kahan_comp``."""

    known = True
    bits = False

    def storage(self, group: dict[str, Any], param: Tensor) -> Storage:
        """Kahan's pair, or the parameter alone."""
        return Kahan() if len(self.parts(group, param)) == 2 else Rounded()

    def parts(self, group: dict[str, Any], param: Tensor) -> list[Tensor]:
        """The parameter, and its compensation once there is one."""
        here, compensation = local(param.detach()), super().state(param).get("kahan_comp")
        if isinstance(compensation, Tensor) and compensation.shape == here.shape:
            return [here, compensation]
        return [here]

    def state(self, param: Tensor) -> dict[str, Any]:
        """Without the compensation, which float64 does not need; the rule looks for its name."""
        state = super().state(param)
        return {**state, "kahan_comp": None} if state else {}

    def intended(
        self, group: dict[str, Any], value: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Without compensation."""
        return super().intended({**group, "kahan_sum": False}, value, grad, state)


class Mapped(Family):
    """Optimizers whose own code does not serve float64; a class of torch.optim has the same rule."""

    known = True
    bits = False

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.elementwise = True

    def rule(self, group: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
        """Makes the torch optimizer with the group's options."""
        raise NotImplementedError

    def intended(
        self, group: dict[str, Any], value: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """By the torch optimizer."""
        rule = self.rule(group)([value])
        return replay.in_float64(rule, rule.param_groups[0], value, grad, state)


def adam(decoupled: bool, group: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
    """torch's AdamW, or Adam with its L2 penalty, with a group's options."""
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize") if name in group}
    options["lr"] = float(options["lr"])
    options["betas"] = tuple(map(float, options["betas"][:2]))
    return lambda params: cls(params, amsgrad=bool(group.get("amsgrad", False)), **options)


class TorchAO(Mapped):
    """torchao: states that a tensor class of its own quantises and gives back by ``dequantize``."""

    def rule(self, group: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
        """Adam or AdamW."""
        return adam(self.optimizer.is_adamw, group)  # type: ignore[attr-defined]

    def state(self, param: Tensor) -> dict[str, Any]:
        """As the step loads it."""
        return {name: _dequantized(value) for name, value in super().state(param).items()}


class DeepSpeed(Mapped):
    """DeepSpeedCPUAdam and FusedAdam."""

    def refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        """torch's rule always corrects the bias."""
        corrected = group.get("bias_correction", True)
        return super().refusal(group, param) if corrected else "it runs without bias correction"

    def rule(self, group: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
        """Adam or AdamW."""
        return adam(bool(self.optimizer.adam_w_mode), group)  # type: ignore[attr-defined]

    def state(self, param: Tensor) -> dict[str, Any]:
        """With the count of steps as torch keeps it."""
        return _counted(super().state(param))


class BitsAndBytes(Mapped):
    """bitsandbytes' Adam, AdamW and SGD with momentum, with states of 32 or 8 bits."""

    NAMES = {"adam": ("exp_avg", "exp_avg_sq"), "momentum": ("momentum_buffer",)}  # noqa: RUF012

    def refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        """Without clipping by the update's norm, which torch's rules do not have."""
        optimizer: Any = self.optimizer
        if optimizer.optimizer_name not in self.NAMES:
            return f"bitsandbytes' rule {optimizer.optimizer_name!r} has no replay"
        if optimizer.args.max_unorm > 0 or optimizer.args.skip_zeros:
            return "max_unorm and skip_zeros have no replay"
        return super().refusal(group, param)

    def rule(self, group: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
        """Its weight decay is decoupled in Adam too."""
        if self.optimizer.optimizer_name == "adam":  # type: ignore[attr-defined]
            return adam(True, group)
        lr, decay, momentum = (float(each) for each in (group["lr"], group["weight_decay"], group["betas"][0]))
        return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=decay)

    def state(self, param: Tensor) -> dict[str, Any]:
        """Codes decoded: each indexes a table and is scaled by its block's largest magnitude."""
        found = super().state(param)
        if not found:
            return {}
        names = self.NAMES[self.optimizer.optimizer_name]  # type: ignore[attr-defined]
        state = {name: _decoded(found, str(number)) for number, name in enumerate(names, 1)}
        return {**_counted({"step": found["step"]}), **state}


class Wrapped(Family):
    """``collage.Compensated``: the inner optimizer's rule, on hi + lo."""

    known = True
    bits = False

    def __init__(self, optimizer: Compensated) -> None:
        super().__init__(optimizer)
        self.outer = optimizer
        self.inner = family_of(optimizer.inner)
        self.elementwise = self.inner.elementwise

    def refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        """The inner optimizer's."""
        return self.inner.refusal(group, param)

    def storage(self, group: dict[str, Any], param: Tensor) -> Storage:
        """The wrapper's, once it has state."""
        return self.outer.storage if self.outer.state.get(param) else Rounded()

    def parts(self, group: dict[str, Any], param: Tensor) -> list[Tensor]:
        """The wrapper's components."""
        return self.outer._parts(param) if self.outer.state.get(param) else [param.detach()]

    def state(self, param: Tensor) -> dict[str, Any]:
        """The inner optimizer's, float32."""
        return self.inner.state(param)

    def v_format(self, group: dict[str, Any], param: Tensor) -> Format | None:
        """The inner optimizer's."""
        return self.inner.v_format(group, param)

    def intended(
        self, group: dict[str, Any], value: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """By the inner optimizer."""
        return self.inner.intended(group, value, grad, state)


class Own(Mapped):
    """``collage.AdamW``, seen from outside: for the figures that its step does not sum up."""

    bits = True
    bits_of_pieces = False
    bits_of_tiles = True

    def rule(self, group: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
        """AdamW."""
        return adam(True, group)

    def storage(self, group: dict[str, Any], param: Tensor) -> Storage:
        """The strategy's, once there is state."""
        layout, state = layout_of(group["strategy"], param), self.optimizer.state.get(param)
        return super().storage(group, param) if layout.param.borne or not state else layout.param

    def parts(self, group: dict[str, Any], param: Tensor) -> list[Tensor]:
        """The strategy's components."""
        layout, state = layout_of(group["strategy"], param), self.optimizer.state.get(param)
        if layout.param.borne or not state:
            return super().parts(group, param)
        return local_parts(layout, param, state)["param"]

    def state(self, param: Tensor) -> dict[str, Any]:
        """The moments' values."""
        state = self.optimizer.state.get(param)
        if not state:
            return {}
        layout = layout_of(self._group(param)["strategy"], param)
        moments = {
            role: getattr(layout, role).exact([local(part) for part in layout.parts(role, param, state)])
            for role in MOMENTS
        }
        return {
            "step": state["step"].clone(),
            **{role: value.view(local(param).shape) for role, value in moments.items()},
        }

    def v_format(self, group: dict[str, Any], param: Tensor) -> Format | None:
        """That of the leading component."""
        dtype = layout_of(group["strategy"], param).exp_avg_sq.components(param.dtype)[0].dtype
        return format_of(dtype) if dtype in SERVED else None

    def raw(self, param: Tensor) -> dict[str, Any]:
        """Everything, as it stands."""
        return {name: local(value) for name, value in self.optimizer.state.get(param, {}).items()}

    def stored(
        self,
        group: dict[str, Any],
        parts: list[Tensor],
        grad: Tensor,
        raw: dict[str, Any],
        like: Tensor,
        **changed: Any,
    ) -> list[Tensor]:
        """By an optimizer of the same strategy: random bits are those of the step."""
        options = {**replay.group_copy(group), **changed}
        param = torch.nn.Parameter(_like(parts, like))
        twin = AdamW([param], **{name: value for name, value in options.items() if name in _OPTIONS})
        if raw:
            twin.state[param] = {name: value.clone() for name, value in raw.items()}
        param.grad = grad.clone().view(like.shape)
        # Not its step(), which runs the hooks that are registered for all optimizers.
        with torch.no_grad():
            twin.advance()
        twins = Own(twin)
        return twins.parts(twin.param_groups[0], param)

    def _group(self, param: Tensor) -> dict[str, Any]:
        return next(group for group in self.optimizer.param_groups if any(each is param for each in group["params"]))


def family_of(optimizer: Optimizer) -> Family:
    """The family of an optimizer."""
    if isinstance(optimizer, Compensated):
        return Wrapped(optimizer)
    if isinstance(optimizer, AdamW):
        return Own(optimizer)
    roots = {cls.__module__.split(".")[0] for cls in type(optimizer).__mro__}
    for root, family, needs in (
        ("optimi", Optimi, "param_groups"),
        ("torchao", TorchAO, "is_adamw"),
        ("bitsandbytes", BitsAndBytes, "optimizer_name"),
        ("deepspeed", DeepSpeed, "adam_w_mode"),
    ):
        if root in roots and hasattr(optimizer, needs):
            return family(optimizer)
    return Family(optimizer)


def _like(parts: list[Tensor], like: Tensor) -> Tensor:
    """What keeps copies of these components, which are as :func:`parts_of` gives them, as ``like`` keeps its own."""
    if not isinstance(like, TiledTensor):
        return parts[0].clone().view(like.shape)
    shaped = [part.clone().view(its.shape) for part, its in zip(parts, parts_of(like), strict=True)]
    return like.with_parts([*shaped[:-1], shaped[-1][:: like.form.rows].contiguous()])


def _dequantized(value: Any) -> Any:
    is_quantized = isinstance(value, Tensor) and type(value) is not Tensor and hasattr(value, "dequantize")
    return value.dequantize() if is_quantized else value


def _counted(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "step": torch.tensor(float(state["step"]))} if "step" in state else state


def _decoded(state: dict[str, Any], number: str) -> Tensor:
    """One of bitsandbytes' states as float32."""
    held = state["state" + number]
    if held.dtype != torch.uint8:
        return held
    scales = state["absmax" + number].repeat_interleave(_BNB_BLOCK)[: math.prod(held.shape)]
    return state["qmap" + number][held.int()] * scales.view(held.shape)

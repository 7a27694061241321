"""Whose optimizer it is: how it holds a parameter, how its state is called, by which rule a step of it is replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from collage.kernels import MOMENTS
from collage.metrics import replay
from collage.numerics import Format, format_of
from collage.optim import AdamW, Compensated
from collage.optim.sharding import is_sharded, local
from collage.optim.strategies import layout_of
from collage.storage import Kahan, Rounded, Storage, form_of

# Rules of torch.optim and of optimi that treat each element by itself: any run of elements may be replayed alone.
ELEMENTWISE = {
    *("torch.optim." + name for name in ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")),
    *("torch.optim." + name for name in ("RMSprop", "Rprop", "SGD")),
    *("optimi." + name for name in ("Adam", "AdamW", "Adan", "Lion", "RAdam", "SGD")),
}
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
SERVED = (torch.bfloat16, torch.float16, torch.float32)
# Of a group of collage.AdamW, what its constructor takes and a step depends on.
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "strategy", "arithmetic", "backend", "maximize", "seed")
# Elements per scale in bitsandbytes' 8-bit states.
_BNB_BLOCK = 256


class Family:
    """Optimizers of one kind; this one: torch's own, and any other ``torch.optim.Optimizer`` by its own ``step``.

    Tensors that the methods return are local parts, of the parameter's shape where they have an entry per element.

    Attributes:
        known: whether its rule is known to do the same in float64; what others do is checked after each replay.
        bits: whether :meth:`stored` can repeat a step's bits.
        bits_of_pieces: whether it can for some of a parameter's elements alone.
    """

    known = False
    bits = True
    bits_of_pieces = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.name = qualified(optimizer)
        self.elementwise = self.name in ELEMENTWISE
        self.known = self.known or self.name.startswith("torch.optim.")

    def refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        """Why a step on this parameter cannot be replayed; None if it can."""
        if isinstance(self.optimizer, torch.optim.LBFGS):
            return "LBFGS reevaluates the model within a step"
        if param.dtype not in SERVED:
            return f"parameters of {param.dtype} are not served"
        if param.grad is not None and local(param.grad).layout != torch.strided:
            return f"the gradient has layout {local(param.grad).layout}"
        if is_sharded(param) and not self.elementwise:
            return f"{self.name} needs the whole of a sharded parameter"
        odd = [name for name, value in self.state(param).items() if not _readable(value)]
        return f"its state {odd[0]!r} is quantised in a way not known here" if odd else None

    def storage(self, group: dict[str, Any], param: Tensor) -> Storage:
        """How the parameter's value is kept."""
        return Rounded()

    def parts(self, group: dict[str, Any], param: Tensor) -> list[Tensor]:
        """The components of the value, leading one first."""
        return [local(param.detach())]

    def state(self, param: Tensor) -> dict[str, Any]:
        """The state, under the names of the rule that replays it."""
        found = self.optimizer.state.get(param, {})
        return {name: local(value) if isinstance(value, Tensor) else value for name, value in found.items()}

    def intended(
        self, group: dict[str, Any], value: Tensor, grad: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The value and the state after the step, in float64; see :func:`collage.metrics.replay.in_float64`."""
        return replay.in_float64(self.optimizer, group, value, grad, state)

    def v_format(self, group: dict[str, Any], param: Tensor) -> Format | None:
        """The format of the stored second moment; None without one, or where it is none of the floating-point ones."""
        found = self.optimizer.state.get(param, {})
        name = second_moment(found)
        held = None if name is None else local(found[name])
        return format_of(held) if type(held) is Tensor and held.dtype in SERVED else None

    def raw(self, param: Tensor) -> dict[str, Any] | None:
        """The state as :meth:`stored` takes it; None: as :meth:`state` gives it."""
        return None

    def stored(
        self,
        group: dict[str, Any],
        parts: list[Tensor],
        grad: Tensor,
        raw: dict[str, Any],
        like: Tensor,
        **changed: Any,
    ) -> list[Tensor]:
        """The components after the same step with ``changed`` options, bit for bit as the optimizer stores them.

        ``parts`` and ``grad`` are those of a piece of the parameter ``like``, flat where rules are elementwise.
        """
        return [replay.as_it_is(self.optimizer, group, parts[0], grad, raw, **changed)]


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

    def refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        """Tiles share scales: no run of elements can be looked at by itself."""
        tiled = form_of(param) is not None
        return "a parameter in tiles is not looked at from outside" if tiled else super().refusal(group, param)

    def rule(self, group: dict[str, Any]) -> Callable[[list[Tensor]], Optimizer]:
        """AdamW."""
        return adam(True, group)

    def storage(self, group: dict[str, Any], param: Tensor) -> Storage:
        """The strategy's, once there is state."""
        return layout_of(group["strategy"], param).param if self.optimizer.state.get(param) else Rounded()

    def parts(self, group: dict[str, Any], param: Tensor) -> list[Tensor]:
        """The strategy's components."""
        state = self.optimizer.state.get(param)
        whole = layout_of(group["strategy"], param).parts("param", param.detach(), state) if state else [param.detach()]
        return list(map(local, whole))

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
        param = torch.nn.Parameter(parts[0].clone().view(like.shape))
        twin = AdamW([param], **{name: value for name, value in options.items() if name in _OPTIONS})
        if raw:
            twin.state[param] = {name: value.clone() for name, value in raw.items()}
        param.grad = grad.clone().view(like.shape)
        # Not its step(), which runs the hooks that are registered for all optimizers.
        with torch.no_grad():
            twin.advance()
        return [part.detach() for part in layout_of(group["strategy"], param).parts("param", param, twin.state[param])]

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


def qualified(optimizer: object) -> str:
    """``torch.optim.AdamW`` for an instance of it: the class under its package's own name."""
    cls = type(optimizer)
    package = "torch.optim" if cls.__module__.startswith("torch.optim.") else cls.__module__.split(".")[0]
    return f"{package}.{cls.__name__}"


def second_moment(state: dict[str, Any]) -> str | None:
    """The name of the moving average of squared gradients in a state; None without one."""
    return next((name for name in SECOND_MOMENTS if isinstance(state.get(name), Tensor)), None)


def _readable(value: Any) -> bool:
    """Whether it is a number, a tensor that float64 can take, or nothing to do with elements."""
    return not isinstance(value, Tensor) or value.numel() <= 1 or (type(value) is Tensor and value.is_floating_point())


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

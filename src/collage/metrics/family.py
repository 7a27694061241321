"""An optimizer as the audit sees it: how it holds a parameter, what its state is called, how a step is replayed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from collage.metrics import replay
from collage.numerics import Format, format_of
from collage.optim.sharding import is_sharded, local
from collage.storage import Rounded, Storage, TiledTensor, form_of

# Rules of torch.optim and of optimi that treat each element by itself: any run of elements may be replayed alone.
ELEMENTWISE = {
    *("torch.optim." + name for name in ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")),
    *("torch.optim." + name for name in ("RMSprop", "Rprop", "SGD")),
    *("optimi." + name for name in ("Adam", "AdamW", "Adan", "Lion", "RAdam", "SGD")),
}
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
SERVED = (torch.bfloat16, torch.float16, torch.float32)


class Family:
    """Optimizers of one kind; this one: torch's own, and any other ``torch.optim.Optimizer`` by its own ``step``.

    Tensors that the methods return are local parts, of the parameter's shape where they have an entry per element.

    Attributes:
        known: whether its rule is known to do the same in float64; what others do is checked after each replay.
        bits: whether :meth:`stored` can repeat a step's bits.
        bits_of_pieces: whether it can for some of a parameter's elements alone.
        bits_of_tiles: whether it can for parameters in tiles.
    """

    known = False
    bits = True
    bits_of_pieces = True
    bits_of_tiles = False

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
        """How the parameter's value is kept; tiles as :func:`parts_of` gives them."""
        form = form_of(param)
        # A row of a tile and its scale are all that an element's value depends on.
        return Rounded() if form is None else replace(form, rows=1, width=form.columns)

    def parts(self, group: dict[str, Any], param: Tensor) -> list[Tensor]:
        """The components of the value, leading one first."""
        return parts_of(local(param.detach()))

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


def parts_of(here: Tensor) -> list[Tensor]:
    """A parameter's own components: itself, or those of tiles, with a scale for each row of each."""
    if not isinstance(here, TiledTensor):
        return [here]
    *numbers, scale = here.parts
    return [*numbers, scale.repeat_interleave(here.form.rows, 0)[: len(here.hi)]]


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

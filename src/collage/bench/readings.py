"""How to read what an optimizer holds after a step, as float64: its weight with its corrections, its second moment.

A package is imported when something of its optimizer is read, never before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from collage.optim.strategies import layout_of

Read = Callable[[Any, nn.Parameter], Tensor]
"""From an optimizer and its parameter to a new float64 tensor of the parameter's shape."""


def _wide(value: Any) -> Tensor:
    """A tensor, or what a package keeps in the place of one, as float64."""
    if hasattr(value, "__tensor_flatten__"):
        value = value.dequantize(torch.float32)
    elif hasattr(value, "materialize"):
        value = value.materialize()
    return value.detach().to(torch.float64, copy=True)


def parameter(stepper: Any, param: nn.Parameter) -> Tensor:
    """The parameter and nothing beside it."""
    return _wide(param)


def exp_avg_sq(stepper: Any, param: nn.Parameter) -> Tensor:
    """The state's entry of torch's name."""
    return _wide(stepper.state[param]["exp_avg_sq"])


@dataclass(frozen=True)
class Reads:
    """How one optimizer is read.

    Attributes:
        weight: the value that its steps add up in; None where that cannot be read.
        second_moment: the moving average of squared gradients.
        corrected: whether it keeps that average divided by 1 - beta2**t.
    """

    weight: Read | None = parameter
    second_moment: Read = exp_avg_sq
    corrected: bool = False


PLAIN = Reads()

# ---- collage and torch ---------------------------------------------------------------------------------------------


def own(role: str) -> Read:
    """A logical tensor of `collage.AdamW` through its storage."""

    def read(stepper: Any, param: nn.Parameter) -> Tensor:
        layout = layout_of(stepper.param_groups[0]["strategy"], param)
        return getattr(layout, role).exact(layout.parts(role, param.detach(), stepper.state[param]))

    return read


def _full_param(stepper: Any, param: nn.Parameter) -> Tensor:
    return stepper.full_param(param, torch.float64)


def _master(stepper: Any, param: nn.Parameter) -> Tensor:
    return _wide(stepper.state["masters"][0])


def _master_second_moment(stepper: Any, param: nn.Parameter) -> Tensor:
    return exp_avg_sq(_Inner(stepper.state["optimizer"]), stepper.state["masters"][0])


@dataclass(frozen=True)
class _Inner:
    state: Any


OWN = Reads(_full_param, own("exp_avg_sq"))
MASTER = Reads(_master, _master_second_moment)

# ---- other packages ------------------------------------------------------------------------------------------------


def _with_kahan(stepper: Any, param: nn.Parameter) -> Tensor:
    return _wide(param) + _wide(stepper.state[param]["kahan_comp"])


def _bitsandbytes(stepper: Any, param: nn.Parameter) -> Tensor:
    state = stepper.state[param]
    if state["state2"].dtype != torch.uint8:
        return _wide(state["state2"])
    dequantize = import_module("bitsandbytes.functional").dequantize_blockwise
    return _wide(dequantize(state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256))


def _decoded(value: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """heavyball's value with its 8-bit correction, where it keeps one."""
    if f"{name}::ecc" in state:
        value = import_module("heavyball.utils")._ULPState(state[f"{name}::ecc"], 127.0).decode(value.detach())
    return _wide(value)


def _heavyball(stepper: Any, param: nn.Parameter) -> Tensor:
    return _decoded(param, stepper.state[param][0], "param")


def _heavyball_second_moment(stepper: Any, param: nn.Parameter) -> Tensor:
    state = stepper.state[param][0]
    name = next(key for key in state if "exp_avg_sq" in key and "::" not in key)
    return _decoded(state[name], state, name)


def _flashoptim(stepper: Any, param: nn.Parameter) -> Tensor:
    return _wide(
        import_module("flashoptim.optimizers").reconstruct_fp32_param(
            param.detach(), stepper.state[param]["error_bits"]
        )
    )


def _transformer_engine(stepper: Any, param: nn.Parameter) -> Tensor:
    return _wide(stepper.state[param]["master_param"])


OPTIMI = Reads(_with_kahan, corrected=True)
BITSANDBYTES = Reads(second_moment=_bitsandbytes)
HEAVYBALL = Reads(_heavyball, _heavyball_second_moment, corrected=True)
FLASHOPTIM = Reads(_flashoptim)
TRANSFORMER_ENGINE, TRANSFORMER_ENGINE_REMAINDERS = Reads(_transformer_engine), Reads(None)

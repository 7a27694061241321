"""`collage bench precision`: what the steps of every optimizer really deliver, on the same gradients step by step.

Three things are measured on one tensor, half of its weights around 1 and half around .02:

- *displacement*: how far the weights went under noisy gradients of a constant mean, as a share of what AdamW in float64
  does on the same gradients;
- *weight decay alone*: under gradients of zero, as a share of the exact decay;
- *the second moment*: the stored one over the exact moving average, with magnitudes that differ within a block and
  gradients that fall threefold after a third of the steps, so that a moment which cannot fall shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from collage import kernels
from collage.bench.contenders import Contender, Stepper
from collage.bench.readings import own
from collage.bench.step import quiet
from collage.bench.timing import error_text
from collage.optim.strategies import strategies
from collage.storage import Tiled

ROW = 128
"""Length of the tensor's rows."""

RATES = (1e-4, 1e-5, 1e-6)
RANGES = ((1.0, 1.5), (0.02, 0.03))
"""Of the weights at the start: the upper and the lower half of the rows."""

MEAN, NOISE = -0.01, 0.01
"""Of the gradients: the weights move away from 0, where nothing gets easier."""

BETAS2 = (0.95, 0.99, 0.999)
SPREAD = 1.15
"""Standard deviation of the logarithm of v within a row."""

DECAY_RATE, DECAY = 1e-3, 1e-2
"""Learning rate and weight decay of the decay alone: 1e-5 of the weight in a step."""

EQUAL = ("exact-fp32-states", "mixed")
"""Strategies that promise the same bits."""


@dataclass(frozen=True)
class PrecisionPlan:
    """What is measured of whom.

    Attributes:
        contenders: in the order of their rows.
        device: where.
        elements: of the tensor, a multiple of 2 * `ROW`.
        steps: of the displacement and of the decay; a second moment gets 6 / (1 - beta2), at most three times as many.
    """

    contenders: tuple[Contender, ...]
    device: torch.device
    elements: int
    steps: int

    def moment_steps(self, beta2: float) -> int:
        """Steps of the second moment at this decay rate."""
        return min(round(6 / (1 - beta2)), 3 * self.steps)

    @property
    def runs(self) -> int:
        """How often every contender starts."""
        return len(RATES) + 1 + len(BETAS2)

    @property
    def all_steps(self) -> int:
        """Steps that every contender makes."""
        return (len(RATES) + 1) * self.steps + sum(map(self.moment_steps, BETAS2))


class Watcher(Protocol):
    """Who is told how it goes."""

    def begins(self, what: str) -> None:
        """A run of all contenders begins."""
        ...

    def stepped(self) -> None:
        """All contenders have made a step."""
        ...


@dataclass
class Found:
    """What was found of one contender.

    Attributes:
        contender: its record.
        backend: that stepped; of collage's own.
        displacement, decay, second_moment: a record for each cell.
        error: why it has fallen out; empty while it has not.
        unread: why its second moment is not told.
    """

    contender: Contender
    backend: str | None = None
    displacement: list[dict[str, Any]] = field(default_factory=list)
    decay: list[dict[str, Any]] = field(default_factory=list)
    second_moment: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    unread: str = ""


@dataclass
class Equality:
    """Whether the strategies of `EQUAL` hold the same bits: weight and both moments, at the end of every run.

    Attributes:
        runs: how many were compared.
        different: entries that differ, over all of them.
    """

    runs: int = 0
    different: int = 0


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass
class _Runner:
    """One contender in one run."""

    found: Found
    param: nn.Parameter
    grad: Tensor
    stepper: Stepper

    def step(self, grad: Tensor) -> None:
        self.param.grad = self.grad.copy_(grad)
        self.stepper.step()

    def weight(self) -> Tensor | None:
        read = self.found.contender.reads.weight
        return None if read is None else read(self.stepper, self.param)


def _attempt(found: Found, action: Callable[[], Any]) -> Any:
    """What an action gives; None, and the contender falls out, where it fails."""
    with quiet(found.contender):
        try:
            return action()
        except Exception as error:
            found.error = error_text(error)
            return None


def _runner(found: Found, start: Tensor, hyper: dict[str, Any]) -> _Runner:
    contender = found.contender
    param = nn.Parameter(start.to(contender.dtype, copy=True))
    grad = param.grad = torch.zeros_like(param)
    params = [param]
    # Whoever builds may exchange a parameter for one as the contender keeps it.
    stepper = contender.build(params, **hyper)
    return _Runner(found, params[0], grad, stepper)


def _run(
    cohort: Sequence[Found],
    start: Tensor,
    hyper: dict[str, Any],
    steps: int,
    gradient: Callable[[int], Tensor],
    watcher: Watcher,
) -> list[_Runner]:
    """Everyone who has not fallen out makes `steps` steps on the same gradients."""
    made = [_attempt(each, lambda each=each: _runner(each, start, hyper)) for each in cohort if not each.error]
    runners: list[_Runner] = [runner for runner in made if runner is not None]
    for index in range(steps):
        grad = gradient(index)
        for runner in runners:
            if not runner.found.error:
                _attempt(runner.found, lambda runner=runner, grad=grad: runner.step(grad))
        watcher.stepped()
    return [runner for runner in runners if not runner.found.error]


def _generator(plan: PrecisionPlan) -> torch.Generator:
    return torch.Generator(plan.device).manual_seed(0)


def _start(plan: PrecisionPlan) -> Tensor:
    """The weights at the start: numbers of bfloat16 (and of float16)."""
    uniform = torch.rand(plan.elements // ROW, ROW, generator=_generator(plan), device=plan.device)
    for (low, high), part in zip(RANGES, uniform.chunk(2), strict=True):
        part.mul_(high - low).add_(low)
    return uniform.to(torch.bfloat16)


def _ranged(values: Tensor) -> list[tuple[str, Tensor]]:
    """The halves of a tensor with the range in which their weights start."""
    names = [f"{low:g} .. {high:g}" for low, high in RANGES]
    return list(zip(names, values.chunk(2), strict=True))


def _displacement(plan: PrecisionPlan, cohort: Sequence[Found], lr: float, watcher: Watcher) -> list[_Runner]:
    start, generator = _start(plan), _generator(plan)
    hyper = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    exact = nn.Parameter(start.double())
    reference = torch.optim.AdamW([exact], **hyper)

    def gradient(index: int) -> Tensor:
        grad = torch.randn(start.shape, generator=generator, device=plan.device).mul_(NOISE).add_(MEAN)
        grad = grad.to(torch.bfloat16)
        exact.grad = grad.double()
        reference.step()
        return grad

    runners = _run(cohort, start, hyper, plan.steps, gradient, watcher)
    wanted = _ranged(exact.detach() - start)
    for runner in runners:
        held = _attempt(runner.found, runner.weight)
        if held is None:
            continue
        for (name, moved), (_, meant) in zip(_ranged(held - start), wanted, strict=True):
            size = meant.mean().abs()
            runner.found.displacement.append(
                {
                    "weights": name,
                    "lr": lr,
                    "share": float(moved.mean() / meant.mean()),
                    "scatter": float((moved - meant).square().mean().sqrt() / size),
                }
            )
    return runners


def _decay(plan: PrecisionPlan, cohort: Sequence[Found], watcher: Watcher) -> list[_Runner]:
    start = _start(plan)
    hyper = {"lr": DECAY_RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": DECAY}
    runners = _run(cohort, start, hyper, plan.steps, lambda index: torch.zeros_like(start), watcher)
    exact = (1 - DECAY_RATE * DECAY) ** plan.steps
    before = _ranged(start.double())
    for runner in runners:
        held = _attempt(runner.found, runner.weight)
        if held is None:
            continue
        for (name, after), (_, first) in zip(_ranged(held), before, strict=True):
            factor = float(after.mean() / first.mean())
            share = (1 - factor) / (1 - exact)
            runner.found.decay.append({"weights": name, "factor": factor, "exact_factor": exact, "share": share})
    return runners


def _second_moment(plan: PrecisionPlan, cohort: Sequence[Found], beta2: float, watcher: Watcher) -> list[_Runner]:
    start, generator, steps = _start(plan), _generator(plan), plan.moment_steps(beta2)

    def normal() -> Tensor:
        return torch.randn(start.shape, generator=generator, device=plan.device)

    size = normal().mul_(SPREAD / 2).exp_().mul_(NOISE)
    exact = torch.zeros(start.shape, dtype=torch.float64, device=plan.device)

    def gradient(index: int) -> Tensor:
        grad = normal().mul_(size).mul_(1.0 if 3 * index < steps else 1 / 3).to(torch.bfloat16)
        wide = grad.double()
        exact.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        return grad

    hyper = {"lr": RATES[0], "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
    runners = _run(cohort, start, hyper, steps, gradient, watcher)
    for runner in runners:
        found, reads = runner.found, runner.found.contender.reads
        try:
            with quiet(found.contender):
                stored = reads.second_moment(runner.stepper, runner.param)
        except Exception as error:
            found.unread = error_text(error)
            continue
        wanted = exact / (1 - beta2**steps) if reads.corrected else exact
        found.second_moment.append({"beta2": beta2, "steps": steps, **tracking(stored, wanted)})
    return runners


def tracking(stored: Tensor, exact: Tensor) -> dict[str, Any]:
    """How a stored second moment lies to the exact one: quantiles and mean of the ratio where the exact one is > 0, and
    how many of these are stored as 0."""
    positive = exact > 0
    ratio = (stored[positive] / exact[positive]).sort().values
    last = len(ratio) - 1
    quantiles = {f"p{round(100 * q)}": float(ratio[round(q * last)]) for q in (0.05, 0.5, 0.95)}
    zeros = int((stored[positive] == 0).sum())
    return {**quantiles, "mean": float(ratio.mean()), "zeros": zeros, "positive": len(ratio)}


# ---- all of it -----------------------------------------------------------------------------------------------------


def _compare(runners: Sequence[_Runner], equality: Equality) -> None:
    """Counts the entries in which the strategies of `EQUAL` differ, if both have run."""
    known = {runner.found.contender.strategy: runner for runner in runners}
    if not known.keys() >= set(EQUAL):
        return
    equality.runs += 1
    for role in ("param", "exp_avg", "exp_avg_sq"):
        first, second = (own(role)(known[name].stepper, known[name].param) for name in EQUAL)
        equality.different += int((first.view(torch.int64) != second.view(torch.int64)).sum())


def measure(plan: PrecisionPlan, watcher: Watcher) -> tuple[list[Found], Equality]:
    """Measures everything; contenders that cannot run or that fail are in the result with the reason."""
    found = [Found(contender) for contender in plan.contenders]
    able = [each for each in found if not each.contender.unavailable]
    for each in able:
        each.backend = _backend(each.contender, plan)
    equality = Equality()
    runs: list[tuple[str, Callable[[], list[_Runner]]]] = [
        *((f"displacement, lr {lr:g}", lambda lr=lr: _displacement(plan, able, lr, watcher)) for lr in RATES),
        ("weight decay alone", lambda: _decay(plan, able, watcher)),
        *((f"second moment, beta2 {b:g}", lambda b=b: _second_moment(plan, able, b, watcher)) for b in BETAS2),
    ]
    # Some peers draw from torch's own generator.
    devices = [plan.device] if plan.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for what, run in runs:
            watcher.begins(what)
            torch.manual_seed(0)
            _compare(run(), equality)
    return found, equality


def _backend(contender: Contender, plan: PrecisionPlan) -> str | None:
    if contender.strategy is None:
        return None
    strategy = strategies()[contender.strategy]
    dtype = strategy.param_dtype(contender.dtype)
    shape = torch.Size((plan.elements // ROW, ROW))
    form = strategy.param.fitted(shape)
    layout = strategy.layout(dtype, shape, form if isinstance(form, Tiled) else None)
    return kernels.choose(layout, "fp32", dtype, plan.device, None)

"""Which strategy a model needs: each is tried on copies of a few steps, module by module, with the storages themselves.

For every parameter an audited step gives its value, the intended update and the second moment before and after, in
float64 (:mod:`collage.metrics.watch`). A strategy is tried by storing the value and the old moment as it keeps them,
adding what the step intends, and looking at what came out. No rule of thumb stands between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collage.metrics.audit import inner_optimizers
from collage.metrics.trials import Trial, Trials, layout_for, module_of, weights_of
from collage.metrics.watch import Watch
from collage.optim import Strategy, strategies
from collage.storage import form_of

# Those that are for study alone, or that 16-bit training does not need.
_NOT_ADVISED = ("naive-8bit", "naive-fp8", "fp32", "light-nearest", "plus-nearest", "kahan")


@dataclass
class Row:
    """The advice for one module.

    Attributes:
        module: its name.
        elements: of its parameters.
        strategy: the cheapest that holds the bounds; None if none does.
        trials: every strategy that was tried, by name, the cheapest first.
    """

    module: str
    elements: int
    strategy: str | None
    trials: dict[str, Trial]


@dataclass
class Advice:
    """The cheapest strategy of each module. ``str`` of it is a table.

    Attributes:
        rows: a row per module.
        bound: the least EDQ ratio.
        dtype: of the parameters that were tried.
        steps: how many steps it comes from.
    """

    rows: list[Row]
    bound: float
    dtype: torch.dtype
    steps: int

    @property
    def bytes(self) -> float | None:
        """Bytes of all modules with the advised strategies; None if a module has none."""
        found = [row.trials[row.strategy].bytes_per_param * row.elements for row in self.rows if row.strategy]
        return sum(found) if len(found) == len(self.rows) else None

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for :class:`collage.AdamW`, one for each strategy, with named parameters.

        Raises:
            ValueError: a parameter of the model that was not tried, or for which no strategy held the bounds, or one in
                tiles whose strategy keeps none, or the other way round.
        """
        advised = {row.module: row.strategy for row in self.rows}
        groups: dict[str, list[tuple[str, Tensor]]] = {}
        known, weights = strategies(), weights_of(model)
        for name, param in model.named_parameters():
            strategy = advised.get(module_of(name))
            if strategy is None:
                raise ValueError(
                    f"there is no strategy for parameter {name!r}: it took no step, or none held the bounds"
                )
            if strategy in known:
                _check_form(name, param, known[strategy], weights)
            groups.setdefault(strategy, []).append((name, param))
        return [{"params": params, "strategy": strategy} for strategy, params in groups.items()]

    def __str__(self) -> str:
        width = max((len(row.module) for row in self.rows), default=6)
        lines = [f"{'module':<{width}}  {'elements':>10}  {'strategy':<18} {'bytes':>5}  EDQ ratio  plain's"]
        for row in self.rows:
            trial = row.trials.get(row.strategy or "")
            plain = row.trials.get("plain")
            lines.append(
                f"{row.module:<{width}}  {row.elements:>10,}  {row.strategy or 'none holds':<18} "
                f"{'-' if trial is None else f'{trial.bytes_per_param:.3g}':>5}  "
                f"{_figure(trial):>9}  {_figure(plain):>7}"
            )
        whole = "" if self.bytes is None else f"; {self.bytes / 2**20:.1f} MiB with gradients"
        return "\n".join([*lines, f"EDQ ratio at least {self.bound:g} in {self.steps} audited steps{whole}"])


def advise(
    model: nn.Module,
    optimizer: Any,
    *,
    take_step: Callable[[], Any] | None = None,
    steps: int = 3,
    bound: float = 0.99,
    decay_bound: float = 0.9,
    noise_bound: float = 1.0,
    candidates: Iterable[str | Strategy] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    memory: int | None = 1 << 28,
    seed: int = 0,
) -> Advice:
    """The cheapest strategy of :class:`collage.AdamW` for each module that keeps the EDQ ratio above a bound.

    Of a sharded model every process calls it, and has the same advice.

    Args:
        model: names the modules.
        optimizer: Adam, AdamW or one of their kin (see :func:`collage.audit`), with a few steps of moments behind it.
        take_step: takes one training step, ``optimizer.step()`` included; ``steps`` of them are audited. None: nothing
            is stepped, the gradients at hand (after ``backward``) say what the next step would be.
        steps: how many.
        bound: the least EDQ ratio.
        decay_bound: the least share of the second moment's decay that must be kept.
        noise_bound: the largest noise: stochastic rounding of a lone parameter keeps updates on average, and adds many
            times their length.
        candidates: the strategies to choose from. None: those that are meant for training in 16 bits, and where the
            model has parameters in tiles, those that keep such. One that is named is also tried for what
            :func:`collage.to_fp8_` would put into tiles.
        dtype: of the model's parameters; float32 ones are tried as rounded to it.
        memory: bytes of copies; of larger models evenly spaced elements are tried.
        seed: of the stochastic roundings.

    Raises:
        ValueError: no gradients, a step that could not be replayed, an optimizer without Adam's moments.
    """
    tried = Trials(model, dtype, list(_chosen(candidates, dtype, model)), seed)
    watches = [
        Watch(each, lambda _: True, lambda *_: None, memory, sink=tried.add) for each in inner_optimizers(optimizer)
    ]
    try:
        for _ in range(steps if take_step is not None else 1):
            if take_step is not None:
                take_step()
                continue
            for watch in watches:
                watch.replay_only()
    finally:
        for watch in watches:
            watch.detach()
    results = tried.results()
    if not results:
        raise ValueError(
            "no step could be replayed: advise takes Adam or AdamW and its kin, after a backward pass, or take_step="
        )
    bounds = (bound, decay_bound, noise_bound)
    rows = [_row(name, *result, bounds) for name, result in results.items()]
    return Advice(rows, bound, dtype, steps if take_step is not None else 1)


def _chosen(candidates: Iterable[str | Strategy] | None, dtype: torch.dtype, model: nn.Module) -> Iterable[Strategy]:
    known = strategies()
    in_tiles = any(form_of(param) is not None for param in model.parameters())
    meant = [each for each in known if each not in _NOT_ADVISED and (in_tiles or not known[each].param.borne)]
    found = meant if candidates is None else candidates
    for each in found:
        strategy = each if isinstance(each, Strategy) else known.get(each)
        if strategy is None:
            raise ValueError(f"no strategy is called {each!r}; there are {', '.join(known)}")
        try:
            strategy.layout(dtype)
        except ValueError:
            if candidates is not None:
                raise
            continue
        yield strategy


def _check_form(name: str, param: Tensor, strategy: Strategy, weights: set[int]) -> None:
    """Raises ValueError where the parameter is not what the strategy has been tried on: in its tiles, or in none."""
    form = form_of(param)
    if form is None and not strategy.param.borne:
        return
    wanted = layout_for(strategy, param.dtype, param, weights).param
    if form is None and wanted.borne:
        raise ValueError(
            f"strategy {strategy.name!r} keeps parameter {name!r} in tiles, got an ordinary one; call "
            f"collage.to_fp8_(model.get_submodule({name.rpartition('.')[0]!r}), {strategy.name!r}) first"
        )
    if form is not None and getattr(wanted, "of", None) != form.of:
        raise ValueError(
            f"strategy {strategy.name!r} cannot keep parameter {name!r}, which is in tiles of {form.of}; make the "
            "model for the advised strategies anew, or give the one that collage.to_fp8_ was given as candidates="
        )


def _row(name: str, elements: int, trials: dict[str, Trial], bounds: tuple[float, float, float]) -> Row:
    holds = [each for each, trial in trials.items() if _holds(trial, *bounds)]
    return Row(name, elements, holds[0] if holds else None, trials)


def _holds(trial: Trial, bound: float, decay_bound: float, noise_bound: float) -> bool:
    if trial.edq_ratio is not None and not trial.edq_ratio >= bound:
        return False
    if trial.decay_kept is not None and not trial.decay_kept >= decay_bound:
        return False
    return trial.noise is None or trial.noise <= noise_bound


def _figure(trial: Trial | None) -> str:
    return "-" if trial is None or trial.edq_ratio is None else f"{trial.edq_ratio:.3f}"

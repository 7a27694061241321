"""Which strategy a model needs: each is tried on copies of a few steps, module by module, with the storages themselves.

For every parameter an audited step gives its value, the intended update and the second moment before and after, in
float64 (:mod:`collage.metrics.watch`). A strategy is tried by storing the value and the old moment as it keeps them,
adding what the step intends, and looking at what came out. No rule of thumb stands between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collage.kernels import total
from collage.metrics.audit import inner_optimizers
from collage.metrics.comparison import Sample
from collage.metrics.watch import Watch
from collage.numerics import random_bits
from collage.optim import Strategy, strategies
from collage.storage import Storage

# Those that are for study alone, or that 16-bit training does not need.
_NOT_ADVISED = ("naive-8bit", "fp32", "light-nearest", "plus-nearest", "kahan")


@dataclass
class Trial:
    """What a strategy made of a module's updates.

    Attributes:
        edq_ratio: <e, u> / ||u||^2 with e what the strategy stored of u; None without an update.
        decay_kept: of the distance by which second moments should have shrunk, the share by which they did; None where
            none should have.
        noise: ||e - u|| / ||u||: what rounding adds beside the update, lost or unbiased.
        bytes_per_param: of the strategy, gradient included.
    """

    edq_ratio: float | None
    decay_kept: float | None
    noise: float | None
    bytes_per_param: float


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
            ValueError: a parameter of the model that was not tried, or for which no strategy held the bounds.
        """
        advised = {row.module: row.strategy for row in self.rows}
        groups: dict[str, list[tuple[str, Tensor]]] = {}
        for name, param in model.named_parameters():
            strategy = advised.get(_module_of(name))
            if strategy is None:
                raise ValueError(
                    f"there is no strategy for parameter {name!r}: it took no step, or none held the bounds"
                )
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
        candidates: the strategies to choose from. None: those that are meant for training in 16 bits.
        dtype: of the model's parameters; float32 ones are tried as rounded to it.
        memory: bytes of copies; of larger models evenly spaced elements are tried.
        seed: of the stochastic roundings.

    Raises:
        ValueError: no gradients, a step that could not be replayed, an optimizer without Adam's moments.
    """
    tried = _Trials(model, dtype, list(_chosen(candidates, dtype)), seed)
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
    if not tried.modules:
        raise ValueError(
            "no step could be replayed: advise takes Adam or AdamW and its kin, after a backward pass, or take_step="
        )
    bounds = (bound, decay_bound, noise_bound)
    rows = [tried.row(name, bounds) for name in tried.modules]
    return Advice(rows, bound, dtype, steps if take_step is not None else 1)


def _chosen(candidates: Iterable[str | Strategy] | None, dtype: torch.dtype) -> Iterable[Strategy]:
    known = strategies()
    found = [name for name in known if name not in _NOT_ADVISED] if candidates is None else candidates
    for each in found:
        strategy = each if isinstance(each, Strategy) else known.get(each)
        if strategy is None:
            raise ValueError(f"no strategy is called {each!r}; there are {', '.join(known)}")
        try:
            if strategy.param.borne:
                raise ValueError(f"strategy {strategy.name!r} keeps weights in tiles, which advise does not try")
            strategy.layout(dtype)
        except ValueError:
            if candidates is not None:
                raise
            continue
        yield strategy


# A decay is small beside the step of an 8-bit code: its mean over so many draws is looked at.
_DRAWS = 8
# Columns: <e,u>, <u,u>, <e-u,e-u>, the way that v shrank, the way that it should have.
_COLUMNS = 5


class _Trials:
    """Sums of what each strategy did, by module."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, chosen: Sequence[Strategy], seed: int) -> None:
        self._names = {id(param): _module_of(name) for name, param in model.named_parameters()}
        self._dtype, self._chosen, self._seed = dtype, chosen, seed
        self.modules: dict[str, dict[str, Tensor]] = {}
        self._elements: dict[str, dict[int, int]] = {}
        self._bytes: dict[str, dict[str, dict[int, float]]] = {}
        self._count = 0

    def add(self, sample: Sample) -> None:
        """Tries every strategy on one piece of a step."""
        name = self._names.get(id(sample.param), "")
        if sample.v is None or sample.m is None:
            raise ValueError("advise needs an optimizer with Adam's moments (exp_avg, exp_avg_sq)")
        self._count += 1
        sums = self.modules.setdefault(
            name, {each.name: torch.zeros(_COLUMNS, dtype=torch.float64) for each in self._chosen}
        )
        key = id(sample.param)
        self._elements.setdefault(name, {})[key] = sample.elements
        for strategy in self._chosen:
            layout = strategy.layout(self._dtype, sample.param.shape)
            per = sum(storage.bytes_per_element(self._dtype) for _, storage in layout.roles) + self._dtype.itemsize
            self._bytes.setdefault(name, {}).setdefault(strategy.name, {})[key] = per
            sums[strategy.name] += sample.weight * self._try(layout, sample)

    def _try(self, layout: Any, sample: Sample) -> Tensor:
        # Whole blocks; which elements of a parameter share one makes no difference to a figure over all of them.
        count = sample.u.numel() - sample.u.numel() % layout.block(self._dtype)
        assert sample.m is not None
        assert sample.v is not None
        kept_m, _, _ = self._kept(layout.exp_avg, *(each[:count] for each in sample.m), draw=2)
        kept_v, shrank, meant = self._kept(layout.exp_avg_sq, *(each[:count] for each in sample.v), draw=1)
        # The update from the moments as this strategy keeps them: they are loaded before they are used.
        m, v = (torch.cat([kept, all_[0][count:]]) for kept, all_ in ((kept_m, sample.m), (kept_v, sample.v)))
        own, u = sample.update(m, v).to(torch.float32)[:count], sample.u[:count]
        moved = self._moved(layout.param, sample.value[:count], own)
        return torch.stack([total(moved * u), total(u * u), total((moved - u) ** 2), shrank, meant]).cpu()

    def _moved(self, storage: Storage, value: Tensor, update: Tensor) -> Tensor:
        """What a stored value moves when ``update`` is added to it."""
        parts = self._parts(storage, value.numel(), value.device)
        held = value.to(torch.float32)
        scratch = torch.empty_like(held)
        storage.store(held.clone(), parts, self._bits(storage, held, 4), scratch)
        before = [part.clone() for part in parts]
        storage.load(parts, held)
        storage.add(parts, held, update.clone(), self._bits(storage, held, 0), scratch)
        return storage.moved(parts, before)

    def _kept(self, storage: Storage, old: Tensor, new: Tensor, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """The old moment as it is kept; by how much what shrinks did when the new one was stored, and should have."""
        parts = self._parts(storage, old.numel(), old.device)
        scratch = torch.empty(old.shape, dtype=torch.float32, device=old.device)
        storage.store(old.to(torch.float32), parts, self._bits(storage, scratch, draw + 4), scratch)
        held = storage.exact(parts)
        # The step adds to what is kept.
        wanted, way = held + (new - old), torch.zeros_like(held)
        draws = _DRAWS if storage.stochastic else 1
        for number in range(draws):
            storage.store(wanted.to(torch.float32), parts, self._bits(storage, scratch, 8 * number + draw), scratch)
            way += (storage.exact(parts) - held) / draws
        shrinks = (new < old) & (old > 0)
        zero = torch.zeros((), dtype=torch.float64, device=old.device)
        return held, total(torch.where(shrinks, way, zero)), total(torch.where(shrinks, new - old, zero))

    def _parts(self, storage: Storage, count: int, device: torch.device) -> list[Tensor]:
        components = storage.components(self._dtype)
        return [torch.zeros(-(-count // each.elements), dtype=each.dtype, device=device) for each in components]

    def _bits(self, storage: Storage, like: Tensor, draw: int) -> Tensor | None:
        if not storage.stochastic:
            return None
        return random_bits(self._seed, self._count, 1 + draw, 0, like.numel(), 0).to(like.device)

    def row(self, name: str, bounds: tuple[float, float, float]) -> Row:
        """The advice for a module."""
        elements = sum(self._elements[name].values())
        trials = {}
        for strategy in self._chosen:
            per = self._bytes[name][strategy.name]
            whole = sum(each * self._elements[name][key] for key, each in per.items())
            trials[strategy.name] = _trial(self.modules[name][strategy.name].tolist(), whole / max(1, elements))
        trials = dict(sorted(trials.items(), key=lambda item: item[1].bytes_per_param))
        holds = [each for each, trial in trials.items() if _holds(trial, *bounds)]
        return Row(name, elements, holds[0] if holds else None, trials)


def _trial(sums: list[float], bytes_per_param: float) -> Trial:
    moved, squares, noise, shrank, meant = sums
    return Trial(
        edq_ratio=moved / squares if squares else None,
        decay_kept=shrank / meant if meant else None,
        noise=math.sqrt(noise / squares) if squares else None,
        bytes_per_param=bytes_per_param,
    )


def _holds(trial: Trial, bound: float, decay_bound: float, noise_bound: float) -> bool:
    if trial.edq_ratio is not None and not trial.edq_ratio >= bound:
        return False
    if trial.decay_kept is not None and not trial.decay_kept >= decay_bound:
        return False
    return trial.noise is None or trial.noise <= noise_bound


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _figure(trial: Trial | None) -> str:
    return "-" if trial is None or trial.edq_ratio is None else f"{trial.edq_ratio:.3f}"

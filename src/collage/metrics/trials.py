"""Strategies tried on the samples of a step: what each stores of the values, updates and moments that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from collage.kernels import Layout, total
from collage.metrics.comparison import Sample
from collage.numerics import random_bits
from collage.optim import Strategy
from collage.storage import Storage, Tiled


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


# A decay is small beside the step of an 8-bit code: its mean over so many draws is looked at.
_DRAWS = 8
# Columns: <e,u>, <u,u>, <e-u,e-u>, the way that v shrank, the way that it should have.
_COLUMNS = 5


class Trials:
    """Sums of what each strategy did, by module.

    Args:
        model: names the modules.
        dtype: of the parameters that are tried.
        chosen: the strategies.
        seed: of the stochastic roundings.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, chosen: Sequence[Strategy], seed: int) -> None:
        self._names = {id(param): module_of(name) for name, param in model.named_parameters()}
        self._weights = weights_of(model)
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
            layout = layout_for(strategy, self._dtype, sample.param, self._weights)
            per = sum(storage.bytes_per_element(self._dtype) for _, storage in layout.roles) + self._dtype.itemsize
            self._bytes.setdefault(name, {}).setdefault(strategy.name, {})[key] = per
            sums[strategy.name] += sample.weight * self._try(layout, sample)

    def _try(self, layout: Layout, sample: Sample) -> Tensor:
        # Whole blocks; which elements of a parameter share one makes no difference to a figure over all of them. So
        # tiles are taken of consecutive elements, the last one less high.
        layout = Layout(*(_of_consecutive(storage) for _, storage in layout.roles))
        components = [each for _, storage in layout.roles for each in storage.components(self._dtype)]
        count = sample.u.numel() - sample.u.numel() % math.lcm(*(each.elements for each in components))
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
        sizes = (-(-count // (each.elements * each.rows)) for each in components)
        return [torch.zeros(n, dtype=each.dtype, device=device) for n, each in zip(sizes, components, strict=True)]

    def _bits(self, storage: Storage, like: Tensor, draw: int) -> Tensor | None:
        if not storage.stochastic:
            return None
        return random_bits(self._seed, self._count, 1 + draw, 0, like.numel(), 0).to(like.device)

    def of(self, name: str) -> tuple[int, dict[str, Trial]]:
        """A module's number of elements, and what came of each strategy, the cheapest first."""
        elements = sum(self._elements[name].values())
        trials = {}
        for strategy in self._chosen:
            per = self._bytes[name][strategy.name]
            whole = sum(each * self._elements[name][key] for key, each in per.items())
            trials[strategy.name] = _trial(self.modules[name][strategy.name].tolist(), whole / max(1, elements))
        return elements, dict(sorted(trials.items(), key=lambda item: item[1].bytes_per_param))


def weights_of(model: nn.Module) -> set[int]:
    """The ``id`` of what :func:`collage.to_fp8_` may put into tiles."""
    return {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))}


def layout_for(strategy: Strategy, dtype: torch.dtype, param: Tensor, weights: set[int]) -> Layout:
    """What the strategy keeps such a parameter with, in tiles where it can be."""
    form = strategy.param.fitted(param.shape) if id(param) in weights else None
    return strategy.layout(dtype, param.shape, form if isinstance(form, Tiled) else None)


def _of_consecutive(storage: Storage) -> Storage:
    return replace(storage, width=storage.columns) if isinstance(storage, Tiled) else storage


def _trial(sums: list[float], bytes_per_param: float) -> Trial:
    moved, squares, noise, shrank, meant = sums
    return Trial(
        edq_ratio=moved / squares if squares else None,
        decay_kept=shrank / meant if meant else None,
        noise=math.sqrt(noise / squares) if squares else None,
        bytes_per_param=bytes_per_param,
    )


def module_of(parameter: str) -> str:
    """The module that a parameter's figures count in; the name of a lone one is its own."""
    return parameter.rpartition(".")[0] or parameter

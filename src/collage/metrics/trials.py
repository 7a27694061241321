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
from collage.optim.sharding import is_sharded, whole_sums
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
    """Sums of what each strategy did, by parameter.

    Args:
        model: names the modules.
        dtype: of the parameters that are tried.
        chosen: the strategies.
        seed: of the stochastic roundings.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, chosen: Sequence[Strategy], seed: int) -> None:
        # A parameter that the optimizer has and the model has not counts under no name.
        self._params: dict[int, tuple[str, Tensor]] = {
            id(param): (module_of(name), param) for name, param in model.named_parameters()
        }
        self._weights = weights_of(model)
        self._dtype, self._chosen, self._seed = dtype, chosen, seed
        self._sums: dict[int, Tensor] = {}
        self._elements: dict[int, int] = {}
        self._count = 0

    def add(self, sample: Sample) -> None:
        """Tries every strategy on one piece of a step."""
        if sample.v is None or sample.m is None:
            raise ValueError("advise needs an optimizer with Adam's moments (exp_avg, exp_avg_sq)")
        self._count += 1
        key = id(sample.param)
        self._params.setdefault(key, ("", sample.param))
        self._elements[key] = sample.elements
        layouts = (layout_for(strategy, self._dtype, sample.param, self._weights) for strategy in self._chosen)
        found = sample.weight * torch.stack([self._try(layout, sample) for layout in layouts])
        self._sums[key] = self._sums.get(key, 0.0) + found

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

    def results(self) -> dict[str, tuple[int, dict[str, Trial]]]:
        """Each module that took a step: its number of elements, and what came of each strategy, the cheapest first. Of
        sharded parameters the same on every process: over the elements of all."""
        found: dict[str, list[tuple[Tensor, int, Tensor]]] = {}
        for (name, param), (*sums, elements) in zip(self._params.values(), self._rows().tolist(), strict=True):
            if elements:
                row = torch.tensor(sums, dtype=torch.float64).view(len(self._chosen), _COLUMNS)
                found.setdefault(name, []).append((row, int(elements), param))
        return {name: self._result(rows) for name, rows in found.items()}

    def _rows(self) -> Tensor:
        """For each parameter the sums of all strategies, and how many elements they stand for."""
        rows = torch.zeros(len(self._params), len(self._chosen) * _COLUMNS + 1, dtype=torch.float64)
        for row, key in zip(rows, self._params, strict=True):
            if key in self._sums:
                row[:-1], row[-1] = self._sums[key].flatten(), self._elements[key]
        params = [param for _, param in self._params.values()]
        sharded = [param for param in params if is_sharded(param)]
        return whole_sums(rows.to(sharded[0].device), params).cpu() if sharded else rows

    def _result(self, rows: list[tuple[Tensor, int, Tensor]]) -> tuple[int, dict[str, Trial]]:
        elements, trials = sum(count for _, count, _ in rows), {}
        for place, strategy in enumerate(self._chosen):
            sums = torch.stack([row[place] for row, _, _ in rows]).sum(0).tolist()
            trials[strategy.name] = _trial(sums, sum(self._bytes(strategy, p) * n for _, n, p in rows) / elements)
        return elements, dict(sorted(trials.items(), key=lambda item: item[1].bytes_per_param))

    def _bytes(self, strategy: Strategy, param: Tensor) -> float:
        """Per element, gradient included."""
        layout = layout_for(strategy, self._dtype, param, self._weights)
        return sum(storage.bytes_per_element(self._dtype) for _, storage in layout.roles) + self._dtype.itemsize


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

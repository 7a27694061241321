"""What the Triton kernels keep on the device for a batch: made at its first step, read and written by every later one.

A kernel reads the addresses of a batch's tensors from a table, so that one launch serves any number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from collage.kernels.contract import DRAWS, SUMS, Batch
from collage.kernels.fused.forms import Stored

# Columns of a tensor's float32 row: beta1, 1 - beta1, beta2, 1 - beta2, step_size, inverse_bias_correction2_sqrt, eps,
# decay (contract.Scalars), and whether the step is skipped.
SCALARS = 9
# Columns of a tensor's float64 row: a step, beta1 and beta2 to its power, beta1, beta2.
POWERS = 5
# Addresses of a tensor: of the gradient, and of two components of each role; 0 where there is no such component. Where
# the parameter is in tiles, of three numbers of each role and of its scales; codes and their scales are the first two.
ADDRESSES = 7
TILE_ADDRESSES = 13


class Tables:
    """The tables of one batch. See ``advance.advance_kernel`` and ``update.step_kernel`` for what stands in them.

    Attributes:
        stored: how each role is stored.
        words: 32-bit random words that an element takes in a step.
        highs: high halves of element indices that a tensor may span.
        entry: elements of a row that share a scale; 1 where none do.
        rows: of a tile, of a parameter in tiles.
        tiles: number of programs over all tensors.
        uploads: how often the table of addresses was written.
        aligned: whether all that stands at the addresses, but for scales, begins at a multiple of 16 bytes; kept for
            parameters in tiles alone.
    """

    def __init__(self, batch: Batch, stored: tuple[Stored, ...], entry: int, rows: int, span: int, across: int) -> None:
        self.device = batch.steps.device
        if self._capturing():
            raise RuntimeError(
                "the first step of these parameters runs inside a CUDA graph capture, where its tables cannot be made; "
                "take at least one step before capturing (torch calls it warm-up)"
            )
        count = len(batch.params)
        self.stored = stored
        draws = [draw for role, draw in DRAWS.items() if getattr(batch.layout, role).stochastic]
        self.words = max(draws, default=-2) // 2 + 1
        self.entry, self.rows = entry, rows
        self._tiled = batch.layout.param.borne
        self._names = _other_names(batch)

        elements = [param.numel() for param in batch.params]
        lasts = [first + max(n, 1) - 1 for first, n in zip(batch.firsts, elements, strict=True)]
        self.highs = max(1 + (last >> 32) - (first >> 32) for first, last in zip(batch.firsts, lasts, strict=True))
        counts = torch.tensor([-(-n // span) * across for n in elements])
        first_tiles = (torch.cumsum(counts, 0) - counts).tolist()
        self.tiles = int(counts.sum())
        shapes = [each for row in zip(elements, batch.firsts, first_tiles, strict=True) for each in row]
        self.shapes = self._upload(shapes).view(count, 3)
        self.owners = torch.repeat_interleave(torch.arange(count, dtype=torch.int32), counts).to(self.device)
        self.ordinals = self._upload(batch.ordinals)

        self.scalars = torch.zeros(count, SCALARS, dtype=torch.float32, device=self.device)
        self.powers = torch.zeros(count, POWERS, dtype=torch.float64, device=self.device)
        size = (count, self.highs, max(self.words, 1), 2)
        self.keys = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._partials: Tensor | None = None

        self.uploads = 0
        self._known: list[int] = []
        self.aligned = True
        self._judged: list[int] = []
        columns = TILE_ADDRESSES if self._tiled else ADDRESSES
        self._addresses = torch.zeros(count, columns, dtype=torch.int64, device=self.device)
        self._reserve: Tensor | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []

    def addresses(self, batch: Batch, grads: Sequence[Tensor]) -> Tensor:
        """The table of addresses, int64 [tensors, ADDRESSES or more], written anew only if one has changed."""
        found: list[int] = []
        for param, state, grad in zip(batch.params, batch.states, grads, strict=True):
            found.append(grad.data_ptr())
            if self._tiled:
                found.extend(_own_addresses(param))
            else:
                found.append(param.data_ptr())
            found.extend(state[name].data_ptr() if name else 0 for name in self._names)
        if self._tiled and found != self._judged:
            self._judged, self.aligned = found, not any(address % 16 for address in self._unscaled(found))
        if self._capturing():
            return self._addresses_of_a_graph(found)
        if self._reserve is None:
            self._reserve = torch.empty(len(found), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        if found != self._known:
            self._addresses.view(-1).copy_(self._upload(found))
            self._known = found
            self.uploads += 1
        return self._addresses

    def _unscaled(self, found: list[int]) -> Iterator[int]:
        """The addresses of all but the scales, of which a row has one at most."""
        scales = {4 * (role + 1) for role in range(3)}
        scales |= {4 * role + 2 for role in range(3) if self.stored[role].second == "scale"}
        return (address for place, address in enumerate(found) if place % TILE_ADDRESSES not in scales)

    def partials(self) -> Tensor:
        """Room for each tile's row of sums: float64 [tiles, len(SUMS)]."""
        if self._partials is None:
            self._partials = torch.empty(self.tiles, len(SUMS), dtype=torch.float64, device=self.device)
        return self._partials

    def _addresses_of_a_graph(self, found: list[int]) -> Tensor:
        """A table of its own for a graph that is being captured: later steps outside of it may have other addresses. A
        replay copies it again from pinned memory, which has been set aside, since none can be allocated now."""
        if self._reserve is None:
            raise RuntimeError(
                "these parameters are stepped twice within CUDA graph captures without a step outside; take one step "
                "outside before each capture"
            )
        host, self._reserve = self._reserve, None
        host.copy_(torch.tensor(found, dtype=torch.int64))
        table = torch.empty_like(self._addresses)
        table.view(-1).copy_(host, non_blocking=True)
        self._captured.append((host, table))
        return table

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _upload(self, values: Sequence[int]) -> Tensor:
        """int64 values on the device, without a synchronisation: torch keeps pinned memory until its copy is done."""
        host = torch.tensor(values, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)


def _other_names(batch: Batch) -> list[str]:
    """Names in ``states`` of a parameter's second component and of two components of each moment; empty where there is
    no such component. Where the parameter bears its own, of four components of each moment, scales of tiles last."""
    names: list[str] = []
    dtype = batch.params[0].dtype
    for role, storage in batch.layout.roles:
        found = storage.state_names(role, dtype)
        if not batch.layout.param.borne:
            names.extend([*found, ""][:2])
        elif role != "param":
            *numbers, scale = found if storage.borne else (*found, "")
            names.extend([*[*numbers, "", ""][:3], scale])
    return names if batch.layout.param.borne else names[1:]


def _own_addresses(param: Tensor) -> list[int]:
    """Of three numbers and the scales of a parameter in tiles."""
    *numbers, scale = (part.data_ptr() for part in getattr(param, "parts"))  # noqa: B009
    return [*[*numbers, 0, 0][:3], scale]

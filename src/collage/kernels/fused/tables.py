"""What the Triton kernels keep on the device for a batch: made at its first step, read and written by every later one.

A kernel reads the addresses of a batch's tensors from a table, so that one launch serves any number of tensors.
"""

from __future__ import annotations

from array import array

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
        uploads: how often the addresses of gradients were written.
        aligned: whether all that stands at the addresses, but for scales, begins at a multiple of 16 bytes; kept for
            parameters in tiles alone.
    """

    def __init__(self, batch: Batch, stored: tuple[Stored, ...], entry: int, rows: int, span: int, across: int) -> None:
        self.device = batch.steps.device
        self._pins = self.device.type == "cuda"
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
        self.shapes = self._upload(torch.tensor(shapes, dtype=torch.int64).view(count, 3))
        self.owners = torch.repeat_interleave(torch.arange(count, dtype=torch.int32), counts).to(self.device)
        self.ordinals = self._upload(torch.tensor(batch.ordinals, dtype=torch.int64))

        self.scalars = torch.zeros(count, SCALARS, dtype=torch.float32, device=self.device)
        self.powers = torch.zeros(count, POWERS, dtype=torch.float64, device=self.device)
        size = (count, self.highs, max(self.words, 1), 2)
        self.keys = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._partials: Tensor | None = None

        self.uploads = 0
        self._known: array[int] | None = None
        self._components = self._addresses_of_components(batch)
        self._aligned_components = self._tiled and not (self._unscaled(self._components) % 16).any()
        self.aligned = False
        self._addresses = self._upload(self._components.clone())
        self._reserve: Tensor | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []

    def addresses(self, grads: array[int]) -> Tensor:
        """The table of addresses, int64 [tensors, ADDRESSES or more], with these of the gradients: written anew only if
        one has moved."""
        if self._tiled:
            self.aligned = self._aligned_components and not any(address % 16 for address in grads)
        if self._capturing():
            return self._addresses_of_a_graph(grads)
        if self._reserve is None:
            self._reserve = torch.empty(self._components.shape, dtype=torch.int64, pin_memory=self._pins)
        if grads != self._known:
            self._addresses[:, 0] = self._upload(torch.frombuffer(grads, dtype=torch.int64))
            self._known = grads
            self.uploads += 1
        return self._addresses

    def _addresses_of_components(self, batch: Batch) -> Tensor:
        """The table on the host, without gradients."""
        rows = []
        for param, state in zip(batch.params, batch.states, strict=True):
            own = _own_addresses(param) if self._tiled else [param.data_ptr()]
            rows.append([0, *own, *(state[name].data_ptr() if name else 0 for name in self._names)])
        return torch.tensor(rows, dtype=torch.int64)

    def _unscaled(self, table: Tensor) -> Tensor:
        """The addresses of all but the scales, of which a row has one at most."""
        scales = {4 * (role + 1) for role in range(3)}
        scales |= {4 * role + 2 for role in range(3) if self.stored[role].second == "scale"}
        return table[:, [column for column in range(TILE_ADDRESSES) if column not in scales]]

    def partials(self) -> Tensor:
        """Room for each tile's row of sums: float64 [tiles, len(SUMS)]."""
        if self._partials is None:
            self._partials = torch.empty(self.tiles, len(SUMS), dtype=torch.float64, device=self.device)
        return self._partials

    def _addresses_of_a_graph(self, grads: array[int]) -> Tensor:
        """A table of its own for a graph that is being captured: later steps outside of it may have other addresses. A
        replay copies it again from pinned memory, which has been set aside, since none can be allocated now."""
        if self._reserve is None:
            raise RuntimeError(
                "these parameters are stepped twice within CUDA graph captures without a step outside; take one step "
                "outside before each capture"
            )
        host, self._reserve = self._reserve, None
        host.copy_(self._components)
        host[:, 0] = torch.frombuffer(grads, dtype=torch.int64)
        table = torch.empty_like(self._addresses)
        table.copy_(host, non_blocking=True)
        self._captured.append((host, table))
        return table

    def _capturing(self) -> bool:
        return self._pins and torch.cuda.is_current_stream_capturing()

    def _upload(self, values: Tensor) -> Tensor:
        """They on the device, without a synchronisation: torch keeps pinned memory until its copy is done."""
        return (values.pin_memory() if self._pins else values).to(self.device, non_blocking=True)


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

"""What is timed: a record for each optimizer, collage's and torch's own; those of other packages stand in `peers`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import collage
from collage.bench.readings import MASTER, OWN, PLAIN, Reads
from collage.storage import Master

BETAS, EPS = (0.9, 0.999), 1e-8
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": BETAS, "eps": EPS, "weight_decay": 1e-2}
"""The hyper-parameters of every contender of `collage bench step`."""


class Stepper(Protocol):
    """An optimizer, as far as a benchmark needs it."""

    state: Any

    def step(self) -> Any:
        """One step on the gradients that the parameters hold."""
        ...


class Build(Protocol):
    """Makes an optimizer; hyper-parameters that are given replace those of `HYPER`."""

    def __call__(self, params: list[nn.Parameter], **hyper: Any) -> Stepper:
        """The optimizer over these parameters."""
        ...


Widths = tuple[tuple[int, ...], tuple[int, ...]]
"""Item sizes of a null kernel's streams: those it reads and writes back, those it only reads."""


@dataclass(frozen=True)
class Streams:
    """Bytes per parameter of every tensor that a step must go through once, whatever its implementation.

    Attributes:
        read_write: of the tensors it reads and writes back.
        read_only: of those it only reads: the gradient.
        write_only: of those it only writes: a low-precision copy of a master.
    """

    read_write: tuple[float, ...]
    read_only: tuple[float, ...]
    write_only: tuple[float, ...] = ()

    @property
    def bytes_moved(self) -> float:
        """The least number of bytes per parameter that a step reads and writes."""
        return 2 * sum(self.read_write) + sum(self.read_only) + sum(self.write_only)

    @property
    def bytes_kept(self) -> float:
        """Bytes per parameter of the tensors themselves."""
        return sum(self.read_write) + sum(self.read_only) + sum(self.write_only)

    def null(self) -> Widths:
        """The streams of its null kernel, each kind in ascending order.

        A store reads its cache line first, so that a tensor which is only written counts as read and written; scales
        of blocks are too small to count.
        """
        both = sorted(int(width) for width in (*self.read_write, *self.write_only) if width >= 1)
        return tuple(both), tuple(sorted(map(int, self.read_only)))


@dataclass(frozen=True)
class Contender:
    """One optimizer to be timed.

    Attributes:
        name: its row's name, unique in a run.
        kind: "reference", "collage", "torch" or "peer".
        build: makes it over parameters that hold gradients.
        streams: what its formats make it move; None where they are not known.
        dtype: of its parameters and gradients.
        distribution: the package whose version its row bears.
        unavailable: why it cannot run here; empty where it can.
        strategy, backend: of collage's own.
        peer: the name by which `--peers` calls it.
        spoils_gradients: whether its step writes to the gradients; they are then restored before each step, untimed.
        most_tensors: above so many parameters it is left out: it compiles them into one graph, for hours; None where it
            does not.
        note: what a reader of its row should know.
        reads: how to read what it holds.
    """

    name: str
    kind: str
    build: Build
    streams: Streams | None
    dtype: torch.dtype
    distribution: str
    unavailable: str = ""
    strategy: str | None = None
    backend: str | None = None
    peer: str | None = None
    spoils_gradients: bool = False
    most_tensors: int | None = None
    note: str = ""
    reads: Reads = PLAIN


def short(dtype: torch.dtype) -> str:
    """`bf16` for torch.bfloat16."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


# ---- collage -------------------------------------------------------------------------------------------------------


def strategy_streams(strategy: collage.Strategy, dtype: torch.dtype) -> Streams:
    """What a step of `strategy` on parameters and gradients of `dtype` reads and writes, from its storages."""
    read_write: list[float] = []
    write_only: list[float] = []
    for _, storage in strategy.layout(dtype).roles:
        widths = [component.bytes_per_element for component in storage.components(dtype)]
        if isinstance(storage, Master):
            write_only.append(widths.pop(0))
        read_write += widths
    return Streams(tuple(read_write), (float(dtype.itemsize),), tuple(write_only))


def own_contenders(strategies: Iterable[str], backends: Iterable[str | None], dtype: torch.dtype) -> list[Contender]:
    """Every strategy with every backend (None: the fastest that serves it), strategies in the outer order."""
    known, backends = collage.strategies(), list(backends)
    return [_own(known[strategy], backend, dtype) for strategy in strategies for backend in backends]


def _own(strategy: collage.Strategy, backend: str | None, dtype: torch.dtype) -> Contender:
    dtype = strategy.param_dtype(dtype)

    def build(params: list[nn.Parameter], **hyper: Any) -> Stepper:
        params[:] = [_as_kept(param, strategy) for param in params]
        return collage.AdamW(params, **{**HYPER, **hyper}, strategy=strategy, backend=backend)

    return Contender(
        name=f"collage {strategy.name}" if backend is None else f"collage {strategy.name}, {backend}",
        kind="collage",
        build=build,
        streams=strategy_streams(strategy, dtype),
        dtype=dtype,
        distribution="torch-collage",
        strategy=strategy.name,
        backend=backend,
        note=strategy.summary,
        reads=OWN,
    )


def _as_kept(param: nn.Parameter, strategy: collage.Strategy) -> nn.Parameter:
    """The parameter, or one in tiles of its value and gradient where the strategy keeps such."""
    form = strategy.param.fitted(param.shape) if param.dim() == 2 else None
    if not isinstance(form, collage.Tiled) or isinstance(param, collage.TiledTensor):
        return param
    tiled = nn.Parameter(collage.TiledTensor.of(param, form))
    tiled.grad = param.grad
    return tiled


# ---- torch ---------------------------------------------------------------------------------------------------------


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies every source to its target, converted."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


class MasterAdamW:
    """torch's AdamW on a float32 copy of low-precision parameters: what a user without a library writes.

    Three passes: gradients up, step, parameters down, on kept buffers.

    Args:
        params: the parameters.
        fused: torch's fused step; otherwise its plain one, a Python loop over the parameters.
        hyper: what replaces entries of `HYPER`.
    """

    def __init__(self, params: list[nn.Parameter], fused: bool = True, **hyper: Any) -> None:
        self._params = params
        self._masters = [nn.Parameter(param.detach().float()) for param in params]
        self._grads: list[Tensor] = [torch.empty_like(master) for master in self._masters]
        for master, grad in zip(self._masters, self._grads, strict=True):
            master.grad = grad
        self._optimizer = torch.optim.AdamW(self._masters, **{**HYPER, **hyper}, fused=fused, foreach=False)

    @property
    def state(self) -> dict[str, Any]:
        """Everything that it keeps between steps."""
        return {"masters": self._masters, "grads": self._grads, "optimizer": self._optimizer.state}

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        copy_all(self._grads, [param.grad for param in self._params if param.grad is not None])
        self._optimizer.step()
        copy_all(self._params, self._masters)


def _torch(**options: Any) -> Build:
    def build(params: list[nn.Parameter], **hyper: Any) -> Stepper:
        return torch.optim.AdamW(params, **{**HYPER, **hyper}, **options)

    return build


_PLAIN = Streams((2, 2, 2), (2,))


def reference(dtype: torch.dtype) -> Contender:
    """torch's fused AdamW with everything in `dtype`: what every ratio is taken to."""
    return Contender(
        name=f"torch fused {short(dtype)}",
        kind="reference",
        build=_torch(fused=True),
        streams=_PLAIN,
        dtype=dtype,
        distribution="torch",
        note="ratio 1; loses small updates",
    )


def torch_contenders(dtype: torch.dtype) -> list[Contender]:
    """torch's other ways to do the same step."""

    def contender(
        name: str, build: Build, streams: Streams, note: str, of: torch.dtype = dtype, reads: Reads = PLAIN
    ) -> Contender:
        return Contender(f"torch {name}", "torch", build, streams, of, "torch", peer="torch", note=note, reads=reads)

    low, lossy = short(dtype), "loses small updates"
    return [
        contender(
            f"fused, fp32 master of {low}",
            MasterAdamW,
            Streams((4, 4, 4), (2,), (2,)),
            "gradient up, step, parameter down: three passes, which move 40 bytes; 4 bytes of its state are its "
            "float32 gradients",
            reads=MASTER,
        ),
        contender("fused fp32", _torch(fused=True), Streams((4, 4, 4), (4,)), "all in float32", torch.float32),
        contender(f"foreach {low}", _torch(foreach=True), _PLAIN, lossy),
        contender(f"for-loop {low}", _torch(foreach=False), _PLAIN, lossy),
    ]


# ---- what it keeps -------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every plain tensor within a state, whatever the package wraps it in."""
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            yield value
        else:
            for name in flatten()[0]:
                yield from _tensors(getattr(value, name))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _tensors(vars(value))


def state_bytes(stepper: Stepper) -> int:
    """Bytes of all tensors that an optimizer keeps between steps, parameters and gradients apart.

    Tensors of one element, which count steps, are left out; memory that two tensors share counts once.
    """
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in _tensors(stepper.state) if t.numel() > 1}
    return sum(sizes.values())

"""A parameter that bears the components of its storage itself, and is read as a bfloat16 tensor.

What computes with it (a matrix product, an embedding) gets bfloat16 values that are made for this use and freed after
it: autograd keeps the components for the backward pass, not the values. Gradients are ordinary bfloat16 tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from collage.numerics import BF16, Format, round_nearest
from collage.storage.contract import Parts
from collage.storage.expansion import Expansion
from collage.storage.remainder import Remainder
from collage.storage.rounded import Rounded
from collage.storage.tiled import Tiled
from collage.version import __version__

FORWARDS = ("value", "hi", "fp8")
_LOW = ("lo", "lo2")
# A faster way than torch's operations to read components, per device type: (tensor) -> bfloat16 [rows, width] or None.
READERS: dict[str, Callable[[TiledTensor], Tensor | None]] = {}


class TiledTensor(Tensor):
    """A bfloat16 tensor of two dimensions whose values are kept in the components of a :class:`Tiled` storage.

    Its value is the components' rounded to bfloat16, or with ``forward="hi"`` that of the leading component alone; with
    "fp8" too, and products of activations with its transpose are of float8 numbers (:mod:`collage.storage.matmul`).
    Operations read it as that. ``copy_`` from a tensor of the same form takes the components as they are; any other
    write rounds what is written into them, to nearest. An index gives a copy, but for whole rows of tiles.

    Attributes:
        form: the storage, fitted to the shape.
        forward: "value", "hi" or "fp8": what a model reads, and how it multiplies.
        transposed: whether the tensor is the transpose of what the components keep.
        hi, lo, lo2, scale: the components, [rows, width] and of the scales [rows of tiles, tiles of a row]; lo and lo2
            as far as the storage has them.
    """

    form: Tiled
    forward: str
    transposed: bool

    @staticmethod
    def __new__(
        cls: type[TiledTensor],
        parts: Parts,
        form: Tiled,
        forward: str = "value",
        transposed: bool = False,
        shape: Sequence[int] | None = None,
    ) -> TiledTensor:
        """Around these components, which are not copied; ``shape`` may be another one of as many elements."""
        rows, width = parts[0].shape
        if shape is None:
            shape = (width, rows) if transposed else (rows, width)
        strides = (1, width) if transposed else torch.empty(tuple(shape), device="meta").stride()
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, tuple(shape), strides=strides, dtype=torch.bfloat16, device=parts[0].device
        )

    def __init__(
        self, parts: Parts, form: Tiled, forward: str = "value", transposed: bool = False, shape: Any = None
    ) -> None:
        if forward not in FORWARDS:
            raise ValueError(f"forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
        self.form, self.forward, self.transposed = form, forward, transposed
        for name, part in zip(self.names_of(form), parts, strict=True):
            setattr(self, name, part)

    @staticmethod
    def names_of(form: Tiled) -> tuple[str, ...]:
        """What the components of such a tensor are called as attributes, leading one first."""
        count = len(form.of.components(torch.bfloat16))
        return ("hi", *_LOW[: count - 1], "scale")

    @property
    def part_names(self) -> tuple[str, ...]:
        """What the components are called as attributes, leading one first."""
        return self.names_of(self.form)

    @staticmethod
    def of(value: Tensor, form: Tiled, forward: str = "value") -> TiledTensor:
        """A new one that holds ``value`` (floating, [rows, width]) rounded to nearest."""
        found = TiledTensor(new_parts(form, value.shape, value.device), form, forward)
        found.encode_(value)
        return found

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The components, leading one first."""
        return tuple(getattr(self, name) for name in self.part_names)

    def with_parts(self, parts: Parts, shape: Sequence[int] | None = None) -> TiledTensor:
        """The same around other components."""
        return TiledTensor(parts, self.form, self.forward, self.transposed, shape)

    @torch.no_grad()
    def encode_(self, value: Tensor) -> None:
        """Rounds values of the components' shape into them, to nearest."""
        full = value.detach().to(self.device, torch.float32, copy=True).reshape(self.hi.shape).contiguous()
        self.form.store(full, self.parts, None, torch.empty_like(full))

    def exact(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the components hold together: a plain tensor of torch.float32 or torch.float64."""
        return self._as_seen(self.form.exact(self.parts).to(dtype))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:  # type: ignore[override]
        """The values as operations read them: a plain tensor."""
        return self._as_seen(self._read()).to(dtype)

    def _read(self) -> Tensor:
        """bfloat16 values as the components stand."""
        reader = READERS.get(self.hi.device.type) if type(self.hi) is Tensor else None
        found = None if reader is None else reader(self)
        return read(self.form, self.parts, self.forward) if found is None else found

    def _as_seen(self, values: Tensor) -> Tensor:
        return values.t() if self.transposed else values.view(self.shape)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """For compilers: the names of the components, and the rest."""
        return list(self.part_names), (self.form, self.forward, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: tuple[Any, ...], size: Any, stride: Any) -> TiledTensor:
        """The inverse of :meth:`__tensor_flatten__`."""
        form, forward, transposed = rest
        return TiledTensor([inner[name] for name in TiledTensor.names_of(form)], form, forward, transposed, tuple(size))

    def _stable_hash_for_caching(self) -> str:
        """For compilers that keep what they have compiled: what decides on that, and whose operations they were."""
        parts = [(part.dtype, part.shape, part.stride(), str(part.device)) for part in self.parts]
        kind = (self.form, self.forward, self.transposed, self.shape, self.requires_grad)
        return hashlib.blake2b(repr((__version__, kind, parts)).encode()).hexdigest()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Components as bytes: pickle knows no 8-bit numbers that are not integers."""
        parts = [part.view(torch.uint8) for part in self.parts]
        flags = (self.requires_grad, isinstance(self, torch.nn.Parameter))
        return _rebuilt, (parts, self.form, self.forward, self.transposed, tuple(self.shape), *flags)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and form: the contents are those of :meth:`dequantize`."""
        return f"TiledTensor({tuple(self.shape)}, {self.form.of}, tiles of {self.form.rows} x {self.form.columns})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :mod:`collage.storage.operations`."""
        from collage.storage.operations import dispatch

        return dispatch(func, args, kwargs or {})

    # ---- FSDP2: the stored bytes are what is gathered ----------------------------------------------------------------

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Bytes of this process's rows. Where the processes have unequal numbers of rows, FSDP pads tensors of the
        parameter's own shape alone, and the scales, which are few, are gathered at once. A process that is alone has
        all; FSDP then copies the first tensor, and no other."""
        world = mesh.size()
        *numbers, scale = (part.view(torch.uint8) for part in self.parts)
        if world == 1:
            return (scale,), None
        if outer_size[0] % world == 0:
            return (*numbers, scale), None
        rows = -(-outer_size[0] // world)
        padded = [_padded(each, rows) for each in numbers]
        scale = _padded(scale, rows // self.form.rows)
        gathered = [torch.empty_like(scale) for _ in range(world)]
        torch.distributed.all_gather(gathered, scale.contiguous(), group=mesh.get_group())
        return tuple(padded), (torch.cat(gathered), outer_size[0])

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole parameter around the gathered bytes."""
        alone = len(outputs) == 1
        if metadata is not None:
            scale, rows = metadata
            outputs = (*(each[:rows] for each in outputs), scale[: -(-rows // self.form.rows)])
        if out is not None:
            whole = getattr(out, "_local_tensor", out)
            assert isinstance(whole, TiledTensor), "FSDP hands back what it was given"
            if alone:
                for name, part in zip(self.part_names, self.parts, strict=True):
                    setattr(whole, name, part)
            if metadata is not None:
                whole.scale.copy_(outputs[-1])
            return None
        dtypes = (component.dtype for component in self.form.components(torch.bfloat16))
        parts = self.parts if alone else [each.view(dtype) for each, dtype in zip(outputs, dtypes, strict=True)]
        return self.with_parts(parts), outputs

    hi: Tensor
    lo: Tensor
    lo2: Tensor
    scale: Tensor


def form_of(tensor: Any) -> Tiled | None:
    """How a parameter is kept, or None where it is an ordinary tensor; of a sharded one as of its local part."""
    return getattr(getattr(tensor, "_local_tensor", tensor), "form", None)


def read(form: Tiled, parts: Parts, forward: str) -> Tensor:
    """The definition of what a model reads: bfloat16 of the parts' shape."""
    shown = form
    if forward != "value":
        shown = Tiled(Rounded(form.format), form.rows, form.columns, width=form.width)
        parts = (parts[0], parts[-1])
    out = torch.empty_like(parts[0], dtype=torch.float32)
    return round_nearest(shown.load(parts, out), BF16)


def new_parts(form: Tiled, shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """Components that hold zeros."""
    found = [
        torch.empty(component.shape(torch.Size(shape)), dtype=component.dtype, device=device)
        for component in form.components(torch.bfloat16)
    ]
    form.clear(found)
    return found


def _rebuilt(
    parts: list[Tensor], form: Tiled, forward: str, transposed: bool, shape: Any, requires_grad: bool, is_param: bool
) -> Tensor:
    """What a pickle of a tensor calls."""
    dtypes = (component.dtype for component in form.components(torch.bfloat16))
    parts = [part.view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
    tensor = TiledTensor(parts, form, forward, transposed, None if transposed else shape)
    return torch.nn.Parameter(tensor, requires_grad) if is_param else tensor.requires_grad_(requires_grad)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    if tensor.shape[0] == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


# So that torch.load reads such tensors with weights_only, its default.
torch.serialization.add_safe_globals([_rebuilt, Tiled, Rounded, Expansion, Remainder, Format])

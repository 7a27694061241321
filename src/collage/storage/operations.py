"""What operations do with a :class:`TiledTensor`: some know its components, the others get its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from collage.storage.matmul import product
from collage.storage.tensor import TiledTensor, new_parts
from collage.storage.tiled import Tiled

aten = torch.ops.aten
_OPERATIONS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on arguments some of which are such tensors."""
    known = _OPERATIONS.get(func)
    if known is not None:
        found = known(func, args, kwargs)
        if found is not NotImplemented:
            return found
    if isinstance(args[0] if args else None, TiledTensor) and _writes(func._schema.arguments[0]):
        return _write(func, args, kwargs)
    _refuse_written(func, args, kwargs)
    args, kwargs = tree_map_only(TiledTensor, TiledTensor.dequantize, (args, kwargs))
    return func(*args, **kwargs)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _operation(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATIONS.update(dict.fromkeys(functions, implementation))
        return implementation

    return register


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation in place: on the values, which are rounded into the components again."""
    tensor = args[0]
    others, kwargs = tree_map_only(TiledTensor, TiledTensor.dequantize, (args[1:], kwargs))
    value = tensor.dequantize()
    func(value, *others, **kwargs)
    tensor.encode_(value.t() if tensor.transposed else value)
    return tensor


def _refuse_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises where an operation would write into a copy."""
    values = [*args, *kwargs.values()]
    for argument, value in zip(func._schema.arguments, values, strict=False):
        several = value if isinstance(value, (list, tuple)) else [value]
        if _writes(argument) and any(isinstance(each, TiledTensor) for each in several):
            raise NotImplementedError(
                f"{func} cannot write into a parameter in tiles; let it write into .dequantize(), and copy_ that back"
            )


@_operation(aten.detach.default, aten.alias.default)
def _same(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].with_parts(args[0].parts, None if args[0].transposed else args[0].shape)


@_operation(aten.clone.default)
def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].with_parts([part.clone() for part in args[0].parts], None if args[0].transposed else args[0].shape)


@_operation(aten.t.default, aten.transpose.int, aten.permute.default)
def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, *dims = args
    order = [dim % 2 for dim in (dims[0] if func is aten.permute.default else dims)]
    if tensor.dim() != 2 or (func is not aten.t.default and sorted(order) != [0, 1]):
        return NotImplemented
    if func is aten.permute.default and order == [0, 1]:
        return _same(func, args, kwargs)
    return TiledTensor(tensor.parts, tensor.form, tensor.forward, not tensor.transposed)


@_operation(aten.view.default, aten._unsafe_view.default, aten.as_strided.default)
def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, size = args[:2]
    size = [tensor.numel() if n == -1 else n for n in size] if list(size) == [-1] else list(size)
    flat = size == [tensor.numel()] and not tensor.transposed
    if size != list(tensor.shape) and not flat:
        return NotImplemented
    if func is aten.as_strided.default and (tuple(args[2]) != tensor.stride() or any(args[3:])):
        return NotImplemented
    return tensor.with_parts(tensor.parts, None if tensor.transposed else size)


@_operation(aten.copy_.default)
def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    to, source = args[:2]
    if not isinstance(to, TiledTensor):
        return to.copy_(source.dequantize(torch.promote_types(to.dtype, torch.bfloat16)))
    alike = isinstance(source, TiledTensor) and (source.form, source.transposed) == (to.form, to.transposed)
    if alike and source.hi.shape == to.hi.shape:
        for mine, theirs in zip(to.parts, source.parts, strict=True):
            mine.copy_(theirs)
        return to
    exact = source.exact() if isinstance(source, TiledTensor) else source
    value = exact.expand(to.shape)
    to.encode_(value.t() if to.transposed else value)
    return to


@_operation(aten._to_copy.default)
def _to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    if kwargs.get("dtype") not in (None, torch.bfloat16):
        return NotImplemented
    device = kwargs.get("device") or tensor.device
    parts = [part.to(device, non_blocking=kwargs.get("non_blocking", False), copy=True) for part in tensor.parts]
    return tensor.with_parts(parts, None if tensor.transposed else tensor.shape)


@_operation(aten.empty_like.default)
def _empty_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of the same form, as a module's ``to_empty`` needs it."""
    tensor = args[0]
    if kwargs.get("dtype") not in (None, torch.bfloat16) or tensor.transposed:
        return _like(func, args, kwargs)
    device = kwargs.get("device") or tensor.device
    return tensor.with_parts(new_parts(tensor.form, tensor.hi.shape, device), tensor.shape)


@_operation(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.rand_like.default)
def _like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Plain tensors, as gradients and moments are."""
    tensor, *others = args
    shown = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return func(shown, *others, **{**kwargs, "device": kwargs.get("device") or tensor.device})


@_operation(aten.new_zeros.default, aten.new_empty.default)
def _new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of the same form where rows of as many elements are wanted, which is how FSDP makes room for a shard."""
    tensor, size = args[:2]
    device = kwargs.get("device") or tensor.device
    rows_of_ours = len(size) == 2 and size[1] == tensor.hi.shape[1] and not tensor.transposed
    if rows_of_ours and kwargs.get("dtype") in (None, torch.bfloat16):
        return tensor.with_parts(new_parts(tensor.form, size, device))
    return func(torch.empty(0, dtype=torch.bfloat16, device=device), size, **kwargs)


@_operation(aten.slice.Tensor)
def _slice(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, (dim, start, end, step) = args[0], (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
    if tensor.dim() != 2 or tensor.transposed or step != 1 or dim not in (0, -2):
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(tensor.shape[0])
    return _rows(tensor, begin, max(begin, stop)) if _whole_tiles(tensor, begin, stop) else NotImplemented


@_operation(aten.split.Tensor)
def _split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, size, dim = args[0], args[1], args[2] if len(args) > 2 else 0
    rows = tensor.shape[0]
    if tensor.transposed or dim not in (0, -2) or tensor.dim() != 2:
        return NotImplemented
    if size >= rows:
        return [_same(func, args, kwargs)]
    if size % tensor.form.rows or rows % tensor.form.rows:
        raise ValueError(
            f"a parameter of {rows} rows in tiles of {tensor.form.rows} cannot be split into parts of {size} rows, "
            "which are no whole tiles; make it for as many processes with collage.to_fp8_(model, shards=...)"
        )
    return [_rows(tensor, begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _whole_tiles(tensor: TiledTensor, begin: int, end: int) -> bool:
    rows = tensor.form.rows
    return begin % rows == 0 and (end % rows == 0 or end == tensor.shape[0])


def _rows(tensor: TiledTensor, begin: int, end: int) -> TiledTensor:
    *numbers, scale = tensor.parts
    rows = tensor.form.rows
    return tensor.with_parts([*(part[begin:end] for part in numbers), scale[begin // rows : -(-end // rows)]])


@_operation(aten.embedding.default)
def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Reads the rows that are looked up, and no others."""
    tensor, indices = args[:2]
    if tensor.transposed:
        return NotImplemented
    flat, rows = indices.reshape(-1), tensor.form.rows
    *numbers, scale = tensor.parts
    found = [part.view(torch.uint8)[flat].view(part.dtype) for part in numbers]
    one_row = Tiled(tensor.form.of, 1, tensor.form.columns, width=tensor.form.width)
    looked_up = TiledTensor([*found, scale[flat // rows]], one_row, tensor.forward)
    return looked_up.dequantize().view(*indices.shape, -1)


@_operation(aten.mm.default, aten.addmm.default)
def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of activations with a weight's transpose, as a Linear layer makes it; that of gradients is with the weight."""
    *bias, x, weight = args
    tiled = isinstance(weight, TiledTensor) and not isinstance(x, TiledTensor)
    if not tiled or weight.forward != "fp8" or not weight.transposed or x.dtype != torch.bfloat16:
        return NotImplemented
    return product(func, bias[0] if bias else None, x, weight, kwargs)

"""The table of precision strategies: which storage keeps the parameter and each moment."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from collage.kernels import ROLES, Layout
from collage.numerics import BF16, E4M3FN, FP16, FP32, Format
from collage.storage import Blockwise, Expansion, Kahan, Master, Remainder, Rounded, Storage, Tiled, form_of


@dataclass(frozen=True)
class Strategy:
    """A choice of how each logical tensor of the training state is stored.

    Attributes:
        name: for tables and checkpoints.
        param: storage of the parameter.
        exp_avg: storage of AdamW's first moment m.
        exp_avg_sq: storage of its second moment v.
        summary: one line for people; no part of the comparison of strategies.
        small: what keeps the parameters that one of the storages cannot keep, or None if they keep all. For storages in
            blocks or tiles these are parameters of one dimension, of less than 4,096 elements, and those whose rows
            (all behind the first dimension) no even number of 32 to 128 divides; where parameters are kept in tiles,
            also those that :func:`collage.to_fp8_` has not put there.

    Storages whose format is None take the parameter's own.
    """

    name: str
    param: Storage
    exp_avg: Storage
    exp_avg_sq: Storage
    summary: str = field(default="", compare=False)
    small: Strategy | None = None

    def layout(self, dtype: torch.dtype, shape: torch.Size | None = None, form: Tiled | None = None) -> Layout:
        """The storages for parameters of ``dtype``: a float32 parameter steps as plain float32 whatever the strategy.

        Args:
            dtype: of the parameters.
            shape: of the whole parameter. None: one that every storage can keep, in blocks of their nominal size.
            form: how the parameter is kept, if it bears its components (:func:`collage.to_fp8_`).

        Raises:
            ValueError: the strategy cannot serve parameters of this dtype or shape.
        """
        if dtype == torch.float32:
            return Layout(_NEAREST, _NEAREST, _NEAREST)
        if dtype not in LOW_PRECISION:
            allowed = ", ".join(str(each) for each in (*LOW_PRECISION, torch.float32))
            raise ValueError(
                f"strategy {self.name!r} cannot serve parameters of {dtype}; allowed: {allowed}. Cast the model, for "
                "example with collage.to_low_precision(model, torch.bfloat16)"
            )
        own = self.param_dtype(dtype)
        if own != dtype:
            raise ValueError(
                f"strategy {self.name!r} keeps parameters in {own}, got a parameter of {dtype}; cast the model to "
                f"{own} or take a strategy for low-precision parameters such as 'plus'"
            )
        nominal = (self.param, self.exp_avg, self.exp_avg_sq)
        if shape is None:
            return Layout(*nominal)
        if form is not None:
            self._check_form(form)
        param, exp_avg, exp_avg_sq = (storage.fitted(shape) for storage in nominal)
        if self.param.borne:
            param = form
        if param is not None and exp_avg is not None and exp_avg_sq is not None:
            return Layout(param, exp_avg, exp_avg_sq)
        if self.small is None or form is not None:
            raise ValueError(
                f"strategy {self.name!r} cannot keep a parameter of shape {tuple(shape)} and names no strategy for "
                "small parameters; give Strategy(..., small=...), for example collage.strategies()['fp32-states']"
            )
        return self.small.layout(dtype, shape)

    def _check_form(self, form: Tiled) -> None:
        """Raises ValueError unless parameters in tiles are kept as this strategy keeps them."""
        if not isinstance(self.param, Tiled) or form.of != self.param.of:
            raise ValueError(
                f"strategy {self.name!r} keeps no parameters in tiles of {form.of}; take the strategy that "
                "collage.to_fp8_ was given, or give this one to it"
            )

    def param_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a model's parameters where ``dtype`` is wanted: that, or the one that the strategy fixes.

        Raises:
            ValueError: the strategy cannot serve parameters of this dtype.
        """
        try:
            return self.param.param_dtype(dtype)
        except ValueError as error:
            raise ValueError(f"strategy {self.name!r} cannot serve parameters of {dtype}: {error}") from error

    def bytes_per_param(self, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> float:
        """Bytes per parameter: the parameter with its extras, both moments, and the gradient in the parameter's dtype.

        Args:
            dtype: of the model's parameters; a strategy that fixes their format (fp32) counts with its own.
            grad: whether to count the gradient.

        Parameters that ``small`` keeps are not counted: of a large model they are a thousandth.
        """
        # A float32 parameter steps as plain float32, see layout(); the strategy "fp32" counts as such for any dtype.
        storages = [_NEAREST if dtype == torch.float32 else getattr(self, role) for role in ROLES]
        stored = sum(storage.bytes_per_element(dtype) for storage in storages)
        return stored + (storages[0].param_dtype(dtype).itemsize if grad else 0)

    @property
    def has_working_arithmetic(self) -> bool:
        """Whether ``arithmetic="working"`` is defined for it."""
        return all(getattr(self, role).has_working_arithmetic for role in ROLES)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints and run files."""
        record: dict[str, Any] = {"name": self.name, "summary": self.summary}
        for role in ROLES:
            record[role] = plain(getattr(self, role))
        return record if self.small is None else {**record, "small": self.small.to_dict()}

    @staticmethod
    def from_dict(record: dict[str, Any]) -> Strategy:
        """The inverse of :meth:`to_dict`."""
        storages = {role: from_plain(record[role]) for role in ROLES}
        small = Strategy.from_dict(record["small"]) if "small" in record else None
        return Strategy(record["name"], **storages, summary=record.get("summary", ""), small=small)


def plain(storage: Storage) -> dict[str, Any]:
    """A storage's record in plain types."""
    found: dict[str, Any] = {"storage": type(storage).__name__}
    for each in fields(storage):  # pyright: ignore[reportArgumentType] - every storage is a dataclass
        value = getattr(storage, each.name)
        inner = plain(value) if isinstance(value, Storage) else value
        found[each.name] = value.name if isinstance(value, Format) else inner
    return found


def from_plain(record: dict[str, Any]) -> Storage:
    """The inverse of :func:`plain`."""
    settings = {key: from_plain(value) if isinstance(value, dict) else value for key, value in record.items()}
    kind = _STORAGES[record["storage"]]
    return kind(**{name: value for name, value in settings.items() if name != "storage"})


LOW_PRECISION = (torch.bfloat16, torch.float16)
_KINDS = (Rounded, Expansion, Kahan, Master, Remainder, Blockwise, Tiled)
_STORAGES: dict[str, type[Storage]] = {each.__name__: each for each in _KINDS}
_NEAREST = Rounded()
_FP32 = Rounded(FP32)
_UNBIASED = Expansion(2, rounding="stochastic")
_UNBIASED_SCALED = Expansion(2, rounding="stochastic", scaled=True)
_CODES = (Blockwise("softsign"), Blockwise("root4"))
_E4M3 = Rounded(E4M3FN)
_WIDE = Strategy("wide", _UNBIASED_SCALED, _FP32, _FP32, "hi + lo, lo unbiased, with float32 moments")
_WIDE_NEAREST = Strategy("wide-nearest", _NEAREST, _FP32, _FP32, "parameter to nearest, float32 moments")

_TABLE = (
    Strategy("plain", _NEAREST, _NEAREST, _NEAREST, "everything to nearest: loses small updates (paper: A)"),
    Strategy("stochastic", Rounded(rounding="stochastic"), _NEAREST, _NEAREST, "parameter rounded stochastically"),
    Strategy("kahan", Kahan(), _NEAREST, _NEAREST, "parameter with a Kahan compensation"),
    Strategy("light", _UNBIASED, _NEAREST, _NEAREST, "parameter as hi + lo, lo unbiased (paper: B)"),
    Strategy("plus", _UNBIASED, _NEAREST, _UNBIASED, "parameter and v as hi + lo, lo unbiased (paper: C)"),
    Strategy("light-nearest", Expansion(2), _NEAREST, _NEAREST, "light with lo to nearest, as published"),
    Strategy("plus-nearest", Expansion(2), _NEAREST, Expansion(2), "plus with lo to nearest, as published"),
    Strategy("fp32-states", _NEAREST, _FP32, _FP32, "moments in float32, parameter to nearest (paper: D^-MW)"),
    Strategy("mixed", Master(), _FP32, _FP32, "float32 master copy and moments (paper: D)"),
    Strategy("fp32", _FP32, _FP32, _FP32, "everything in float32"),
    Strategy(
        "exact", Remainder(16), _NEAREST, _UNBIASED, "parameter with a 16-bit remainder: float32; moments of plus"
    ),
    Strategy("exact-fp32-states", Remainder(16), _FP32, _FP32, "as mixed to the bit, without a master copy"),
    Strategy(
        "compact",
        Remainder(8, rounding="stochastic"),
        *_CODES,
        "parameter with an 8-bit remainder, moments in 8 bits, unbiased",
        _WIDE,
    ),
    Strategy(
        "compact-4bit",
        Remainder(4, rounding="stochastic"),
        *_CODES,
        "compact with a 4-bit remainder",
        _WIDE,
    ),
    Strategy(
        "fp16",
        Expansion(2, FP16, "stochastic", scaled=True),
        Rounded(BF16),
        Expansion(2, BF16, "stochastic"),
        "float16 parameter as hi + scaled lo; moments keep bfloat16's range",
    ),
    Strategy(
        "naive-8bit",
        _NEAREST,
        Blockwise("softsign", rounding="nearest"),
        Blockwise("root4", rounding="nearest"),
        "for study: moments in 8 bits, everything to nearest",
        _WIDE_NEAREST,
    ),
    Strategy(
        "fp8",
        Tiled(Remainder(8, E4M3FN, "stochastic")),
        *_CODES,
        "float8 parameter with an 8-bit remainder (collage.to_fp8_), moments in 8 bits, unbiased",
        _WIDE,
    ),
    Strategy(
        "fp8-native",
        Tiled(Expansion(2, E4M3FN, "stochastic", scaled=True)),
        Tiled(_E4M3, rows=1),
        Tiled(Rounded(E4M3FN, "stochastic"), rows=1, root=True),
        "everything in float8: parameter as hi + lo, lo unbiased (collage.to_fp8_), m, root of v unbiased",
        _WIDE,
    ),
    Strategy(
        "fp8-3",
        Tiled(Expansion(3, E4M3FN, scaled=True)),
        Tiled(Expansion(2, E4M3FN, scaled=True), rows=1),
        Tiled(Expansion(3, E4M3FN, scaled=True), rows=1, root=True),
        "float8 parameter and root of v as three numbers, m as two, to nearest (collage.to_fp8_)",
        Strategy("wide-master", Master(), _FP32, _FP32, "float32 master copy and moments"),
    ),
    Strategy(
        "naive-fp8",
        Tiled(_E4M3),
        Tiled(_E4M3, rows=1),
        Tiled(_E4M3, rows=1, root=True),
        "for study: parameter (collage.to_fp8_), m and root of v as lone float8 numbers, to nearest",
        _WIDE_NEAREST,
    ),
)


def strategies() -> dict[str, Strategy]:
    """Name -> record of every strategy, in the order of the documentation's table."""
    return {strategy.name: strategy for strategy in _TABLE}


def layout_of(strategy: str | Strategy | dict[str, Any], param: Tensor) -> Layout:
    """The storages of one parameter: of the whole of it, where it is sharded."""
    return _layout(resolve(strategy), param.dtype, param.shape, form_of(param))


@lru_cache(maxsize=4096)
def _layout(strategy: Strategy, dtype: torch.dtype, shape: torch.Size, form: Tiled | None) -> Layout:
    return strategy.layout(dtype, shape, form)


def resolve(strategy: str | Strategy | dict[str, Any]) -> Strategy:
    """The record that a name, a record or a record's plain form means.

    Raises:
        ValueError: no record bears the name; the message lists those there are.
        TypeError: it is something else.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, dict):
        return Strategy.from_dict(strategy)
    if not isinstance(strategy, str):
        raise TypeError(f"strategy must be a name or a collage.Strategy, got {type(strategy).__name__}")
    known = strategies()
    if strategy not in known:
        raise ValueError(f"no strategy is called {strategy!r}; there are {', '.join(known)}")
    return known[strategy]

"""The step written once more, on single Python numbers with exact rationals: shares no code with the package.

Every number here is a Python float that is a number of its format; every operation is done on :class:`Fraction` and
rounded once by :func:`nearest`. Written from the design's tables: the rule in float32 or in the format, the storages,
and the record of a strategy as plain words.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

# name: bits of the significand, exponent of the smallest normal number, largest finite number
FORMATS = {
    "bf16": (8, -126, Fraction(255 * 2**120)),
    "fp16": (11, -14, Fraction(65504)),
    "fp32": (24, -126, Fraction((2**24 - 1) * 2**104)),
    "e4m3fn": (4, -6, Fraction(448)),
    "e5m2": (3, -14, Fraction(57344)),
}
SATURATING = ("e4m3fn",)


def _exponent(x: Fraction) -> int:
    """floor(log2 x) of a positive rational."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def spacing(x: Fraction, fmt: str) -> Fraction:
    """Distance of the format's numbers around x."""
    precision, emin, _ = FORMATS[fmt]
    return Fraction(2) ** ((max(_exponent(abs(x)), emin) if x else emin) - precision + 1)


def _finish(magnitude: Fraction, sign: float, fmt: str) -> float:
    largest = FORMATS[fmt][2]
    if magnitude > largest:
        return math.copysign(float(largest) if fmt in SATURATING else math.inf, sign)
    return math.copysign(float(magnitude), sign)


def nearest(x: Fraction | float, fmt: str, sign: float | None = None) -> float:
    """x rounded to the nearest number, ties to even; ``sign`` decides the sign of a zero."""
    if isinstance(x, float):
        if not math.isfinite(x):
            return math.copysign(448.0, x) if fmt in SATURATING and math.isinf(x) else x
        x, sign = Fraction(x), x
    q = spacing(Fraction(x), fmt)
    return _finish(Fraction(round(abs(x) / q)) * q, float(x) if x else (sign or 0.0), fmt)


def stochastic(x: float, fmt: str, bits: int) -> float:
    """The magnitude q floor(|x| / q + bits / 2^16), with q the spacing at x."""
    if not math.isfinite(x):
        return nearest(x, fmt)
    exact = Fraction(x)
    q = spacing(exact, fmt)
    return _finish(math.floor(abs(exact) / q + Fraction(bits, 2**16)) * q, x, fmt)


@dataclass(frozen=True)
class Arithmetic:
    """+, -, *, / and square root, each rounded once into one format. Scalars of any precision may stand right."""

    fmt: str

    def _do(self, a: float, b: float, exact: Callable[[], Fraction], ieee: Callable[[], float]) -> float:
        if not (math.isfinite(a) and math.isfinite(b)):
            return nearest(ieee(), self.fmt)
        value = exact()
        return nearest(value, self.fmt, ieee() if value == 0 else None)

    def add(self, a: float, b: float) -> float:
        return self._do(a, b, lambda: Fraction(a) + Fraction(b), lambda: a + b)

    def sub(self, a: float, b: float) -> float:
        return self._do(a, b, lambda: Fraction(a) - Fraction(b), lambda: a - b)

    def mul(self, a: float, b: float) -> float:
        return self._do(a, b, lambda: Fraction(a) * Fraction(b), lambda: a * b)

    def div(self, a: float, b: float) -> float:
        if b == 0:
            return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
        return self._do(a, b, lambda: Fraction(a) / Fraction(b), lambda: a / b)

    def sqrt(self, a: float) -> float:
        if a == 0 or not math.isfinite(a):
            return a
        x = Fraction(a)
        shift = 200 - 2 * (_exponent(x) // 2)
        scaled = x * Fraction(2) ** shift
        root = math.isqrt(scaled.numerator // scaled.denominator)
        # A half-unit is added where the root is not exact, so that it can be taken for a tie nowhere.
        exact = Fraction(root) if root * root == scaled else root + Fraction(1, 2)
        return nearest(exact / Fraction(2) ** (shift // 2), self.fmt)

    def two_sum(self, a: float, b: float) -> tuple[float, float]:
        s = self.add(a, b)
        return s, self.sub(float(Fraction(a) + Fraction(b) - Fraction(s)), 0.0)

    def two_prod(self, a: float, b: float) -> tuple[float, float]:
        p = self.mul(a, b)
        return p, nearest(Fraction(a) * Fraction(b) - Fraction(p), self.fmt)

    def fast_two_sum(self, a: float, b: float) -> tuple[float, float]:
        s = self.add(a, b)
        return s, self.sub(b, self.sub(s, a))


FP32 = Arithmetic("fp32")


@dataclass(frozen=True)
class Words:
    """A strategy in words: how the parameter and both moments are kept. ``None`` as a format is the parameter's own."""

    param: str
    v: str
    moments: str | None = None
    own: str | None = None


STRATEGIES = {
    "plain": Words("nearest", "nearest"),
    "stochastic": Words("stochastic", "nearest"),
    "kahan": Words("kahan", "nearest"),
    "light": Words("pair-stochastic", "nearest"),
    "plus": Words("pair-stochastic", "pair-stochastic"),
    "light-nearest": Words("pair-nearest", "nearest"),
    "plus-nearest": Words("pair-nearest", "pair-nearest"),
    "fp32-states": Words("nearest", "nearest", moments="fp32"),
    "mixed": Words("master", "nearest", moments="fp32"),
    "fp32": Words("nearest", "nearest", moments="fp32", own="fp32"),
    "exact": Words("exact", "pair-stochastic"),
    "exact-fp32-states": Words("exact", "nearest", moments="fp32"),
    # Parameters of one dimension, which have no blocks.
    "compact": Words("scaled-pair-stochastic", "nearest", moments="fp32"),
    "compact-4bit": Words("scaled-pair-stochastic", "nearest", moments="fp32"),
    "fp16": Words("scaled-pair-stochastic", "pair-stochastic", moments="bf16"),
    "naive-8bit": Words("nearest", "nearest", moments="fp32"),
    # Parameters that are not in tiles.
    "fp8": Words("scaled-pair-stochastic", "nearest", moments="fp32"),
    "fp8-native": Words("scaled-pair-stochastic", "nearest", moments="fp32"),
    "fp8-3": Words("master", "nearest", moments="fp32"),
    "naive-fp8": Words("nearest", "nearest", moments="fp32"),
}
# What each serves; 16 bits behind float16 are more than float32 has.
SERVED = {name: ("bf16", "fp16") for name in STRATEGIES} | {
    "fp32": ("fp32",),
    "exact": ("bf16",),
    "exact-fp32-states": ("bf16",),
    "fp16": ("fp16",),
    **dict.fromkeys(("fp8", "fp8-native", "fp8-3", "naive-fp8"), ("bf16",)),
}
CASES = [(name, fmt) for name, formats in SERVED.items() for fmt in formats]


@dataclass(frozen=True)
class Hyper:
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


def scalars(hyper: Hyper, step: int) -> dict[str, float]:
    """In float64; powers by repeated multiplication."""
    power1 = power2 = 1.0
    for _ in range(step):
        power1 *= hyper.beta1
        power2 *= hyper.beta2
    root = math.sqrt(1.0 - power2)
    return {
        "b1": hyper.beta1,
        "1-b1": 1.0 - hyper.beta1,
        "b2": hyper.beta2,
        "1-b2": 1.0 - hyper.beta2,
        "step_size": -hyper.lr / (1.0 - power1),
        "root_bc2": root,
        "1/root_bc2": 1.0 / root,
        "eps": hyper.eps,
        "decay": hyper.lr * hyper.weight_decay,
    }


def store_pair(x: float, fmt: str, bits: int | None, scale: int = 1) -> tuple[float, float]:
    """x onto the grid of the low part, then split anew: (hi, lo) with hi = RN(hi + lo); lo is kept times ``scale``."""
    hi = nearest(x, fmt)
    if not math.isfinite(hi):
        return hi, 0.0
    rest = float((Fraction(x) - Fraction(hi)) * scale)
    lo = nearest(rest, fmt) if bits is None else stochastic(rest, fmt, bits)
    total = Fraction(hi) + Fraction(lo) / scale
    hi = nearest(total, fmt)
    if not math.isfinite(hi):
        return hi, 0.0
    return hi, nearest((total - Fraction(hi)) * scale, fmt)


@dataclass
class Element:
    """One element of a parameter with its state, stepped by either arithmetic."""

    words: Words
    fmt: str
    param: float
    extra: float = 0.0  # lo, the compensation, or the value itself
    m: float = 0.0
    v: float = 0.0
    v_lo: float = 0.0
    step: int = field(default=0)

    def __post_init__(self) -> None:
        if self.holds_value:
            self.extra = self.param

    @property
    def holds_value(self) -> bool:
        """Whether ``extra`` is the float32 value."""
        return self.words.param in ("master", "exact")

    @property
    def scale(self) -> int:
        """What the low part is kept times."""
        return 2**11 if self.words.param.startswith("scaled") and self.fmt == "fp16" else 1

    @property
    def remainder(self) -> float:
        """How far the value's pattern is from that of hi, as numbers that grow with the magnitude."""
        patterns = (struct.unpack("<i", struct.pack("<f", abs(x)))[0] for x in (self.extra, self.param))
        return float(next(patterns) - next(patterns))

    @property
    def held(self) -> Fraction:
        """The value that the components hold together."""
        return Fraction(self.extra) if self.holds_value else Fraction(self.extra) / self.scale + Fraction(self.param)

    # ---- arithmetic="fp32" -----------------------------------------------------------------------------------------

    def step_fp32(self, g: float, hyper: Hyper, bits: Callable[[int], int]) -> float:
        """``bits(draw)`` gives the element's random bits: draw 0 rounds the parameter, 1 the second moment."""
        self.step += 1
        f = FP32
        k = {name: nearest(value, "fp32") for name, value in scalars(hyper, self.step).items()}
        m = f.add(f.mul(self.m, k["b1"]), f.mul(g, k["1-b1"]))
        v_before = f.add(self.v_lo, self.v)
        v = f.add(f.mul(v_before, k["b2"]), f.mul(f.mul(g, g), k["1-b2"]))
        bottom = f.add(f.mul(f.sqrt(v), k["1/root_bc2"]), k["eps"])
        u = f.div(f.mul(m, k["step_size"]), bottom)
        p = self.value()
        if k["decay"] != 0:
            u = f.sub(u, f.mul(p, k["decay"]))
        self._keep_moments(m, v, bits)
        self._add_fp32(p, u, bits)
        return u

    def value(self) -> float:
        """What the strategy holds, as float32."""
        if self.holds_value:
            return self.extra
        return FP32.add(self.extra / self.scale, self.param)

    def _keep_moments(self, m: float, v: float, bits: Callable[[int], int]) -> None:
        fmt = self.words.moments or self.fmt
        self.m = nearest(m, fmt)
        if self.words.v == "nearest":
            self.v = nearest(v, fmt)
        else:
            draw = bits(1) if self.words.v == "pair-stochastic" else None
            self.v, self.v_lo = store_pair(v, fmt, draw)

    def _add_fp32(self, p: float, u: float, bits: Callable[[int], int]) -> None:
        kind, fmt, f = self.words.param, self.fmt, FP32
        if kind == "kahan":
            c = nearest(f.add(u, self.extra), fmt)
            new = nearest(f.add(c, self.param), fmt)
            moved = nearest(f.sub(new, self.param), fmt)
            self.extra, self.param = nearest(f.sub(c, moved), fmt), new
            return
        value = f.add(p, u)
        if kind == "nearest":
            self.param = nearest(value, fmt)
        elif kind == "stochastic":
            self.param = stochastic(value, fmt, bits(0))
        elif kind == "master":
            self.param, self.extra = nearest(value, fmt), value
        elif kind == "exact":
            # A draw of one half: ties go away from zero.
            self.param, self.extra = stochastic(value, fmt, 2**15), value
        else:
            draw = bits(0) if kind.endswith("pair-stochastic") else None
            self.param, self.extra = store_pair(value, fmt, draw, self.scale)

    # ---- arithmetic="working": paper section 4, operation by operation ----------------------------------------------

    def step_working(self, g: float, hyper: Hyper) -> None:
        self.step += 1
        f = Arithmetic(self.fmt)
        k = scalars(hyper, self.step)
        g = nearest(g, self.fmt)
        self.m = f.add(f.mul(self.m, k["b1"]), f.mul(g, k["1-b1"]))
        square = f.mul(f.mul(g, g), k["1-b2"])
        if self.words.v == "nearest":
            self.v = f.add(f.mul(self.v, k["b2"]), square)
        else:
            self.v, self.v_lo = self._grow(f, *self._times(f, self.v, self.v_lo, k["b2"]), square)
        bottom = f.add(f.div(f.sqrt(self.v), k["root_bc2"]), k["eps"])
        u = f.div(f.mul(self.m, k["step_size"]), bottom)
        if k["decay"] != 0:
            u = f.sub(u, f.mul(self.param, k["decay"]))
        self._add_working(f, u)

    def _times(self, f: Arithmetic, hi: float, lo: float, factor: float) -> tuple[float, float]:
        """mul of section 3, with the factor as an expansion of the format."""
        b = nearest(factor, self.fmt)
        c = nearest(Fraction(factor) - Fraction(b), self.fmt)
        p, e = f.two_prod(hi, b)
        low = f.add(f.add(f.mul(lo, b), f.mul(hi, c)), e)
        return f.fast_two_sum(p, low)

    @staticmethod
    def _grow(f: Arithmetic, hi: float, lo: float, a: float) -> tuple[float, float]:
        """grow of section 3."""
        s, e = f.two_sum(hi, a)
        return f.fast_two_sum(s, f.add(lo, e))

    def _add_working(self, f: Arithmetic, u: float) -> None:
        if self.words.param == "nearest":
            self.param = f.add(self.param, u)
        elif self.words.param == "pair-nearest":
            self.param, self.extra = self._grow(f, self.param, self.extra, u)
        else:
            c = f.add(self.extra, u)
            new = f.add(self.param, c)
            self.extra, self.param = f.sub(c, f.sub(new, self.param)), new

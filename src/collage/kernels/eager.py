"""The definition of the step, in plain torch operations. Every other backend is bit-equal to it.

Tensors are walked in pieces on kept float32 buffers: whole-tensor temporaries are freshly mapped memory each time and
cost ten times as much as the arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from collage.kernels.contract import DRAWS, SUMS, Batch, Inputs, Layout, Scalars, total
from collage.numerics import (
    add_scalar,
    counter,
    div_rn,
    div_scalar,
    format_of,
    mul_rn,
    mul_scalar,
    round_nearest,
    sqrt_rn,
    sub_rn,
)

# Elements per piece, less what is no whole block; a row of tiles where that is more. It divides 2**32, as the blocks of
# tensors with so many elements do: no piece straddles a boundary of the random keys.
CHUNK = 1 << 17

Parts = dict[str, list[Tensor]]


class _Buffers(threading.local):
    """Scratch of one piece, kept per thread and device."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of this name, as long as ``like``."""
        return self._kept_or((name, like.device, dtype), like.numel(), torch.empty)

    def _kept_or(self, key: tuple[str, torch.device, torch.dtype], count: int, make: Callable[..., Tensor]) -> Tensor:
        if key not in self._kept or self._kept[key].numel() < count:
            # A tensor made in inference mode could not be written outside of it, by any later step of the thread.
            with torch.inference_mode(False):
                self._kept[key] = make(max(CHUNK, count), dtype=key[2], device=key[1])
        return self._kept[key][:count]

    def index(self, like: Tensor) -> Tensor:
        """0, 1, 2, ... as int32, as long as ``like``."""
        return self._kept_or(("index", like.device, torch.int32), like.numel(), torch.arange)


_buffers = _Buffers()


def step(batch: Batch, inputs: Inputs) -> Tensor | None:
    """One AdamW step over all tensors of a batch, in place.

    Returns:
        None, or where ``inputs.audit`` a float64 tensor [number of parameters, len(SUMS)] on the batch's device.
    """
    rule = _working if batch.arithmetic == "working" else _fp32
    rows = []
    for number, taken in enumerate(batch.steps.tolist()):
        row = batch.params[number].new_zeros(len(SUMS), dtype=torch.float64)
        scalars = Scalars.of(inputs.hyper, int(taken) + 1, batch.arithmetic)
        for parts, grad, start in _pieces(batch, inputs, number):
            before = _snapshot(parts) if inputs.audit else None
            bits = _Draws((batch.seed, batch.ordinals[number], int(taken) + 1), start, grad)
            gradient = _gradient(inputs, grad)
            squares = gradient.to(torch.float64) ** 2 if inputs.audit else None
            update = rule(batch.layout, scalars, parts, gradient, bits, inputs.audit)
            if before is not None and squares is not None:
                row += _sums(batch.layout, inputs.hyper.beta2, parts, before, update, squares)
        rows.append(row)
    batch.steps.add_(1.0)
    if not inputs.audit:
        return None
    return torch.stack(rows) if rows else torch.zeros(0, len(SUMS), dtype=torch.float64)


def _pieces(batch: Batch, inputs: Inputs, number: int) -> Iterator[tuple[Parts, Tensor, int]]:
    """Flat pieces of one parameter's components and gradient, with the index of their first element."""
    param, state, first = batch.params[number], batch.states[number], batch.firsts[number]
    whole = {
        role: [*zip(batch.layout.parts(role, param, state), storage.components(param.dtype), strict=True)]
        for role, storage in batch.layout.roles
    }
    grad = inputs.grads[number].view(-1)
    block = batch.layout.block(param.dtype)
    chunk = max(CHUNK - CHUNK % block, block)
    start = 0
    while start < param.numel():
        # Pieces end where the whole parameter's would, so that none straddles a boundary of the random keys.
        end = min(start + chunk - (first + start) % chunk, param.numel())
        piece = {role: [component.cut(part, start, end) for part, component in parts] for role, parts in whole.items()}
        yield piece, grad[start:end], first + start
        start = end


def _gradient(inputs: Inputs, grad: Tensor) -> Tensor:
    """The gradient as float32 in a buffer: unscaled, and turned round for maximisation."""
    gradient = _buffers.take("gradient", grad).copy_(grad)
    if inputs.grad_scale is not None:
        gradient.div_(inputs.grad_scale.to(grad.device, torch.float32))
    return gradient.neg_() if inputs.hyper.maximize else gradient


class _Draws:
    """Random bits of one piece; a word is made once and serves two draws."""

    def __init__(self, key: tuple[int, int, int], start: int, like: Tensor) -> None:
        self._key = key
        self._start = start
        self._like = like
        self._made: int | None = None

    def __call__(self, role: str) -> Tensor:
        """The draw that rounds ``role``: int32 in [0, 2**16), in a buffer."""
        word = _buffers.take("word", self._like, torch.int32)
        scratch = _buffers.take("draw", self._like, torch.int32)
        wanted = DRAWS[role] // 2
        if self._made != wanted:
            keys = counter.keys(*self._key, wanted, self._start >> 32)
            low = self._start & 0xFFFFFFFF
            # The sum wraps round in 32 bits, as an unsigned index does.
            torch.add(_buffers.index(self._like), counter.as_int32(low), out=word)
            counter.words(word, keys, out=word, scratch=scratch)
            self._made = wanted
        return counter.draw(word, DRAWS[role], out=scratch)


Bits = Callable[[str], Tensor]


def _fp32(layout: Layout, k: Scalars, parts: Parts, g: Tensor, bits: Bits, audit: bool) -> Tensor:
    """Load, do the rule in float32, store. Returns the intended update (kept only for an audited step)."""
    p, m, v, a = (_buffers.take(name, g) for name in ("param", "exp_avg", "exp_avg_sq", "a"))
    wide = _buffers.take("wide", g, torch.float64)
    for role, out in (("param", p), ("exp_avg", m), ("exp_avg_sq", v)):
        getattr(layout, role).load(parts[role], out)
    # m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) (g g)
    torch.mul(g, k.one_minus_beta1, out=a)
    m.mul_(k.beta1).add_(a)
    torch.mul(g, g, out=a).mul_(k.one_minus_beta2)
    v.mul_(k.beta2).add_(a)
    # u = (step_size m) / (sqrt(v) / sqrt(bc2) + eps) - decay p. torch's float32 square root is not correctly rounded.
    a.copy_(wide.copy_(v).sqrt_()).mul_(k.inverse_bias_correction2_sqrt).add_(k.eps)
    u = torch.mul(m, k.step_size, out=g).div_(a)
    if k.decay != 0:
        u.sub_(torch.mul(p, k.decay, out=a))
    intended = u.clone() if audit else u
    for role, value in (("exp_avg", m), ("exp_avg_sq", v)):
        storage = getattr(layout, role)
        storage.store(value, parts[role], bits(role) if storage.stochastic else None, a)
    layout.param.add(parts["param"], p, u, bits("param") if layout.param.stochastic else None, a)
    return intended


def _working(layout: Layout, k: Scalars, parts: Parts, gradient: Tensor, bits: Bits, audit: bool) -> Tensor:
    """The same rule with every operation rounded once to the format (paper section 4, operation by operation). Scalars
    stay float64; the square root and the weight decay read hi alone."""
    g = round_nearest(gradient, format_of(parts["param"][0]))
    layout.exp_avg.working_average(parts["exp_avg"], k.beta1, mul_scalar(g, k.one_minus_beta1))
    layout.exp_avg_sq.working_average(parts["exp_avg_sq"], k.beta2, mul_scalar(mul_rn(g, g), k.one_minus_beta2))
    m, v, theta = (parts[role][0] for role in ("exp_avg", "exp_avg_sq", "param"))
    root = div_scalar(sqrt_rn(v), k.bias_correction2_sqrt)
    u = div_rn(mul_scalar(m, k.step_size), add_scalar(root, k.eps))
    if k.decay != 0:
        u = sub_rn(u, mul_scalar(theta, k.decay))
    layout.param.working_add(parts["param"], u)
    return u


def _snapshot(parts: Parts) -> Parts:
    return {role: [tensor.clone() for tensor in parts[role]] for role in ("param", "exp_avg_sq")}


def _sums(layout: Layout, beta2: float, after: Parts, before: Parts, update: Tensor, squares: Tensor) -> Tensor:
    """One piece's row of :data:`SUMS`."""
    u = update.to(torch.float64)
    moved = layout.param.moved(after["param"], before["param"])
    moved_hi = layout.param.seen(after["param"]) - layout.param.seen(before["param"])
    v = layout.exp_avg_sq.exact(before["exp_avg_sq"])
    decaying = (v > 0) & ((beta2 * v + (1.0 - beta2) * squares - v).abs() > 0)
    moved_v = layout.exp_avg_sq.moved(after["exp_avg_sq"], before["exp_avg_sq"])
    wanted = u != 0
    return torch.stack(
        [
            total(moved * u),
            total(moved_hi * u),
            total(u * u),
            wanted.sum(),
            (wanted & (moved == 0)).sum(),
            (wanted & (moved_hi == 0)).sum(),
            decaying.sum(),
            (decaying & (moved_v == 0)).sum(),
        ]
    ).to(torch.float64)

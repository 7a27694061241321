"""The Triton kernel that goes before each step: it counts, and computes all that is one number per tensor.

Nothing of a step is computed on the host, so that a captured CUDA graph replays as the steps themselves would run.
"""

# Triton's annotations are values, not types.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from collage.kernels.fused import tables
from collage.kernels.fused.elements import mix64

SCALARS = tl.constexpr(tables.SCALARS)
POWERS = tl.constexpr(tables.POWERS)


@triton.jit
def number(bits):
    """The float64 whose pattern an integer argument is: Triton passes a Python float as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "count",
        "highs",
        "seed",
        "lr_bits",
        "beta1_bits",
        "beta2_bits",
        "eps_bits",
        "weight_decay_bits",
    ],
    do_not_specialize_on_alignment=["steps", "lr_tensor", "found_inf"],
)
def advance_kernel(
    steps,
    powers,
    scalars,
    keys,
    ordinals,
    shapes,
    lr_tensor,
    found_inf,
    count: tl.int64,
    highs: tl.int64,
    seed: tl.int64,
    lr_bits: tl.int64,
    beta1_bits: tl.int64,
    beta2_bits: tl.int64,
    eps_bits: tl.int64,
    weight_decay_bits: tl.int64,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Advances ROWS tensors of a batch; none where ``found_inf`` is not 0.

    Args:
        steps: float32 [count], counted up.
        powers: float64 [count, POWERS], kept between the steps.
        scalars: float32 [count, SCALARS], written.
        keys: int32 [count, highs, WORDS, 2], written: of every word, and of every high half of an element's index.
        ordinals: int64 [count].
        shapes: int64 [count, 3], see ``tables.Tables``.
        lr_tensor: one float that counts instead of ``lr_bits``, or None.
        found_inf: one float, or None.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < count
    every = tl.zeros([ROWS], tl.float64)
    scalar = scalars + row * SCALARS
    skipped = every
    if found_inf is not None:
        skipped += (tl.load(found_inf) != 0).to(tl.float64)
    tl.store(scalar + 8, skipped.to(tl.float32), mask=mask)
    mask = mask & (skipped == 0)
    taken = tl.load(steps + row, mask=mask, other=0.0)
    tl.store(steps + row, taken + 1.0, mask=mask)
    step = taken.to(tl.int32) + 1

    beta1, beta2 = number(beta1_bits), number(beta2_bits)
    power1, power2 = advance_powers(powers + row * POWERS, step, every + beta1, every + beta2, mask)
    lr = number(lr_bits)
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float64)
    tl.store(scalar, (every + beta1).to(tl.float32), mask=mask)
    tl.store(scalar + 1, (every + (1.0 - beta1)).to(tl.float32), mask=mask)
    tl.store(scalar + 2, (every + beta2).to(tl.float32), mask=mask)
    tl.store(scalar + 3, (every + (1.0 - beta2)).to(tl.float32), mask=mask)
    # Not -lr, which some versions of Triton make 0 - lr: the sign of a zero would be another.
    tl.store(scalar + 4, (lr * -1.0 / (1.0 - power1)).to(tl.float32), mask=mask)
    tl.store(scalar + 5, (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32), mask=mask)
    tl.store(scalar + 6, (every + number(eps_bits)).to(tl.float32), mask=mask)
    tl.store(scalar + 7, (every + lr * number(weight_decay_bits)).to(tl.float32), mask=mask)
    if WORDS > 0:
        ordinal = tl.load(ordinals + row, mask=mask, other=0)
        state = mix64(seed.to(tl.int64).to(tl.uint64, bitcast=True))
        state = mix64(mix64(state ^ ordinal.to(tl.uint64, bitcast=True)) ^ step.to(tl.uint64))
        first_high = tl.load(shapes + row * 3 + 1, mask=mask, other=0) >> 32
        i = 0
        while i < highs:
            high = (first_high + i).to(tl.uint64, bitcast=True)
            for word in tl.static_range(WORDS):
                store_keys(keys + ((row * highs + i) * WORDS + word) * 2, state, high, word, mask)
            i += 1


@triton.jit
def advance_powers(kept, step, beta1, beta2, mask):
    """beta1^step and beta2^step by repeated multiplication from the left (``contract.power``), going on from the kept
    ones where these are powers of the same betas."""
    known = tl.load(kept, mask=mask, other=0.0).to(tl.int32)
    same = (tl.load(kept + 3, mask=mask, other=0.0) == beta1) & (tl.load(kept + 4, mask=mask, other=0.0) == beta2)
    known = tl.where(same & (known <= step), known, 0)
    power1 = tl.where(known > 0, tl.load(kept + 1, mask=mask, other=1.0), 1.0)
    power2 = tl.where(known > 0, tl.load(kept + 2, mask=mask, other=1.0), 1.0)
    known = tl.where(mask, known, step)
    while tl.max(step - known, 0) > 0:
        power1 = tl.where(known < step, power1 * beta1, power1)
        power2 = tl.where(known < step, power2 * beta2, power2)
        known = tl.where(known < step, known + 1, known)
    tl.store(kept, step.to(tl.float64), mask=mask)
    tl.store(kept + 1, power1, mask=mask)
    tl.store(kept + 2, power2, mask=mask)
    tl.store(kept + 3, beta1, mask=mask)
    tl.store(kept + 4, beta2, mask=mask)
    return power1, power2


@triton.jit
def store_keys(place, state, high, word, mask):
    """The end of ``counter.keys``; ``state`` is mixed from seed, ordinal and step."""
    pair = mix64(mix64(mix64(state ^ word) ^ high))
    tl.store(place, pair.to(tl.uint32).to(tl.int32, bitcast=True), mask=mask)
    tl.store(place + 1, (pair >> 32).to(tl.uint32).to(tl.int32, bitcast=True), mask=mask)

"""What the figures of an audited step mean, in plain words, and what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from collage.metrics.records import Record, UpdateUlps
from collage.optim import strategies

# From where on a module's figures are worth a line.
KEPT, V_LOST, DECAY_LOST, UNDERFLOW = 0.95, 0.2, 0.9, 0.01
# A run that keeps less of its update than this has stopped learning.
STOPPED = 0.05


@dataclass(frozen=True)
class Facts:
    """What is known of a set of parameters beside their figures.

    Attributes:
        dtype: of the parameters.
        strategy: of a collage.AdamW; else None.
        adam: whether another optimizer has Adam's state.
        drawn: whether the parameter is rounded stochastically: what a single step loses is kept on average.
        beta2: the second moment's decay rate, if there is one.
    """

    dtype: torch.dtype
    strategy: str | None
    adam: bool
    drawn: bool
    beta2: float | None


def verdict(name: str, record: Record, facts: Facts) -> str | None:
    """One line on a module; None if there is nothing to say."""
    known = record.get("replayed", True)
    if not known and record["edq_ratio"] is None:
        reasons = "; ".join(record.get("reasons", []))
        unchanged = record.get("unchanged_fraction")
        seen = "" if unchanged is None else f"; {_share(unchanged)} of the elements did not move"
        return f"{name}: the intended update is not known ({reasons}){seen}"
    found = [*_updates(record, facts), *_moments(record, facts), *_range(record, facts)]
    if not found:
        return None
    return f"{name}: {', '.join(found)}; {_remedy(record, facts)}"


def _updates(record: Record, facts: Facts) -> list[str]:
    found = []
    ratio, lost = record["edq_ratio"], record["lost_fraction"]
    if ratio is None or lost is None or not ratio < KEPT:
        # Where the update itself goes through, what decay adds to it goes through on average.
        return found
    found.append(f"{_share(lost)} of updates lost (EDQ ratio {ratio:.2f})")
    decay = record.get("decay_lost_fraction")
    if decay is not None and decay > DECAY_LOST and not facts.drawn:
        found.append(f"weight decay without effect on {_share(decay)} of the elements")
    return found


def _moments(record: Record, facts: Facts) -> list[str]:
    lost = record["v_lost_fraction"]
    if lost is None or lost <= V_LOST:
        return []
    rate = "" if facts.beta2 is None else f" at beta2 = {facts.beta2:g}"
    return [f"the second moment stands still in {_share(lost)} of the elements{rate}"]


def _range(record: Record, facts: Facts) -> list[str]:
    found = []
    saturated = record.get("saturated_fraction")
    if saturated:
        found.append(f"{_share(saturated)} of the weights at the largest number or beyond")
    underflow = record.get("v_subnormal_fraction")
    if underflow is not None and underflow > UNDERFLOW:
        found.append(f"the second moment of {_share(underflow)} of the elements underflows")
    return found


def _remedy(record: Record, facts: Facts) -> str:
    v_lost = (record["v_lost_fraction"] or 0) > V_LOST
    if facts.dtype == torch.float16 and (record.get("v_subnormal_fraction") or 0) > UNDERFLOW:
        # A second moment of 0 is divided by: what is beyond the largest number comes from there.
        return f"strategy fp16 would keep them{_more_bytes('fp16', facts)}"
    if record.get("saturated_fraction"):
        return "look at the learning rate, the clipping and the loss scale"
    if facts.strategy is None and not facts.adam:
        return "collage.Compensated round the optimizer would keep them at 2 more bytes per parameter"
    better = "plus" if v_lost else "light"
    return f"{better} would keep them{_more_bytes(better, facts)}"


def _more_bytes(name: str, facts: Facts) -> str:
    """Beside what the optimizer takes now, or beside everything in the parameters' dtype."""
    known = strategies()
    now = known[facts.strategy if facts.strategy in known else "plain"].bytes_per_param(facts.dtype)
    more = known[name].bytes_per_param(facts.dtype) - now
    return f" at {more:g} more bytes per parameter" if more > 0 else ""


def kept(histogram: UpdateUlps, factor: float) -> float:
    """The EDQ ratio to expect of weights that are rounded to nearest, if every update were ``factor`` times as large:
    the share of ||u||^2 in updates of half a unit in the last place or more.

    Within a bin the updates are taken as evenly spread over the logarithm.
    """
    if factor <= 0:
        return 0.0
    shift = float(torch.log2(torch.tensor(factor, dtype=torch.float64)))
    # Updates of the bin k stand between 2**k and 2**(k + 1); those from 1/2 = 2**-1 on are kept.
    above = [min(1.0, max(0.0, place + shift + 2.0)) for place in histogram["log2"]]
    return sum(share * energy for share, energy in zip(above, histogram["energy"], strict=True))


def stops_after(histogram: UpdateUlps, factors: Sequence[float], first: int) -> int | None:
    """The last step that still keeps :data:`STOPPED` of its update; None if the last step of all does.

    Args:
        histogram: of an audited step.
        factors: the learning rates of the steps from ``first`` on, each over that of the audited step.
        first: the first of these steps.
    """
    if not factors or not histogram["log2"] or kept(histogram, factors[-1]) >= STOPPED:
        return None
    alive = [first + index for index, factor in enumerate(factors) if kept(histogram, factor) >= STOPPED]
    return alive[-1] if alive else first - 1


def forecast(histogram: UpdateUlps, factors: Sequence[float], first: int, dtype: torch.dtype) -> str | None:
    """A line on what the schedule has in store for bare weights of ``dtype``; None if they go on learning."""
    stop = stops_after(histogram, factors, first)
    if stop is None:
        return None
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return (
        f"at this learning-rate schedule plain {name} stops learning after step {stop}: from there on less than "
        f"{STOPPED:.0%} of the update is kept (with updates as those of the audited step)"
    )


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if 0.005 <= value < 0.995 or value in (0, 1) else f"{100 * value:.2g} %"

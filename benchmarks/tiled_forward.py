"""What a model pays for weights in tiles when it reads them: forward and backward beside a plain bfloat16 model.

    OMP_WAIT_POLICY=passive python benchmarks/tiled_forward.py [--model gpt-10m] [--batch 4] [--seq 128] [--threads 1]

First the reading by itself, of one weight: its time as a ratio to torch's copy of a bfloat16 weight of that shape,
which reads as many bytes as hi and lo have, and writes as many. Then whole models, in turn in the same rounds:
medians, and ratios of each round to the plain model's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

import collage
from collage.bench.timing import Run, clock_of
from collage.storage.tensor import FORWARDS
from collage.train.models import build_model
from collage.train.products import multiplying, products

VARIANTS = [(s, f) for s in ("fp8", "fp8-native", "fp8-3") for f in FORWARDS]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt-10m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4096, help="rows and columns of the weight that is read alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    report(f"one weight of {given.rows} x {given.rows}", readings(given.rows, device), device, given.rounds)
    for what, backward in (("forward", False), ("forward and backward", True)):
        runs = {"plain bfloat16": step_of(given, device, None, backward)}
        runs |= {f"{s}, {f}": step_of(given, device, (s, f), backward) for s, f in VARIANTS}
        report(f"{given.model}, {given.batch} x {given.seq}, {what}", runs, device, given.rounds)


def readings(rows: int, device: torch.device) -> dict[str, Run]:
    """The copy that all are compared with, and the readings."""
    plain = torch.randn(rows, rows, device=device).bfloat16()
    runs: dict[str, Run] = {"copy of bfloat16": lambda: torch.empty_like(plain).copy_(plain)}
    for strategy, forward in VARIANTS:
        layer = nn.Linear(rows, rows, bias=False, device=device)
        weight = collage.to_fp8_(layer, strategy, forward=forward).weight.detach()
        assert isinstance(weight, collage.TiledTensor)
        runs[f"{strategy}, {forward}"] = weight.dequantize
    return runs


def step_of(
    given: argparse.Namespace, device: torch.device, kept: tuple[str, str] | None, backward: bool
) -> Callable[[], None]:
    """A forward pass of the model, with its backward where that is wanted."""
    model = build_model(given.model, vocab_size=257, seq_len=given.seq, seed=0)
    if kept is None:
        collage.to_low_precision(model)
    else:
        collage.to_fp8_(model, kept[0], forward=kept[1])
    model.to(device)  # pyright: ignore[reportArgumentType] - wrapped by transformers
    ids = torch.randint(0, 257, (given.batch, given.seq), device=device)
    how = products(device, torch.bfloat16)

    def run() -> None:
        with torch.set_grad_enabled(backward), multiplying(how):
            loss = model(input_ids=ids, labels=ids).loss
            if backward:
                loss.backward()
                model.zero_grad()

    return run


def report(title: str, runs: dict[str, Run], device: torch.device, rounds: int) -> None:
    """Times all in turn; the first is what the others are compared with."""
    clock = clock_of(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = clock(run)
            if number:
                seconds[name].append(taken)
    first = next(iter(seconds.values()))
    print(title)
    for name, each in seconds.items():
        ratios = [taken / base for taken, base in zip(each, first, strict=True)]
        print(f"  {name:<18} {1e3 * statistics.median(each):9.2f} ms  {statistics.median(ratios):6.2f}")


if __name__ == "__main__":
    main()

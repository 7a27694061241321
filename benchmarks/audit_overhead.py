"""What auditing every 50th step costs: audited and other training steps of one run, in turn, on the demo's model.

    OMP_WAIT_POLICY=passive python benchmarks/audit_overhead.py [--threads 1] [--rounds 15] [--every 50]

Prints a row per optimizer: a training step's median, what an audited one takes more, and that over `every` steps.
Times are those of the processor, so that what else the machine does matters less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import collage
from collage.train.models import build_model
from collage.train.products import multiplying, products

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch AdamW, for-loop": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=False, fused=False),
    "torch AdamW, foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=True),
    "torch AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
    "collage plus": lambda m: collage.AdamW(m.parameters(), lr=1e-4),
    "collage plus, details": lambda m: collage.AdamW(m.parameters(), lr=1e-4),
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, default=50)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, make in OPTIMIZERS.items():
        plain, audited = measure(make, given.rounds, details="details" in name)
        share = (audited - plain) / plain / given.every
        print(
            f"{name:<24} step {1e3 * plain:7.1f} ms, audited +{1e3 * (audited - plain):6.1f} ms, overhead {share:.2%}"
        )


def measure(make: Callable[[nn.Module], torch.optim.Optimizer], rounds: int, *, details: bool) -> tuple[float, float]:
    """Median processor seconds of a training step without and with an audit, one of each in turn."""
    model = build_model("gpt-1m", vocab_size=257, seq_len=128, seed=0)
    collage.to_low_precision(model)
    optimizer = make(model)
    audit = collage.audit(optimizer, every=1 << 30, model=model, details=details)
    how = products(torch.device("cpu"), torch.bfloat16)
    ids = torch.randint(0, 257, (16, 128))
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(2 * (rounds + 1)):
        audited = step % 2 == 1
        audit.every = 1 if audited else 1 << 30
        started = time.process_time()
        # As the demo multiplies: in float32, rounded, where the machine has no 16-bit products.
        with multiplying(how):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times[audited].append(time.process_time() - started)
    return statistics.median(times[False][1:]), statistics.median(times[True][1:])


if __name__ == "__main__":
    main()

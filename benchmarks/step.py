"""Times one optimizer step per strategy beside torch's fused AdamW, in interleaved rounds of one process.

    OMP_WAIT_POLICY=passive .venv/bin/python benchmarks/step.py --threads 1

Prints medians as ratios to torch.optim.AdamW(fused=True) on the same bfloat16 parameters (10 matrices of 1024 x 976 and
10 vectors of 976: 10 million parameters).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import collage

SHAPES = [(1024, 976)] * 10 + [(976,)] * 10


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Fresh parameters with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in SHAPES]
    for param in params:
        param.grad = (torch.randn(param.shape) * 0.01).to(dtype)
    return params


def contenders() -> dict[str, torch.optim.Optimizer]:
    """Every strategy on bfloat16 parameters (fp32 on float32 ones), and torch's own."""
    made: dict[str, torch.optim.Optimizer] = {
        "torch fused bf16": torch.optim.AdamW(parameters(torch.bfloat16), fused=True),
        "torch fused fp32": torch.optim.AdamW(parameters(torch.float32), fused=True),
    }
    for name in collage.strategies():
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        made[name] = collage.AdamW(parameters(dtype), strategy=name)
    return made


def main() -> None:
    """Reads the options, times, prints a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options.add_argument("--rounds", type=int, default=9, help="timed rounds after one warm-up (default: 9)")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    optimizers = contenders()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(chosen.rounds + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(spent[1:]) for name, spent in times.items()}
    reference = medians["torch fused bf16"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, torch fused bf16: {reference * 1e3:.1f} ms")
    for name, median in medians.items():
        print(f"{name:18} {median / reference:6.2f} x")


if __name__ == "__main__":
    main()

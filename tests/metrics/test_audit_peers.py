"""The audit on other people's optimizers, where they are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import collage
from comparing import bits, values

# module, what makes the optimizer, whether its weights are compensated
PEERS: dict[str, tuple[str, Any, bool]] = {
    "optimi AdamW": ("optimi", lambda m, p: m.AdamW(p, lr=1e-4, triton=False), True),
    "optimi without Kahan": ("optimi", lambda m, p: m.AdamW(p, lr=1e-4, kahan_sum=False, triton=False), False),
    "optimi Lion": ("optimi", lambda m, p: m.Lion(p, lr=1e-4, triton=False), True),
    "bitsandbytes 32-bit": ("bitsandbytes.optim", lambda m, p: m.AdamW32bit(p, lr=1e-4), False),
    "bitsandbytes 8-bit": ("bitsandbytes.optim", lambda m, p: m.AdamW8bit(p, lr=1e-4), False),
    "bitsandbytes SGD": ("bitsandbytes.optim", lambda m, p: m.SGD32bit(p, lr=1e-2, momentum=0.9), False),
    "DeepSpeedCPUAdam": ("deepspeed.ops.adam", lambda m, p: m.DeepSpeedCPUAdam(p, lr=1e-4), False),
    "torchao 8-bit": ("torchao.optim", lambda m, p: m.AdamW8bit(p, lr=1e-4), False),
}


def run(module: Any, make: Any, dtype: torch.dtype, audited: bool) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(values((64, 128), 0, dtype, spread=1.0)), nn.Parameter(values((40,), 1, dtype, spread=1.0))]
    opt = make(module, params)
    audit = collage.audit(opt, every=1) if audited else None
    for seed in range(1, 4):
        for place, param in enumerate(params):
            param.grad = values(tuple(param.shape), 10 * seed + place, dtype)
        opt.step()
    return params, None if audit is None else audit.report()["total"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_a_peers_step_is_replayed_and_its_bits_are_as_they_would_be(name: str) -> None:
    root, make, compensated = PEERS[name]
    module = pytest.importorskip(root)
    alone, _ = run(module, make, torch.bfloat16, audited=False)
    params, total = run(module, make, torch.bfloat16, audited=True)
    for one, other in zip(alone, params, strict=True):
        assert torch.equal(bits(one), bits(other))
    assert total["replayed"] is True
    if compensated:
        assert total["edq_ratio"] == pytest.approx(1.0, abs=0.02)
        assert total["lost_fraction"] < 0.2
    else:
        assert total["lost_fraction"] > 0.5
    _, wide = run(module, make, torch.float32, audited=True)
    assert wide["edq_ratio"] == pytest.approx(1.0, abs=1e-3)

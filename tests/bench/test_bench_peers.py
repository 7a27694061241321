"""The real peers' records; what is installed of them is built, and makes a step, in the benchmark itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from collage.bench.contenders import Contender
from collage.bench.peers import Peer, Variant, peer_contenders, peer_names

CPU = torch.device("cpu")
CODE = """
from collage.bench.peers import PEERS, NAMES
assert len(set(NAMES)) == len(NAMES), NAMES
for peer in PEERS:
    assert peer.variants and set(peer.devices) <= {"cpu", "cuda"}, peer
    assert len({variant.name for variant in peer.variants}) == len(peer.variants), peer
    assert all(variant.streams.read_only == (2,) for variant in peer.variants), peer
print(*NAMES)
import sys
print(*(peer.module for peer in PEERS if peer.module in sys.modules))
"""


def test_the_peers_of_the_field_are_there_and_none_is_imported_by_its_record() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    names, imported = done.stdout.splitlines()
    known = {"torch", "optimi", "torchao", "bitsandbytes", "heavyball", "deepspeed", "flashoptim", "transformer-engine"}
    assert known <= set(names.split())
    assert not imported


def contenders(name: str, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    return peer_contenders([name], dtype, CPU)


def test_why_a_peer_cannot_run_is_told() -> None:
    assert contenders("good")[0].unavailable == ""
    assert contenders("elsewhere")[0].unavailable == "runs on cuda alone"
    assert contenders("absent")[0].unavailable == "not installed; remedy: pip install no-such-package"


def test_a_peer_whose_own_needs_are_missing_cannot_run() -> None:
    needy = Peer("needy", "torch", "torch", (), needs=("no_such_package", "sys"))
    assert needy.unavailable(CPU) == "needs no_such_package, not installed"
    assert Peer("unknown", "no-such-distribution", "torch", ()).unavailable(CPU).startswith("not installed")


def test_a_variant_that_does_not_serve_the_dtype_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from collage.bench import peers

    narrow = Peer("narrow", "torch", "torch", (Variant("one", lambda params: params, None, (torch.bfloat16,)),))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(peers, "PEERS", (narrow,))
    assert contenders("narrow")[0].unavailable == ""
    assert contenders("narrow", torch.float16)[0].unavailable == "serves bf16 parameters alone"


def test_all_and_none_mean_what_they_say() -> None:
    assert peer_names(["all"]) == ["torch", "good", "absent", "broken", "elsewhere"]
    assert peer_names(["none"]) == []
    assert peer_names(["good", "torch"]) == ["good", "torch"]

"""Optimizers of other packages: how each is built, what it moves, and where it can run.

A peer is imported when its optimizer is built, never before.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from collage.bench import readings
from collage.bench.contenders import HYPER, Build, Contender, Stepper, Streams, short, torch_contenders
from collage.bench.readings import PLAIN, Reads
from collage.train.config import UserError

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Variant:
    """One of a peer's optimizers.

    Attributes:
        name: what tells it from the peer's others.
        build: makes it over parameters with gradients.
        streams: what its formats make it move; scales of blocks are left out.
        dtypes: of parameters that it serves.
        spoils_gradients, most_tensors: see `Contender`.
        note: what a reader of its row should know.
        reads: how to read what it holds.
    """

    name: str
    build: Build
    streams: Streams | None
    dtypes: tuple[torch.dtype, ...] = (BF16, FP16)
    spoils_gradients: bool = False
    most_tensors: int | None = None
    note: str = ""
    reads: Reads = PLAIN


@dataclass(frozen=True)
class Peer:
    """A package with optimizers for low precision.

    Attributes:
        name: for `--peers` and the rows.
        distribution: its name on the package index.
        module: what is imported.
        variants: its optimizers.
        devices: types of device that it serves.
        needs: further modules, which its own installation may leave out.
        install: the command that brings it.
    """

    name: str
    distribution: str
    module: str
    variants: tuple[Variant, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: tuple[str, ...] = ()
    install: str = ""

    def installed(self) -> str | None:
        """Its version, or None where it is not installed."""
        try:
            return version(self.distribution) if find_spec(self.module) else None
        except PackageNotFoundError:
            return None

    def unavailable(self, device: torch.device) -> str:
        """Why it cannot run on `device` here; empty where it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} alone"
        if self.installed() is None:
            return f"not installed; remedy: {self.install or f'pip install {self.distribution}'}"
        missing = [module for module in self.needs if find_spec(module) is None]
        return f"needs {', '.join(missing)}, not installed" if missing else ""


def _made(module: str, name: str, **options: Any) -> Build:
    def build(params: list[nn.Parameter], **hyper: Any) -> Stepper:
        return getattr(import_module(module), name)(params, **{**HYPER, **options, **hyper})

    return build


def _deepspeed(fp32_optimizer_states: bool) -> Build:
    build = _made("deepspeed.ops.adam", "DeepSpeedCPUAdam", fp32_optimizer_states=fp32_optimizer_states)

    def on_cpu(params: list[nn.Parameter], **hyper: Any) -> Stepper:
        # Read when deepspeed is first imported; without it a machine with a GPU builds for that.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return build(params, **hyper)

    return on_cpu


def _transformer_engine(params: list[nn.Parameter], **options: Any) -> Stepper:
    module = import_module("transformer_engine.pytorch.optimizers")
    return module.FusedAdam(params, **{**HYPER, **options}, adam_w_mode=True, master_weights=True)


def _transformer_engine_remainders(params: list[nn.Parameter], **hyper: Any) -> Stepper:
    return _transformer_engine(params, store_param_remainders=True, **hyper)


_KEPT_BF16 = Streams((2, 2, 2), (2,))
_KAHAN = Streams((2, 2, 2, 2), (2,))
_FP32_MOMENTS = Streams((2, 4, 4), (2,))
_8_BIT_MOMENTS = Streams((2, 1, 1), (2,))
_OPTIMI = {"kahan_sum": True, "triton": False}
_TORCH_COMPILED, _LOSSY = "compiled by torch", "loses small updates"

PEERS = (
    Peer(
        "optimi",
        "torch-optimi",
        "optimi",
        (
            Variant(
                "Kahan, foreach",
                _made("optimi", "AdamW", **_OPTIMI, foreach=True),
                _KAHAN,
                spoils_gradients=True,
                reads=readings.OPTIMI,
            ),
            Variant(
                "Kahan, for-loop",
                _made("optimi", "AdamW", **_OPTIMI, foreach=False),
                _KAHAN,
                spoils_gradients=True,
                reads=readings.OPTIMI,
            ),
        ),
    ),
    Peer(
        "optimi-triton",
        "torch-optimi",
        "optimi",
        (
            Variant(
                "Kahan",
                _made("optimi", "AdamW", **{**_OPTIMI, "triton": True}),
                _KAHAN,
                spoils_gradients=True,
                reads=readings.OPTIMI,
            ),
        ),
        devices=("cuda",),
        needs=("triton",),
    ),
    Peer(
        "torchao",
        "torchao",
        "torchao",
        (
            Variant(
                "stochastic rounding",
                _made("torchao.optim", "_AdamW", bf16_stochastic_round=True),
                _KEPT_BF16,
                (BF16,),
                note=_TORCH_COMPILED,
            ),
            Variant(
                "8-bit moments",
                _made("torchao.optim", "AdamW8bit"),
                _8_BIT_MOMENTS,
                note=f"{_TORCH_COMPILED}; {_LOSSY}",
            ),
            Variant(
                "fp8 moments",
                _made("torchao.optim", "AdamWFp8"),
                _8_BIT_MOMENTS,
                note=f"{_TORCH_COMPILED}; {_LOSSY}",
            ),
        ),
    ),
    Peer(
        "bitsandbytes",
        "bitsandbytes",
        "bitsandbytes",
        (
            Variant(
                "fp32 moments",
                _made("bitsandbytes.optim", "AdamW32bit"),
                _FP32_MOMENTS,
                note=_LOSSY,
                reads=readings.BITSANDBYTES,
            ),
            Variant(
                "8-bit moments",
                _made("bitsandbytes.optim", "AdamW8bit"),
                _8_BIT_MOMENTS,
                note=_LOSSY,
                reads=readings.BITSANDBYTES,
            ),
        ),
    ),
    Peer(
        "heavyball",
        "heavyball",
        "heavyball",
        (
            Variant(
                "stochastic rounding",
                _made("heavyball", "AdamW"),
                _FP32_MOMENTS,
                (BF16,),
                most_tensors=300,
                note=_TORCH_COMPILED,
                reads=readings.HEAVYBALL,
            ),
            Variant(
                "bf16+8",
                _made("heavyball", "AdamW", ecc="bf16+8", param_ecc="bf16+8"),
                Streams((2, 1, 2, 1, 2, 1), (2,)),
                (BF16,),
                most_tensors=300,
                note=_TORCH_COMPILED,
                reads=readings.HEAVYBALL,
            ),
        ),
    ),
    Peer(
        "deepspeed",
        "deepspeed",
        "deepspeed",
        (
            Variant("CPUAdam, 16-bit moments", _deepspeed(False), _KEPT_BF16, note=_LOSSY),
            Variant("CPUAdam, fp32 moments", _deepspeed(True), _FP32_MOMENTS, note=_LOSSY),
        ),
        devices=("cpu",),
        needs=("cpuinfo", "psutil", "hjson", "msgpack", "ninja", "pydantic", "einops", "tqdm"),
        install="DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation --no-deps deepspeed, after "
        "pip install py-cpuinfo psutil hjson msgpack ninja pydantic einops tqdm setuptools wheel packaging",
    ),
    Peer(
        "flashoptim",
        "flashoptim",
        "flashoptim",
        (
            Variant(
                "24-bit, 8-bit moments",
                _made("flashoptim", "FlashAdamW"),
                Streams((2, 1, 1, 1), (2,)),
                reads=readings.FLASHOPTIM,
            ),
        ),
        devices=("cuda",),
        needs=("triton",),
    ),
    Peer(
        "transformer-engine",
        "transformer-engine",
        "transformer_engine",
        (
            Variant(
                "FusedAdam, fp32 master",
                _transformer_engine,
                Streams((4, 4, 4), (2,), (2,)),
                reads=readings.TRANSFORMER_ENGINE,
            ),
            Variant(
                "FusedAdam, 16-bit remainder",
                _transformer_engine_remainders,
                Streams((2, 2, 4, 4), (2,)),
                (BF16,),
                reads=readings.TRANSFORMER_ENGINE_REMAINDERS,
            ),
        ),
        devices=("cuda",),
        install="pip install --no-build-isolation 'transformer-engine[pytorch]'",
    ),
)
NAMES = ("torch", *(peer.name for peer in PEERS))
"""What `--peers` takes beside "all" and "none"."""


def peer_names(names: Iterable[str]) -> list[str]:
    """The peers that a list of names means; "all" and "none" stand alone.

    Raises:
        UserError: no peer bears a name.
    """
    names = list(names)
    if names in (["all"], ["none"]):
        return list(NAMES) if names == ["all"] else []
    for name in names:
        if name not in NAMES:
            raise UserError(f"--peers must be all, none, or names of {', '.join(NAMES)}, got {name!r}")
    return names


def peer_contenders(names: Iterable[str], dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """The contenders of the named peers, with the reason beside each that cannot run here."""
    names = set(names)
    found = torch_contenders(dtype) if "torch" in names else []
    for peer in PEERS:
        if peer.name in names:
            unavailable = peer.unavailable(device)
            found += [_contender(peer, variant, dtype, unavailable) for variant in peer.variants]
    return found


def _contender(peer: Peer, variant: Variant, dtype: torch.dtype, unavailable: str) -> Contender:
    if not unavailable and dtype not in variant.dtypes:
        unavailable = f"serves {' and '.join(map(short, variant.dtypes))} parameters alone"
    return Contender(
        name=f"{peer.name} {variant.name}",
        kind="peer",
        build=variant.build,
        streams=variant.streams,
        dtype=dtype,
        distribution=peer.distribution,
        unavailable=unavailable,
        peer=peer.name,
        spoils_gradients=variant.spoils_gradients,
        reads=variant.reads,
        most_tensors=variant.most_tensors,
        note=variant.note,
    )

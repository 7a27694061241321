"""Fixtures of the backends' tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from collage import kernels
from collage.kernels import Batch, Inputs


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of every step."""
    names: list[str] = []
    for name, step in list(kernels._STEPS.items()):

        def spy(batch: Batch, inputs: Inputs, name: str = name, step: Any = step) -> Tensor | None:
            names.append(name)
            return step(batch, inputs)

        monkeypatch.setitem(kernels._STEPS, name, spy)
    return names


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What tests of kernels in Triton's interpreter need."""
    from collage.kernels.fused import launching

    # The interpreter's time goes by operations, not elements. One test takes tails in pieces as a GPU does.
    monkeypatch.setattr(launching, "WARP", 128)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that were launched."""
    from collage.kernels.fused import launching

    names: list[str] = []
    real = launching.launch

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        real(kernel, *args, **options)

    monkeypatch.setattr(launching, "launch", launch)
    return names

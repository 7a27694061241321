"""Fixtures of the backends' tests."""

from __future__ import annotations

from typing import Any

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

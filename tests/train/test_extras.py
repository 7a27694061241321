from __future__ import annotations

import pytest

from collage.train import extras
from collage.train.config import UserError


def test_installed_extras_pass() -> None:
    extras.need("train")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "train", ("rich", "no_such_package"))
    with pytest.raises(UserError, match=r"needs no_such_package, which is not installed.*'torch-collage\[train\]'"):
        extras.need("train")

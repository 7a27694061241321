"""A benchmark so small that it takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_small import MANY, SMALL, TINY, Bench, fails, peer, sleeps

from collage import cli
from collage.bench import peers, shapes
from collage.bench.peers import Variant


@pytest.fixture(autouse=True)
def few_shapes_and_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of tiny shapes and made-up peers, in place of the real peers."""
    for each in (TINY, MANY):
        monkeypatch.setitem(shapes.SHAPES, each.name, each)
    made = (
        peer("good", "torch"),
        peer("absent", "no_such_package", install="pip install no-such-package"),
        peer("broken", "torch", Variant("at once", fails, None), Variant("asleep", sleeps, None)),
        peer("elsewhere", "torch", devices=("cuda",)),
    )
    monkeypatch.setattr(peers, "PEERS", made)
    monkeypatch.setattr(peers, "NAMES", ("torch", *(each.name for each in made)))


@pytest.fixture
def run_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs a command of `collage bench` in this process; gives its JSON, with what it printed as "printed"."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> dict[str, Any]:
        path = tmp_path / "rows.json"
        command = ["bench", *arguments, "--json", path]
        monkeypatch.setattr("sys.argv", ["collage", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(each) for each in command])
        assert stopped.value.code == 0
        return {**json.loads(path.read_text(encoding="utf-8")), "printed": capsys.readouterr().out}

    return run


@pytest.fixture
def bench(run_bench: Bench) -> Bench:
    """Runs `collage bench step` on tiny shapes."""
    return lambda *arguments: run_bench("step", "--shapes", "tiny", *SMALL, *arguments)

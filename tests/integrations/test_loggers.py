"""Loggers: what each client gets, read back where there is a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import collage
from collage.integrations.figures import figures
from collage.integrations.loggers import logger
from comparing import values


def report() -> collage.metrics.Report:
    param = nn.Parameter(values((40,), 0))
    opt = torch.optim.AdamW([("head.weight", param)], lr=1e-4)
    audit = collage.audit(opt, every=1)
    for seed in (1, 2):
        param.grad = values((40,), seed)
        opt.step()
    return audit.report()


def test_figures_are_numbers_of_the_total_and_of_modules_without_what_is_none() -> None:
    found = report()
    flat = figures(found, modules=True, prefix="x/")
    assert flat["x/edq_ratio"] == found["total"]["edq_ratio"]
    assert flat["x/head/lost_fraction"] == found["modules"]["head"]["lost_fraction"]
    assert all(type(value) is float for value in flat.values())
    assert not any(name.endswith(("step", "elements", "replayed", "update_ulps")) for name in flat)
    found["total"]["edq_ratio"] = None
    assert "edq_ratio" not in figures(found)


def test_json_lines_hold_whole_reports(tmp_path: Path) -> None:
    found = report()
    for target in (tmp_path / "a" / "audit.jsonl", str(tmp_path / "a" / "audit.jsonl")):
        logger(target)(found)
    lines = [json.loads(line) for line in (tmp_path / "a" / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": 2, **found}] * 2


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_an_event_file_that_reads_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = report()
    logger("tensorboard", log_dir=str(tmp_path))(found)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert "collage/head/edq_ratio" in events.Tags()["scalars"]
    [event] = events.Scalars("collage/edq_ratio")
    assert (event.step, event.value) == (2, pytest.approx(found["total"]["edq_ratio"], rel=1e-6))


class Client:
    """A run that takes numbers of a step, as wandb's, trackio's and Accelerate's do."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, float], int]] = []

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.got.append((numbers, step))


def test_a_client_that_is_given_gets_the_numbers_at_their_step() -> None:
    client, found = Client(), report()
    logger(client, modules=False, prefix="")(found)
    assert client.got == [(figures(found), 2)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_client_that_is_named_is_opened_with_its_options_by_its_own_package(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    client = Client()

    class Package:
        @staticmethod
        def init(**options: Any) -> Client:
            opened.append(options)
            return client

    monkeypatch.setattr("collage.integrations.loggers.import_module", lambda module: {name: Package}[module])
    logger(name, project="p")(report())
    assert opened == [{"project": "p"}]
    assert client.got[0][1] == 2


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_takes_them_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    write = logger("wandb", project="p", mode="offline", dir=str(tmp_path))
    write(report())
    assert wandb.run.summary["collage/edq_ratio"] == report()["total"]["edq_ratio"]
    wandb.finish()


@pytest.mark.filterwarnings("ignore")
def test_trackio_itself_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    logger("trackio", project="p")(report())
    trackio.finish()
    assert any(tmp_path.rglob("*"))


def test_what_cannot_log_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"logger takes one of tensorboard, wandb, trackio, a path ending in \.jsonl"):
        logger("mlflow")
    with pytest.raises(TypeError, match="a client has add_scalar, log_metrics or log; got int"):
        logger(3)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("collage.integrations.loggers.import_module", missing)
    with pytest.raises(ImportError, match="logging to wandb needs the package wandb; remedy: pip install wandb"):
        logger("wandb")

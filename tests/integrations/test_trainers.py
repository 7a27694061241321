"""Lightning, Accelerate, torchtitan-style containers and a plain loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from collage.integrations.torchtitan import adamw, with_collage
from comparing import bits, values


def batches(count: int = 8) -> list[Tensor]:
    return [values((4, 6), 100 + i) for i in range(count)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)).to(torch.bfloat16)


def lightning_parts() -> tuple[Any, type]:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.net, self.make = network(), make

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return self.make(self.net)

    return lightning, Module


class Batches:
    """A loader that knows where it stands, so that a training goes on within an epoch."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return len(batches())

    def __iter__(self) -> Any:
        while self.next < len(self):
            self.next += 1
            yield batches()[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def fit(folder: Path, make: Any, steps: int, checkpoint: str | None = None, callbacks: Any = ()) -> tuple[Any, Any]:
    lightning, module_class = lightning_parts()
    module = module_class(make)
    trainer = lightning.Trainer(
        max_steps=steps,
        precision="bf16-true",
        accelerator="cpu",
        logger=lightning.loggers.CSVLogger(folder, "csv"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, Batches(), ckpt_path=checkpoint)
    return trainer, module


def plus(net: nn.Module) -> Any:
    return collage.AdamW(net.named_parameters(), lr=1e-3, strategy="plus")


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_to_the_bits_of_a_training_that_never_stopped_and_logs_the_audit(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from collage.integrations.lightning import AuditCallback

    callback = AuditCallback(every=3, modules=True)
    whole, module = fit(tmp_path / "whole", plus, 8, callbacks=[callback])
    assert callback.audit.steps == [3, 6]
    assert whole.callback_metrics["collage/edq_ratio"] == pytest.approx(1.0, abs=0.02)
    logged = (tmp_path / "whole" / "csv" / "version_0" / "metrics.csv").read_text(encoding="utf-8")
    assert "collage/net.1/lost_fraction" in logged

    half, _ = fit(tmp_path / "half", plus, 4)
    half.save_checkpoint(tmp_path / "half.ckpt")
    audited = AuditCallback(every=3)
    resumed, other = fit(tmp_path / "resumed", plus, 8, str(tmp_path / "half.ckpt"), [audited])
    assert audited.audit.steps == [6]
    for one, two in zip(states(whole, module), states(resumed, other), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(bits(one), bits(two))


def states(trainer: Any, module: nn.Module) -> list[Tensor]:
    [optimizer] = trainer.optimizers
    found = []
    for param in module.parameters():
        assert param.dtype == torch.bfloat16
        state = optimizer.state[param]
        found += [param.detach(), *(state[name] for name in sorted(state))]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("audited", [False, True])
def test_lightnings_closure_gives_the_gradient_that_a_step_used(tmp_path: Path, audited: bool) -> None:
    pytest.importorskip("lightning")
    from collage.integrations.lightning import AuditCallback

    def torchs(net: nn.Module) -> Any:
        return torch.optim.AdamW(net.named_parameters(), lr=1e-2, foreach=False)

    callback = AuditCallback(every=1)
    _, module = fit(tmp_path, torchs, 5, callbacks=[callback] if audited else [])
    plain = network()
    optimizer = torchs(plain)
    audit = collage.audit(optimizer, every=1, model=plain)
    for batch in batches(5):
        optimizer.zero_grad()
        plain(batch).square().mean().backward()
        optimizer.step()
    for one, other in zip(module.net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(bits(one), bits(other))
    if audited:
        assert callback.audit.report()["total"] == audit.report()["total"]


@pytest.mark.filterwarnings("ignore")
def test_accelerates_wrapper_is_audited_within() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = network()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-4))
    audit = collage.audit(optimizer, every=2, model=net)
    for batch in batches(4):
        optimizer.zero_grad()
        accelerator.backward(model(batch).float().square().mean())
        optimizer.step()
    assert audit.steps == [2, 4]
    assert set(audit.report()["modules"]) == {"0", "1", "2"}
    assert any(line.startswith("1: ") and "updates lost" in line for line in audit.verdict())


class OptimizersContainer(torch.optim.Optimizer):
    """As torchtitan documents it: one optimizer for each model part, made by what the name resolves to."""

    def __init__(self, parts: list[nn.Module], name: str, options: dict[str, Any]) -> None:
        self.model_parts, self.optimizers = parts, []
        for part in parts:
            names, params = zip(*part.named_parameters(), strict=True)
            group = {"params": list(params), "param_names": list(names), "fused": True, "foreach": False, "extra": 1}
            self.optimizers.append(self._resolve_optimizer_factory(name)([group], **options))
        super().__init__([p for part in parts for p in part.parameters()], options)

    @dataclass(kw_only=True, slots=True)
    class Config:
        name: str = "AdamW"

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        return {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[name]

    def step(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)


def test_a_container_of_torchtitans_kind_steps_with_collage_and_is_audited_as_one() -> None:
    parts: list[nn.Module] = [network(), network()]
    container = with_collage(OptimizersContainer, "light")(parts, "AdamW", {"lr": 1e-4})
    assert [type(each) for each in container.optimizers] == [collage.AdamW] * 2
    assert container.optimizers[0].param_groups[0]["extra"] == 1
    own = type(container)
    assert issubclass(own.Config, OptimizersContainer.Config)
    assert own.Config is not OptimizersContainer.Config
    assert own.Config(name="Adam").name == "Adam"
    assert type(with_collage(OptimizersContainer)(parts, "Adam", {}).optimizers[0]) is torch.optim.Adam
    audit = collage.audit(container, every=2)
    for _ in range(2):
        for part in parts:
            for place, param in enumerate(part.parameters()):
                param.grad = values(tuple(param.shape), place)
        container.step()
    assert audit.steps == [2]
    assert audit.report()["total"]["elements"] == 2 * sum(p.numel() for p in parts[0].parameters())
    assert audit.report()["total"]["edq_ratio"] == pytest.approx(1.0, abs=0.05)


def test_a_container_that_resolves_names_by_a_method_is_served_too() -> None:
    class ByMethod(OptimizersContainer):
        def _resolve_optimizer_factory(self, name: str) -> Any:  # type: ignore[override]
            return OptimizersContainer._resolve_optimizer_factory(name)

    made = with_collage(ByMethod, "plus")
    assert type(made([network()], "AdamW", {}).optimizers[0]) is collage.AdamW
    assert type(made([network()], "Adam", {}).optimizers[0]) is torch.optim.Adam


def test_an_older_container_takes_the_class_by_argument() -> None:
    made = adamw("exact", seed=4)(network().parameters(), lr=1e-3, fused=True, foreach=False)
    assert (made.param_groups[0]["strategy"], made.param_groups[0]["seed"]) == ("exact", 4)
    with pytest.raises(
        TypeError, match=r"Linear has no _resolve_optimizer_factory; give it optimizer_cls=adamw\('plus'"
    ):
        with_collage(nn.Linear)

"""torch's GradScaler with float16 parameters: skipped steps, scaled steps, unscaling for clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import collage
from comparing import assert_same, snapshot, values

SCALE = 1024.0


def build(**options) -> tuple[nn.Parameter, collage.AdamW]:
    param = nn.Parameter(values((50,), 0, torch.float16))
    return param, collage.AdamW([param], **options)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def backward(param: nn.Parameter, scaler: torch.amp.GradScaler, factor: float = 1.0) -> None:
    loss = (param * values((50,), 1, torch.float16)).sum() * factor
    scaler.scale(loss).backward()


@pytest.mark.parametrize("strategy", ["plain", "light", "plus", "mixed", "kahan"])
def test_a_scaled_step_is_the_unscaled_one(strategy: str) -> None:
    param, opt = build(strategy=strategy)
    scale = scaler()
    for _ in range(3):
        opt.zero_grad()
        backward(param, scale)
        scaled_grad = param.grad.clone()  # type: ignore[union-attr]
        scale.step(opt)
        scale.update()
        assert torch.equal(param.grad, scaled_grad)
    plain, reference = build(strategy=strategy)
    for _ in range(3):
        # The scale is a power of two: scaling is exact.
        plain.grad = values((50,), 1, torch.float16)
        reference.step()
    assert_same(opt, reference)
    assert scale.get_scale() == SCALE


@pytest.mark.parametrize("strategy", ["plain", "plus"])
def test_an_overflown_gradient_skips_the_step_and_lowers_the_scale(strategy: str) -> None:
    param, opt = build(strategy=strategy)
    scale = scaler()
    backward(param, scale)
    scale.step(opt)
    scale.update()
    before = snapshot(opt)
    opt.zero_grad()
    backward(param, scale)
    param.grad[3] = torch.inf  # type: ignore[index]
    scale.step(opt)
    scale.update()
    assert_same(opt, before)
    assert scale.get_scale() == SCALE / 2
    opt.zero_grad()
    backward(param, scale)
    scale.step(opt)
    assert opt.state[param]["step"].item() == 2


def test_a_skipped_first_step_leaves_the_parameter_alone() -> None:
    param, opt = build()
    scale = scaler()
    backward(param, scale)
    param.grad[3] = torch.nan  # type: ignore[index]
    before = param.detach().clone()
    scale.step(opt)
    assert torch.equal(param, before)


def test_torchs_own_unscale_refuses_float16_gradients_and_the_optimizers_does_not() -> None:
    param, opt = build()
    scale = scaler()
    backward(param, scale)
    with pytest.raises(ValueError, match="Attempting to unscale FP16"):
        scale.unscale_(opt)
    opt.unscale_(scale)
    torch.testing.assert_close(param.grad, values((50,), 1, torch.float16), rtol=0, atol=0)


def test_unscaled_gradients_are_clipped_and_stepped_once_without_the_scale() -> None:
    param, opt = build(lr=1e-2)
    scale = scaler()
    backward(param, scale, factor=8.0)
    opt.unscale_(scale)
    norm = nn.utils.clip_grad_norm_([param], 0.01)
    assert norm.item() == pytest.approx(values((50,), 1, torch.float16).float().mul(8).norm().item(), rel=1e-2)
    clipped = param.grad.clone()  # type: ignore[union-attr]
    scale.step(opt)
    scale.update()
    twin, reference = build(lr=1e-2)
    twin.grad = clipped
    reference.step()
    assert_same(opt, reference)


def test_an_overflow_found_while_unscaling_skips_the_step() -> None:
    param, opt = build()
    scale = scaler()
    backward(param, scale)
    param.grad[0] = torch.inf  # type: ignore[index]
    opt.unscale_(scale)
    before = param.detach().clone()
    scale.step(opt)
    scale.update()
    assert torch.equal(param, before)
    assert scale.get_scale() == SCALE / 2


def test_unscaling_twice_is_an_error_until_the_scaler_is_updated() -> None:
    param, opt = build()
    scale = scaler()
    backward(param, scale)
    opt.unscale_(scale)
    with pytest.raises(RuntimeError, match="call it once"):
        opt.unscale_(scale)
    scale.step(opt)
    with pytest.raises(RuntimeError, match="or the step made"):
        opt.unscale_(scale)
    scale.update()
    opt.unscale_(scale)


def test_unscaling_before_any_loss_was_scaled_is_an_error() -> None:
    _, opt = build()
    with pytest.raises(RuntimeError, match=r"call scaler\.scale\(loss\)\.backward\(\) before"):
        opt.unscale_(scaler())


def test_a_disabled_scaler_changes_nothing() -> None:
    param, opt = build()
    scale = torch.amp.GradScaler("cpu", enabled=False)
    param.grad = values((50,), 1, torch.float16)
    opt.unscale_(scale)
    scale.step(opt)
    scale.update()
    twin, reference = build()
    twin.grad = values((50,), 1, torch.float16)
    reference.step()
    assert_same(opt, reference)


def test_the_scale_does_not_outlive_the_scaled_step() -> None:
    param, opt = build()
    scale = scaler()
    backward(param, scale)
    scale.step(opt)
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")

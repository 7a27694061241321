"""Models whose large weights are kept in float8 components alone."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import collage
from collage.optim.strategies import layout_of
from comparing import assert_same, bits, parameter, values

STRATEGIES = ("fp8", "fp8-native", "fp8-3", "naive-fp8")
VOCABULARY, WIDTH = 300, 64


def model(tied: bool = False, seed: int = 0) -> nn.Sequential:
    """An embedding of 300 rows (whole tiles and a lower one), two layers, a head."""
    torch.manual_seed(seed)
    layers = (nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    net = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *layers, nn.Linear(WIDTH, VOCABULARY, bias=False))
    if tied:
        net[5].weight = net[0].weight
    return net


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(seed))


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return cross_entropy(net(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


def trained(strategy: str, steps: int = 3, tied: bool = False) -> tuple[nn.Sequential, collage.AdamW]:
    net = collage.to_fp8_(model(tied), strategy)
    opt = collage.AdamW(net.named_parameters(), lr=1e-3, strategy=strategy)
    for step in range(steps):
        loss_of(net, tokens(step)).backward()
        opt.step()
        opt.zero_grad()
    return net, opt


def tiled(net: nn.Module) -> dict[str, collage.TiledTensor]:
    return {name: p for name, p in net.named_parameters() if isinstance(p, collage.TiledTensor)}


# ---- the conversion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_of_linear_and_embedding_layers_are_kept_in_at_most_these_bytes(strategy: str) -> None:
    net, opt = trained(strategy, 1)
    assert set(tiled(net)) == {"0.weight", "1.weight", "3.weight", "5.weight"}
    for param in tiled(net).values():
        kept = [*param.parts, *(t for name, t in opt.state[param].items() if name not in ("step", "ordinal"))]
        counted = sum(t.numel() * t.element_size() for t in kept) / param.numel()
        assert counted <= {"fp8": 4.2, "fp8-native": 4.2, "fp8-3": 8.1, "naive-fp8": 3.1}[strategy]
        assert not [name for name in opt.state[param] if name.startswith("param")]
        assert param.untyped_storage().nbytes() == 0 or param.data_ptr() == 0


def test_the_conversion_starts_from_float32_values_also_of_a_model_that_was_cast_before() -> None:
    first, second = collage.to_fp8_(model()), collage.to_fp8_(collage.to_low_precision(model()))
    for (name, one), other in zip(tiled(first).items(), tiled(second).values(), strict=True):
        assert torch.equal(one.exact(), other.exact())
        wanted = model().get_parameter(name).detach()
        assert ((one.exact() - wanted).abs() <= wanted.abs().max() * 2.0**-12).all()
        assert torch.equal(one.detach().dequantize(), one.exact().bfloat16())
    assert first[1].bias.dtype == torch.bfloat16
    assert collage.to_fp8_(first) is first


def test_a_shared_weight_stays_one_and_attributes_stay() -> None:
    net = model(tied=True)
    net[1].weight.requires_grad_(False)
    collage.to_fp8_(net)
    assert net[5].weight is net[0].weight
    assert isinstance(net[0].weight, nn.Parameter)
    assert not net[1].weight.requires_grad
    assert len(list(net.parameters())) == 7


def test_tiles_may_be_low_and_the_rest_be_cast_later() -> None:
    net = collage.to_fp8_(model(), tile=(1, 32), cast=False)
    form = net[1].weight.form
    assert (form.rows, form.columns) == (1, 32)
    assert net[1].weight.scale.shape == (net[1].weight.shape[0], net[1].weight.shape[1] // 32)
    assert net[1].bias.dtype == torch.float32
    collage.to_low_precision(net)
    optimizer = collage.AdamW(net.parameters(), strategy="fp8")
    # A bias keeps 16 bits, of which the first 8 are what the model reads.
    full, wanted = optimizer.full_param(net[1].bias), model()[1].bias.detach()
    assert net[1].bias.dtype == torch.bfloat16
    assert not torch.equal(net[1].bias.float(), wanted)
    assert ((full - wanted).abs() <= wanted.abs() * 2.0**-16).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: collage.to_fp8_(model(), "plus"), "'plus' keeps no parameters in tiles"),
        (lambda: collage.to_fp8_(model(), tile=48), "power of two >= 32, .* got 48 and 1"),
        (lambda: collage.to_fp8_(model(), tile=(3, 64)), r"first may be less, .* got \(3, 64\) and 1"),
        (lambda: collage.to_fp8_(model(), tile=(0, 64)), r"got \(0, 64\)"),
        (lambda: collage.to_fp8_(model(), shards=0), "got 128 and 0"),
        (lambda: collage.to_fp8_(model().half()), "0.weight is torch.float16; allowed"),
        (lambda: collage.to_fp8_(nn.Linear(8, 8)), "no Linear or Embedding weight that could be kept"),
        (lambda: collage.to_fp8_(model(), forward="low"), "forward must be one of value, hi, fp8, got 'low'"),
        (
            lambda: collage.AdamW(collage.to_fp8_(model()).parameters()),
            "'plus' keeps no parameters in tiles of Remainder",
        ),
        (
            lambda: collage.AdamW(collage.to_fp8_(model()).parameters(), strategy="fp8-3"),
            "'fp8-3' keeps no parameters in tiles of Remainder",
        ),
        (
            lambda: collage.to_fp8_(model())[0].weight.split(100),
            "300 rows in tiles of 128 cannot be split into parts of",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rows", "shards", "height"), [(256, 1, 128), (256, 2, 128), (192, 2, 32), (300, 2, 2), (258, 4, 1), (50257, 2, 1)]
)
def test_tiles_are_made_so_that_shards_cut_none(rows: int, shards: int, height: int) -> None:
    net = collage.to_fp8_(nn.Embedding(rows, 64), shards=shards)
    assert net.weight.form.rows == height
    assert [len(part) for part in net.weight.chunk(shards)] == [len(p) for p in torch.zeros(rows).chunk(shards)]


# ---- what operations see --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", ["value", "hi"])
def test_outputs_and_gradients_are_those_of_a_bfloat16_model_with_these_values(forward: str) -> None:
    net, plain = collage.to_fp8_(model(tied=True), forward=forward), model(tied=True).bfloat16()
    plain.load_state_dict(net.state_dict())
    if forward == "hi":
        assert not torch.equal(plain[1].weight, net[1].weight.exact().bfloat16())
    for each in (net, plain):
        loss_of(each, tokens()).backward()
    assert torch.equal(net(tokens()), plain(tokens()))
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert type(mine.grad) is Tensor
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(net(tokens()), plain(tokens()))


def test_autograd_keeps_components_and_no_values_for_the_backward_pass() -> None:
    net = collage.to_fp8_(nn.Linear(256, 512, bias=False))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.ones(2, 256, dtype=torch.bfloat16, requires_grad=True))
    large = [t for t in kept if t.numel() == 256 * 512]
    assert large
    assert all(isinstance(t, collage.TiledTensor) for t in large)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    net = collage.to_fp8_(nn.Linear(128, 64, bias=False))
    opt = collage.AdamW(net.parameters(), strategy="fp8")
    loss = net(torch.ones(2, 128, dtype=torch.bfloat16, requires_grad=True)).sum()
    net.weight.grad = torch.ones(64, 128, dtype=torch.bfloat16)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_writes_are_rounded_into_the_components_and_indices_are_copies() -> None:
    weight = collage.to_fp8_(nn.Linear(128, 64)).weight.detach()
    weight.mul_(2.0).add_(1.0)
    assert isinstance(weight, collage.TiledTensor)
    value = values((64, 128), 1)
    weight.copy_(value)
    assert torch.equal(weight.dequantize(), value)
    weight.zero_()
    assert not weight.dequantize().any()
    assert type(weight[3]) is Tensor
    assert type(torch.zeros_like(weight)) is Tensor
    assert type(torch.empty_like(weight)) is collage.TiledTensor
    assert weight.to(torch.float32).dtype == torch.float32
    with pytest.raises(NotImplementedError, match="cannot write into a parameter in tiles"):
        torch._foreach_add_([weight], 1.0)


def test_activation_checkpointing_changes_no_bit() -> None:
    nets = [collage.to_fp8_(model()) for _ in range(2)]
    loss_of(nets[0], tokens()).backward()
    loss_of(lambda x: checkpoint(nets[1], x, use_reentrant=False), tokens()).backward()  # type: ignore[arg-type]
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_compilers_keep_apart_what_reads_differently() -> None:
    def name(forward: str = "value", inputs: int = 64, tile: int = 32, transposed: bool = False) -> str:
        weight = collage.to_fp8_(nn.Linear(inputs, 64), forward=forward, tile=tile).weight.detach()
        return (weight.t() if transposed else weight)._stable_hash_for_caching()

    names = [name(), name("hi"), name("fp8"), name(inputs=128), name(tile=64), name(transposed=True)]
    assert len(set(names)) == len(names)
    assert name() == names[0]


@pytest.mark.parametrize("strategy", ["fp8", "fp8-native"])
def test_a_compiled_model_trains_as_one_that_is_not(strategy: str) -> None:
    nets = [collage.to_fp8_(model(tied=True), strategy) for _ in range(2)]
    opts = [collage.AdamW(net.parameters(), lr=1e-3, strategy=strategy) for net in nets]
    compiled = torch.compile(nets[1], backend="aot_eager", fullgraph=True)
    for step in range(2):
        for net, opt in zip((nets[0], compiled), opts, strict=True):
            loss_of(net, tokens(step)).backward()
            opt.step()
            opt.zero_grad()
    assert_same(*opts)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_transformers_models_train_and_load_into_ordinary_ones(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = transformers.AutoConfig.for_model(family, num_attention_heads=4, **sizes)
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    collage.to_fp8_(net)
    opt = collage.AdamW(net.parameters(), lr=1e-3, strategy="fp8")
    losses = []
    for _ in range(4):
        loss = net(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(collage.join_tiles(load(save(collage.split_tiles(net.state_dict())))))
    for name, param in tiled(net).items():
        assert torch.equal(plain.get_parameter(name), param.exact().bfloat16())
    assert torch.equal(plain(input_ids=tokens()).logits, net(input_ids=tokens()).logits)


# ---- copies and files -----------------------------------------------------------------------------------------------


def through_pickle(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def through_a_state(net: nn.Module) -> nn.Module:
    other = collage.to_fp8_(model(tied=True, seed=1).bfloat16())
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    return other


def through_safetensors(net: nn.Module) -> nn.Module:
    other = collage.to_fp8_(model(tied=True, seed=1).bfloat16())
    other.load_state_dict(collage.join_tiles(load(save(collage.split_tiles(net.state_dict())))))
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_state, through_safetensors])
def test_copies_have_the_bits_and_train_on_alike(copied) -> None:
    net, opt = trained("fp8", tied=True)
    other = copied(net)
    assert isinstance(other[1].weight, nn.Parameter)
    assert other[5].weight is other[0].weight
    assert other[1].weight.hi.data_ptr() != net[1].weight.hi.data_ptr()
    again = collage.AdamW(other.named_parameters(), lr=1e-3, strategy="fp8")
    again.load_state_dict(opt.state_dict())
    assert_same(again, opt)
    for each, optimizer in ((net, opt), (other, again)):
        loss_of(each, tokens(9)).backward()
        optimizer.step()
    assert_same(again, opt)


def test_files_name_the_components_and_a_missing_one_is_an_error() -> None:
    net, _ = trained("fp8", 1, tied=True)
    split = collage.split_tiles(net.state_dict())
    assert {name for name in split if name.startswith("1.weight")} == {
        f"1.weight.{part}" for part in ("hi", "lo", "scale", "form")
    }
    assert [name for name in split if name.startswith("5.weight")] == ["5.weight.form"]
    del split["1.weight.lo"]
    with pytest.raises(ValueError, match=r"1\.weight lacks lo"):
        collage.join_tiles(split)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_float32_checkpoint_comes_into_tiles_and_back_with_its_error_told(strategy: str) -> None:
    full = model()
    reference = torch.optim.AdamW(full.named_parameters(), lr=1e-3)
    for step in range(2):
        loss_of(full, tokens(step)).backward()
        reference.step()
        reference.zero_grad()
    net = collage.to_fp8_(model(seed=1), strategy)
    opt = collage.AdamW(net.named_parameters(), lr=1e-3, strategy=strategy)
    low = collage.convert.from_fp32(full.state_dict(), reference.state_dict(), strategy=strategy, like=net.state_dict())
    assert low.optimizer is not None
    net.load_state_dict(low.model)
    opt.load_state_dict(low.optimizer)
    back = collage.convert.to_fp32(net.state_dict(), opt.state_dict())
    worst = 0.0
    for name, param in full.named_parameters():
        assert torch.equal(back.model[name], opt.full_param(net.get_parameter(name)))
        error = (back.model[name] - param.detach()).double().abs().max() / param.detach().double().abs().max()
        worst = max(worst, error.item())
    assert low.worst["param"] == worst
    assert worst <= {"fp8": 2.0**-12, "fp8-native": 2.0**-9, "fp8-3": 2.0**-13, "naive-fp8": 2.0**-4}[strategy]
    assert 0 < low.worst["exp_avg_sq"] < 0.15


# ---- what a step delivers -------------------------------------------------------------------------------------------


@cache
def delivered(strategy: str, weight: float, lr: float, steps: int = 40) -> float:
    """Mean displacement of the held values of 2^17 elements over AdamW's in float64, noisy gradients of one sign."""
    generator = torch.Generator().manual_seed(0)
    start = weight * (1 + 0.5 * torch.rand((256, 512), generator=generator, dtype=torch.float64))
    param = parameter(start.bfloat16(), strategy)
    reference = nn.Parameter(param.exact(torch.float64))  # type: ignore[attr-defined]
    opt = collage.AdamW([param], lr=lr, weight_decay=0.0, strategy=strategy)
    exact = torch.optim.AdamW([reference], lr=lr, weight_decay=0.0)
    begin = reference.detach().clone()
    for _ in range(steps):
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float32)
        param.grad = (1e-3 * (1 + 0.3 * noise)).bfloat16()
        reference.grad = param.grad.double()
        opt.step()
        exact.step()
    return float((opt.full_param(param, torch.float64) - begin).mean() / (reference.detach() - begin).mean())


@pytest.mark.parametrize("weight", [1.0, 0.02])
@pytest.mark.parametrize("strategy", ["fp8", "fp8-native"])
def test_the_intended_displacement_is_delivered(strategy: str, weight: float) -> None:
    assert delivered(strategy, weight, 1e-5) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("weight", [1.0, 0.02])
def test_a_lone_float8_weight_does_not_move(weight: float) -> None:
    assert abs(delivered("naive-fp8", weight, 1e-5, 10)) < 0.2


@pytest.mark.parametrize(
    ("strategy", "beta2"), [("fp8", 0.95), ("fp8", 0.99), ("fp8", 0.999), ("fp8-native", 0.95), ("fp8-3", 0.95)]
)
def test_v_follows_the_exact_average_through_a_fall_of_the_gradients(strategy: str, beta2: float) -> None:
    param, steps = parameter(torch.zeros(64, 128, dtype=torch.bfloat16), strategy), int(6 / (1 - beta2))
    opt = collage.AdamW([param], lr=0.0, betas=(0.9, beta2), weight_decay=0.0, strategy=strategy)
    generator = torch.Generator().manual_seed(1)
    scale = 1e-3 * torch.exp(1.15 * torch.randn(param.shape, generator=generator, dtype=torch.float64))
    exact = torch.zeros(param.shape, dtype=torch.float64)
    for step in range(steps):
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = (noise * scale / (1 if step < steps // 3 else 3)).bfloat16()
        exact.mul_(beta2).add_(param.grad.double() ** 2, alpha=1 - beta2)
        opt.step()
    layout = layout_of(strategy, param)
    held = layout.exp_avg_sq.exact(layout.parts("exp_avg_sq", param.detach(), opt.state[param]))
    assert (held > 0).all()
    median = (held / exact).median().item()
    assert median == pytest.approx(1.0, abs={"fp8": 0.02, "fp8-native": 0.1, "fp8-3": 0.02}[strategy])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_of_zero_lr_leaves_the_value_as_it_was(strategy: str) -> None:
    net, opt = trained(strategy, 1)
    before = {name: param.exact() for name, param in tiled(net).items()}
    opt.param_groups[0]["lr"] = 0.0
    for step in range(2):
        loss_of(net, tokens(step + 5)).backward()
        opt.step()
    assert all(torch.equal(param.exact(), before[name]) for name, param in tiled(net).items())


def test_a_gradient_that_is_not_finite_spoils_its_blocks_and_a_scale_that_grows_spoils_nothing() -> None:
    params = [parameter(values((256, 128), 0), "fp8") for _ in range(2)]
    opts = [collage.AdamW([param], lr=1e-3, strategy="fp8") for param in params]
    for step in range(2):
        for number, (param, opt) in enumerate(zip(params, opts, strict=True)):
            param.grad = values((256, 128), 10 + step)
            if number and step == 0:
                param.grad[3, 5] = torch.inf
            opt.step()
    clean, spoiled = (param.exact() for param in params)  # type: ignore[attr-defined]
    assert spoiled[3].isnan().all()
    assert spoiled.isnan().sum() == 128
    kept = ~spoiled.isnan()
    # Tile by tile: the spoiled row counts for no scale of the others.
    assert (
        (spoiled - clean)[kept].abs() <= clean[kept].abs() * 2.0**-9 + 2.0**-12 * clean.nan_to_num(0).abs().max()
    ).all()
    assert torch.equal(spoiled[128:], clean[128:])


def test_large_weights_that_were_left_out_of_tiles_are_told_of() -> None:
    with pytest.warns(
        UserWarning, match=r"3 parameters that strategy 'fp8' could keep in tiles are not .*collage.to_fp8_"
    ):
        collage.AdamW(model(tied=True).bfloat16().parameters(), strategy="fp8")


def test_an_audit_counts_what_was_lost() -> None:
    found = {}
    for strategy in ("fp8", "naive-fp8"):
        net = collage.to_fp8_(model(), strategy)
        opt = collage.AdamW(net.named_parameters(), lr=1e-5, strategy=strategy)
        audit = collage.audit(opt, every=1)
        loss_of(net, tokens()).backward()
        opt.step()
        found[strategy] = audit.report()["modules"]["1"]
    assert found["fp8"]["edq_ratio"] == pytest.approx(1.0, abs=0.05)
    assert found["naive-fp8"]["edq_ratio"] == pytest.approx(0.0, abs=0.3)
    assert found["naive-fp8"]["lost_fraction"] > 0.95 > found["fp8"]["lost_fraction"]  # type: ignore[operator]
    assert found["fp8"]["lost_fraction_hi"] > found["fp8"]["lost_fraction"]  # type: ignore[operator]


# ---- gradient release -----------------------------------------------------------------------------------------------


def test_gradients_released_in_the_backward_pass_have_been_stepped_with() -> None:
    (net, opt), (other, reference) = trained("fp8", 0, tied=True), trained("fp8", 0, tied=True)
    release = collage.GradientRelease(opt)
    for step in range(2):
        loss_of(net, tokens(step)).backward()
        assert all(param.grad is None for param in net.parameters())
        opt.step()
        loss_of(other, tokens(step)).backward()
        reference.step()
        reference.zero_grad()
    assert_same(opt, reference)
    release.remove()
    loss_of(net, tokens()).backward()
    assert all(param.grad is not None for param in net.parameters())


def test_bits_of_a_pickle_are_the_components() -> None:
    net, _ = trained("fp8-native", 1)
    again = pickle.loads(pickle.dumps(net[1].weight))
    for mine, theirs in zip(net[1].weight.parts, again.parts, strict=True):
        assert torch.equal(bits(mine), bits(theirs))

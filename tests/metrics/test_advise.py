"""The advice: the cheapest strategy that holds the bounds, found by storing with the storages themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import collage
from comparing import bits, values


def trained(
    make: Any, lr: float, beta2: float, steps: int = 5, dtype: torch.dtype = torch.bfloat16, tiles: str | None = None
) -> tuple[Any, Any]:
    """A model of two modules with weights near 1 and near 1/1000, and its optimizer after some steps."""
    model = nn.ModuleDict({"large": nn.Linear(64, 64, bias=False), "small": nn.Linear(64, 64, bias=False)}).to(dtype)
    with torch.no_grad():
        for place, (param, spread) in enumerate(zip(model.parameters(), (1.0, 1e-3), strict=True)):
            param.copy_(values((64, 64), place, dtype, spread))
    if tiles is not None:
        collage.to_fp8_(model, tiles)
    opt = make(model.parameters(), lr=lr, betas=(0.9, beta2))
    for seed in range(1, steps + 1):
        set_gradients(model, seed)
        opt.step()
    set_gradients(model, 99)
    return model, opt


def set_gradients(model: nn.Module, seed: int) -> None:
    # Smaller and smaller, so that second moments shrink.
    for place, param in enumerate(model.parameters()):
        param.grad = values(tuple(param.shape), 10 * seed + place, param.dtype) / (1 + seed)


def strategies_of(advice: collage.Advice) -> dict[str, Any]:
    return {row.module: row.strategy for row in advice.rows}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, collage.AdamW])
def test_each_module_gets_the_cheapest_strategy_that_holds(make: Any) -> None:
    model, opt = trained(make, lr=1e-4, beta2=0.95)
    advice = collage.advise(model, opt, candidates=["plain", "light", "plus", "mixed"])
    assert strategies_of(advice) == {"large": "light", "small": "plain"}
    assert advice.bytes == 64 * 64 * (10 + 8)
    large, small = advice.rows
    assert list(large.trials) == ["plain", "light", "plus", "mixed"]
    assert large.trials["plain"].edq_ratio < 0.5
    assert small.trials["plain"].edq_ratio == pytest.approx(1.0, abs=0.01)
    assert large.trials["mixed"].edq_ratio == pytest.approx(1.0, abs=1e-3)


def test_a_second_moment_that_cannot_decay_calls_for_plus() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-4, beta2=0.999)
    advice = collage.advise(model, opt, candidates=["plain", "light", "plus", "mixed"])
    assert strategies_of(advice) == {"large": "plus", "small": "plus"}
    trials = advice.rows[0].trials
    assert abs(trials["light"].decay_kept) < 0.2
    assert trials["plus"].decay_kept == pytest.approx(1.0, abs=0.05)
    lenient = collage.advise(model, opt, candidates=["plain", "light", "plus"], decay_bound=-1.0)
    assert strategies_of(lenient) == {"large": "light", "small": "plain"}


def test_what_is_tried_is_what_collages_own_step_then_does() -> None:
    for name, strategy in collage.strategies().items():
        if name not in ("plain", "light", "compact", "exact") and not strategy.param.borne:
            continue
        tiles = name if strategy.param.borne else None
        make = lambda p, name=name, **o: collage.AdamW(p, strategy=name, **o)  # noqa: E731
        # Of smaller updates in tiles a single step says little: draws of the random bits outweigh them.
        model, opt = trained(make, lr=1e-2 if tiles else 1e-4, beta2=0.99, tiles=tiles)
        tried = collage.advise(model, opt, candidates=[name], bound=0.0, decay_bound=-1, noise_bound=100)
        audit = collage.audit(opt, every=1, model=model)
        opt.step()
        for row in tried.rows:
            came = audit.report()["modules"][row.module]["edq_ratio"]
            # Two draws of the random bits differ; the share that is kept does not by more than this.
            assert row.trials[name].edq_ratio == pytest.approx(came, abs=0.03), name


def test_strategies_in_tiles_are_tried_where_they_are_named_or_the_model_is_in_tiles() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-2, beta2=0.95)
    row = collage.advise(model, opt, candidates=["fp8", "naive-fp8", "plus"]).rows[0]
    assert row.strategy == "fp8"
    assert list(row.trials) == ["naive-fp8", "fp8", "plus"]
    # A scale for 64 elements of each moment: rows are no longer.
    assert row.trials["fp8"].bytes_per_param == 6 + 2 * 4 / 64 + 1 / (128 * 64)
    assert row.trials["naive-fp8"].edq_ratio < 0.5
    assert not any(collage.strategies()[name].param.borne for name in collage.advise(model, opt).rows[0].trials)
    make = lambda p, **o: collage.AdamW(p, strategy="fp8", **o)  # noqa: E731
    model, opt = trained(make, lr=1e-2, beta2=0.95, tiles="fp8")
    advice = collage.advise(model, opt)
    assert {"fp8", "fp8-native", "fp8-3", "light"} <= set(advice.rows[0].trials)
    assert "naive-fp8" not in advice.rows[0].trials


def test_tiles_are_tried_on_samples_that_are_no_whole_rows() -> None:
    model = nn.Linear(320, 60, bias=False).to(torch.bfloat16)
    # Far below the smallest number of e4m3, 2**-9: a tile without its scale would hold zeros.
    model.weight.data.copy_(values((60, 320), 0, spread=1e-5))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-7)
    for seed in (1, 2, 3):
        model.weight.grad = values((60, 320), seed)
        opt.step()
    in_tiles = [name for name, strategy in collage.strategies().items() if strategy.param.borne]
    whole, sampled = (
        collage.advise(model, opt, candidates=in_tiles, memory=memory).rows[0].trials for memory in (None, 1 << 16)
    )
    for name in in_tiles:
        assert sampled[name].noise != whole[name].noise
        assert sampled[name].edq_ratio == pytest.approx(whole[name].edq_ratio, abs=0.05), name
        assert (whole[name].edq_ratio > 0.9) == (name != "naive-fp8")


def test_advice_is_no_parameter_groups_for_parameters_that_are_kept_otherwise() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-2, beta2=0.95)
    advice = collage.advise(model, opt, candidates=["fp8"])
    with pytest.raises(ValueError, match=r"keeps parameter 'large.weight' in tiles, .*to_fp8_\(.*'large'\), 'fp8'\)"):
        advice.param_groups(model)
    collage.to_fp8_(model)
    (group,) = advice.param_groups(model)
    own = collage.AdamW([group])
    set_gradients(model, 3)
    own.step()
    other = collage.advise(model, own, candidates=["light"], bound=0.0, decay_bound=-1)
    with pytest.raises(
        ValueError, match=r"'light' cannot keep parameter 'large.weight', which is in tiles of Remainder"
    ):
        other.param_groups(model)


def test_stochastic_rounding_of_a_lone_weight_is_refused_for_its_noise() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-5, beta2=0.95)
    quiet = collage.advise(model, opt, candidates=["stochastic", "light"], bound=0.9)
    assert strategies_of(quiet)["large"] == "light"
    assert quiet.rows[0].trials["stochastic"].noise > 3
    loud = collage.advise(model, opt, candidates=["stochastic", "light"], bound=0.5, noise_bound=100)
    assert strategies_of(loud)["large"] == "stochastic"


def test_by_default_the_table_is_searched_and_compact_is_the_cheapest_that_holds() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-3, beta2=0.95)
    row = collage.advise(model, opt).rows[0]
    bytes_per_param = [trial.bytes_per_param for trial in row.trials.values()]
    assert bytes_per_param == sorted(bytes_per_param)
    assert row.strategy in ("compact", "compact-4bit")
    assert not {"naive-8bit", "fp32", "fp16"} & set(row.trials)


def test_advice_on_a_float32_model_is_for_the_dtype_it_may_be_cast_to() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-4, beta2=0.95, dtype=torch.float32)
    assert strategies_of(collage.advise(model, opt, candidates=["plain", "light"])) == {
        "large": "light",
        "small": "plain",
    }
    half = collage.advise(model, opt, candidates=["fp16"], dtype=torch.float16)
    assert strategies_of(half) == {"large": "fp16", "small": "fp16"}


def test_nothing_is_stepped_unless_a_step_is_given_and_then_the_run_is_as_it_would_be() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-4, beta2=0.95)
    before, random = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    collage.advise(model, opt)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())

    def stepped(advised: bool) -> tuple[list[Tensor], Any]:
        model, opt = trained(torch.optim.AdamW, lr=1e-4, beta2=0.95)
        seeds = iter(range(20, 23))

        def take_step() -> None:
            set_gradients(model, next(seeds))
            opt.step()

        if advised:
            return [p.detach() for p in model.parameters()], collage.advise(model, opt, take_step=take_step, steps=3)
        for _ in range(3):
            take_step()
        return [p.detach() for p in model.parameters()], None

    (alone, _), (watched, advice) = stepped(False), stepped(True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(alone, watched, strict=True))
    assert advice.steps == 3


def test_the_advice_becomes_parameter_groups_and_a_table() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-4, beta2=0.95)
    advice = collage.advise(model, opt, candidates=["plain", "light"])
    groups = advice.param_groups(model)
    assert [(g["strategy"], [name for name, _ in g["params"]]) for g in groups] == [
        ("light", ["large.weight"]),
        ("plain", ["small.weight"]),
    ]
    own = collage.AdamW(groups)
    set_gradients(model, 3)
    own.step()
    text = str(advice).splitlines()
    assert text[0].split()[:4] == ["module", "elements", "strategy", "bytes"]
    assert text[1].split()[:4] == ["large", "4,096", "light", "10"]
    assert text[-1] == "EDQ ratio at least 0.99 in 1 audited steps; 0.1 MiB with gradients"


def test_where_none_holds_none_is_named() -> None:
    model, opt = trained(torch.optim.AdamW, lr=1e-5, beta2=0.95)
    advice = collage.advise(model, opt, candidates=["plain"])
    assert (strategies_of(advice)["large"], advice.bytes) == (None, None)
    assert "none holds" in str(advice)
    with pytest.raises(ValueError, match=r"no strategy for parameter 'large\.weight'"):
        advice.param_groups(model)


def test_what_cannot_be_advised_on_is_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="no step could be replayed"):
        collage.advise(model, torch.optim.AdamW(model.parameters()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="needs an optimizer with Adam's moments"):
        collage.advise(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no strategy is called 'fast'"):
        collage.advise(model, torch.optim.AdamW(model.parameters()), candidates=["fast"])


def test_processes_that_share_a_model_have_the_advice_on_the_whole() -> None:
    worker = Path(__file__).with_name("sharded_advice_worker.py")
    path = os.pathsep.join([str(worker.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr

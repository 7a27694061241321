"""`collage bench precision`: what it finds on a small tensor, what it writes and shows, what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_small import Bench, adamw, peer

import collage
from collage import cli, kernels
from collage.bench import peers, precision
from collage.bench.contenders import HYPER, Contender, own_contenders, torch_contenders
from collage.bench.options import make_precision_plan
from collage.bench.page import write_page
from collage.bench.peers import Variant
from collage.bench.precision import PrecisionPlan, measure, tracking
from collage.bench.readings import PLAIN, Reads

CPU, BF16 = torch.device("cpu"), torch.bfloat16
TINY = ("precision", "--elements", 4096, "--steps", 20, "--threads", 1)


class Silent:
    """A Watcher that counts."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.steps = 0

    def begins(self, what: str) -> None:
        self.runs.append(what)

    def stepped(self) -> None:
        self.steps += 1


def found(contenders: list[Contender], steps: int = 60, elements: int = 4096) -> dict[str, precision.Found]:
    plan = PrecisionPlan(tuple(contenders), CPU, elements, steps)
    return {each.contender.name: each for each in measure(plan, Silent())[0]}


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in result["rows"]}


def shares(each: precision.Found, weights: str) -> dict[float, float]:
    return {cell["lr"]: cell["share"] for cell in each.displacement if cell["weights"] == weights}


@pytest.fixture(scope="module")
def own() -> dict[str, precision.Found]:
    names = ["plain", "light", "plus", "mixed", "fp32", "compact", "fp16", "naive-8bit"]
    return {name.removeprefix("collage "): each for name, each in found(own_contenders(names, [None], BF16)).items()}


def test_plain_delivers_nothing_of_small_updates_and_others_everything(own: dict[str, precision.Found]) -> None:
    for name in ("plain", "naive-8bit"):
        assert list(shares(own[name], "1 .. 1.5").values()) == [0.0] * 3
    for name in ("light", "plus", "mixed", "fp32", "fp16"):
        for weights in ("1 .. 1.5", "0.02 .. 0.03"):
            assert shares(own[name], weights) == pytest.approx(dict.fromkeys(precision.RATES, 1.0), abs=0.02), name
    assert shares(own["compact"], "1 .. 1.5")[1e-4] == pytest.approx(1.0, abs=0.03)


def test_weight_decay_alone_is_lost_by_plain_and_kept_by_the_others(own: dict[str, precision.Found]) -> None:
    assert [cell["share"] for cell in own["plain"].decay] == [0.0, 0.0]
    for name in ("light", "plus", "mixed", "fp32", "fp16"):
        assert [cell["share"] for cell in own[name].decay] == pytest.approx([1.0, 1.0], abs=0.01), name
    assert own["mixed"].decay[0]["exact_factor"] == (1 - 1e-5) ** 60


def test_a_second_moment_in_float32_is_exact_and_one_in_8_bits_is_right_on_average(
    own: dict[str, precision.Found],
) -> None:
    for cell in own["mixed"].second_moment:
        assert (cell["p5"], cell["p50"], cell["p95"], cell["mean"]) == pytest.approx((1.0,) * 4, abs=1e-5)
    for cell in own["compact"].second_moment:
        assert cell["p5"] < 0.99 < cell["p50"] < 1.01 < cell["p95"]
        assert cell["zeros"] == 0
        assert cell["positive"] == 4096
    assert [(cell["beta2"], cell["steps"]) for cell in own["plus"].second_moment] == [
        (0.95, 120),
        (0.99, 180),
        (0.999, 180),
    ]


def test_strategies_run_on_parameters_of_their_own_dtype(own: dict[str, precision.Found]) -> None:
    dtypes = {name: each.contender.dtype for name, each in own.items()}
    assert (dtypes["fp16"], dtypes["fp32"], dtypes["plus"]) == (torch.float16, torch.float32, BF16)
    assert all(not each.error and each.backend in ("native", "eager") for each in own.values())


def test_the_float32_master_is_what_is_read_of_torchs_own() -> None:
    made = found([each for each in torch_contenders(BF16) if "fp32" in each.name], 10)
    master, full = made["torch fused, fp32 master of bf16"], made["torch fused fp32"]
    assert master.displacement == full.displacement
    assert master.second_moment == full.second_moment


def test_same_bits_are_counted_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PrecisionPlan(tuple(own_contenders(precision.EQUAL, [None], BF16)), CPU, 4096, 10)
    watcher = Silent()
    equality = measure(plan, watcher)[1]
    assert (equality.runs, equality.different) == (plan.runs, 0)
    assert (len(watcher.runs), watcher.steps) == (plan.runs, plan.all_steps)
    monkeypatch.setattr(precision, "EQUAL", ("plus", "mixed"))
    plan = PrecisionPlan(tuple(own_contenders(precision.EQUAL, [None], BF16)), CPU, 4096, 10)
    assert measure(plan, Silent())[1].different > 4096


def test_tracking_is_of_what_is_positive() -> None:
    exact = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    told = tracking(torch.tensor([5.0, 0.0, 2.0, 8.0], dtype=torch.float64), exact)
    assert told == {"p5": 0.0, "p50": 1.0, "p95": 2.0, "mean": 1.0, "zeros": 1, "positive": 3}


def test_a_moment_that_is_kept_corrected_is_compared_with_the_corrected_one() -> None:
    def corrected(stepper: Any, param: Any) -> torch.Tensor:
        state = stepper.state[param]
        beta2 = stepper.param_groups[0]["betas"][1]
        return state["exp_avg_sq"].double() / (1 - beta2 ** float(state["step"]))

    (full,) = [each for each in torch_contenders(BF16) if each.name == "torch fused fp32"]
    both = {
        name: Contender(
            name, "torch", full.build, None, torch.float32, "torch", reads=Reads(second_moment=read, corrected=told)
        )
        for name, read, told in (("right", corrected, True), ("wrong", PLAIN.second_moment, True))
    }
    made = found(list(both.values()), 10)
    assert made["right"].second_moment[-1]["p50"] == pytest.approx(1.0, abs=1e-5)
    assert made["wrong"].second_moment[-1]["p50"] == pytest.approx(1 - 0.999**30, rel=1e-4)


def test_torchs_own_generator_is_as_before() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found(own_contenders(["plus"], [None], BF16), 10)
    assert torch.equal(before, torch.get_rng_state())


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covered", [True, False], ids=["covered", "not covered"])
@pytest.mark.parametrize("strategy", ["fp8", "fp8-native"])
def test_the_backend_that_a_row_names_is_the_one_that_steps_its_tiles(
    strategy: str, covered: bool, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, type]] = []
    serves = kernels.native.serves

    def spied(backend: str) -> Any:
        step = kernels._STEPS[backend]
        return lambda batch, inputs: ran.append((backend, type(batch.layout.param))) or step(batch, inputs)

    for backend in ("native", "eager"):
        monkeypatch.setitem(kernels._STEPS, backend, spied(backend))
    if not covered:
        # What keeps the parameters that are too small for tiles has native kernels still.
        monkeypatch.setattr(
            kernels.native,
            "serves",
            lambda layout, dtype: type(layout.param) is not collage.Tiled and serves(layout, dtype),
        )
    row = by_name(run_bench(*TINY, "--strategies", strategy, "--peers", "none"))[f"collage {strategy}"]
    assert set(ran) == {(row["backend"], collage.Tiled)}
    assert covered or row["backend"] == "eager"


def test_every_strategy_has_a_row_in_the_json_and_in_the_table(run_bench: Bench) -> None:
    result = run_bench("precision", "--elements", 4096, "--steps", 10, "--peers", "none")
    rows = by_name(result)
    assert list(rows) == [f"collage {name}" for name in collage.strategies()]
    for name, row in rows.items():
        assert row["status"] == "measured", row["reason"]
        assert [len(row[key]) for key in ("displacement", "decay", "second_moment")] == [6, 2, 3]
        assert name in result["printed"]
    assert result["equal"] == {"strategies": ["exact-fp32-states", "mixed"], "runs": 7, "different": 0}
    assert "exact-fp32-states and mixed hold the same bits" in result["printed"]


def test_a_row_and_the_file_explain_themselves(run_bench: Bench) -> None:
    result = run_bench(*TINY, "--strategies", "plus", "--peers", "none")
    row = by_name(result)["collage plus"]
    assert (result["kind"], result["elements"], result["shape"], result["steps"]) == (
        "bench precision",
        4096,
        [32, 128],
        20,
    )
    assert result["equal"] is None
    assert (row["strategy"], row["dtype"], row["version"]) == ("plus", "bfloat16", collage.__version__)
    for key in ("device", "threads", "commit", "command", "created"):
        assert row[key] == result[key]
    assert result["command"].startswith("collage bench precision --elements 4096 --steps 20")


def test_peers_that_cannot_run_or_fail_are_named_with_the_reason(run_bench: Bench) -> None:
    result = run_bench(*TINY, "--strategies", "plus", "--peers", "absent,elsewhere,broken,good")
    rows = by_name(result)
    assert rows["absent one"]["status"] == rows["elsewhere one"]["status"] == "skipped"
    assert rows["broken at once"]["status"] == "failed"
    assert rows["broken at once"]["reason"] == "RuntimeError: no such instruction"
    assert "skipped: absent one: not installed; remedy: pip install no-such-package" in result["printed"]
    assert "failed: broken at once: RuntimeError" in result["printed"]
    assert rows["good one"]["status"] == "measured"
    assert rows["good one"]["displacement"][0]["share"] == 0.0


def test_a_state_that_cannot_be_read_is_told(run_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(None, lambda stepper, param: stepper.state[param]["v"])
    made = peer("dark", "torch", Variant("one", adamw, None, reads=reads))
    monkeypatch.setattr(peers, "PEERS", (made,))
    monkeypatch.setattr(peers, "NAMES", ("dark",))
    result = run_bench(*TINY, "--strategies", "plus", "--peers", "dark")
    row = by_name(result)["dark one"]
    assert (row["displacement"], row["second_moment"], row["second_moment_reason"]) == ([], [], "KeyError: 'v'")
    assert "no second moment: dark one: KeyError: 'v'" in result["printed"]
    assert "no displacement: dark one" in result["printed"]


def test_hyper_parameters_that_are_given_replace_the_benchmarks_own() -> None:
    param = torch.nn.Parameter(torch.zeros(4, 4, dtype=BF16))
    for contender in (*own_contenders(["plus"], [None], BF16), *torch_contenders(BF16)[2:]):
        (group,) = contender.build([param], lr=0.5).param_groups  # type: ignore[attr-defined]
        assert (group["lr"], group["betas"]) == (0.5, HYPER["betas"])


def test_the_page_is_made_of_the_figures_in_the_file(run_bench: Bench, tmp_path: Path) -> None:
    result = run_bench(*TINY, "--strategies", "plain,plus,exact-fp32-states,mixed", "--peers", "torch,absent")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(result))
    page = write_page(folder)
    assert "[precision.md](precision.md)" in page.read_text(encoding="utf-8")
    text = (folder / "precision.md").read_text(encoding="utf-8")
    assert (folder / "plots" / "small.png").read_bytes().startswith(b"\x89PNG")
    assert "](plots/small.png)" in text
    for said in ("| **collage plus** |", "| torch fused bf16 |", result["command"], "hold the same bits"):
        assert said in text
    assert "- skipped: absent one: not installed" in text
    row = next(row for row in result["rows"] if row["contender"] == "collage plus")
    row["displacement"][0]["share"] = 0.4321
    (folder / "small.json").write_text(json.dumps(result))
    write_page(folder)
    changed = (folder / "precision.md").read_text(encoding="utf-8")
    assert "| 0.43 |" in changed
    assert "| 0.43 |" not in text


def test_a_figure_that_is_not_finite_is_shown_as_missing(run_bench: Bench, tmp_path: Path) -> None:
    result = run_bench(*TINY, "--strategies", "plus", "--peers", "none")
    row = result["rows"][0]
    row["second_moment"][-1] |= {"p95": None, "mean": None}
    row["displacement"][0] |= {"share": None, "scatter": None}
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "small.json").write_text(json.dumps(result))
    write_page(tmp_path / "page")
    assert "| – |" in (tmp_path / "page" / "precision.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--strategies", "plus,nonsense"), "--strategies must be names of plain, stochastic"),
        (("--peers", "nobody"), "--peers must be all, none, or names of torch, good, absent"),
        (("--elements", 4095), "--elements must be a multiple of 256, at least 4096, got 4095"),
        (("--elements", 256), "--elements must be a multiple of 256, at least 4096, got 256"),
        (("--steps", 9), "--steps must be >= 10, got 9"),
        (("--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("--threads", 0), "--threads must be >= 1, got 0"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused_before_anything_is_measured(
    arguments: tuple[object, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "measure", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "precision", *map(str, arguments)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_without_torch_among_the_peers_its_controls_are_left_out() -> None:
    def plan(peers: str) -> PrecisionPlan:
        return make_precision_plan(strategies="plus", peers=peers, device=CPU, elements=4096, steps=10)

    assert [each.name for each in plan("none").contenders] == ["collage plus"]
    assert "torch fused bf16" in [each.name for each in plan("torch").contenders]
    assert math.isclose(plan("none").all_steps, 4 * 10 + 3 * 30)

"""`collage bench step`: what it writes and shows, what it refuses. No test says how long anything takes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_small import MANY, TINY, Bench, adamw, peer

import collage
from collage import cli
from collage.bench import peers, step
from collage.bench.contenders import Contender, Streams, own_contenders, reference
from collage.bench.peers import Variant
from collage.bench.plan import Plan, groups
from collage.bench.shapes import ShapeSet
from collage.bench.step import Measured
from collage.bench.timing import Lane
from collage.train.config import UserError


def by_name(result: dict[str, Any], shapes: str = "tiny") -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in result["rows"] if row["shapes"] == shapes}


def test_every_strategy_has_a_row_in_the_json_and_in_the_table(bench: Bench) -> None:
    result = bench("--backends", "eager", "--peers", "none")
    rows = by_name(result)
    for name, strategy in collage.strategies().items():
        row = rows[f"collage {name}, eager"]
        assert (row["status"], row["strategy"], row["backend"], row["rounds"]) == ("timed", name, "eager", 2)
        # Tensors as tiny as these have no blocks.
        kept = (strategy.small or strategy).bytes_per_param(torch.bfloat16, grad=False)
        width = 4 if row["dtype"] == "float32" else 2
        assert row["state_bytes_per_param"] == kept - width
        assert row["contender"] in result["printed"]
    assert rows["collage plus, eager"]["bytes_moved_per_param"] == 22


def test_a_row_explains_itself(bench: Bench) -> None:
    result = bench("--strategies", "plus", "--backends", "eager", "--peers", "none")
    row = by_name(result)["collage plus, eager"]
    assert (row["shapes"], row["tensors"], row["parameters"], row["dtype"]) == ("tiny", 2, 144, "bfloat16")
    assert (row["version"], row["torch"]) == (collage.__version__, str(torch.__version__))
    assert (row["threads"], row["device"], row["commit"]) == (1, result["device"], result["commit"])
    assert 0 < row["ms_p10"] <= row["ms_p50"] <= row["ms_p90"]
    assert row["gb_per_s"] == pytest.approx(22 * 144 / row["ms_p50"] / 1e6)
    assert row["command"] == result["command"]
    assert result["command"].startswith("collage bench step --shapes tiny --rounds 2 --threads 1 --strategies plus")


def test_the_file_says_what_ran_and_where(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    result = bench("--strategies", "plus", "--peers", "none")
    assert (result["kind"], result["threads"], result["reference"]) == ("bench step", 1, "torch fused bf16")
    assert result["versions"]["torch"] == str(torch.__version__)
    assert result["device"].startswith("cpu: ")
    assert result["environment"]["variables"]["OMP_WAIT_POLICY"] == "passive"
    assert result["environment"]["cores"] >= 1
    assert result["created"].endswith("+00:00")


def test_the_reference_is_the_first_row_and_its_ratio_is_one(bench: Bench) -> None:
    result = bench("--strategies", "light", "--backends", "eager", "--peers", "none")
    first = result["rows"][0]
    assert (first["contender"], first["kind"], first["ratio"]) == ("torch fused bf16", "reference", 1.0)
    assert first["bytes_moved_per_param"] == 14
    assert first["state_bytes_per_param"] == 4


def test_a_missing_peer_is_skipped_by_name_with_the_remedy(bench: Bench) -> None:
    result = bench("--strategies", "plus", "--backends", "eager")
    row = by_name(result)["absent one"]
    assert (row["status"], row["rounds"], row["ratio"]) == ("skipped", 0, None)
    assert row["reason"] == "not installed; remedy: pip install no-such-package"
    assert "skipped: absent one: not installed" in result["printed"]
    assert by_name(result)["elsewhere one"]["reason"] == "runs on cuda alone"


def test_a_failing_peer_keeps_a_row_with_its_error(bench: Bench) -> None:
    result = bench("--strategies", "plus", "--backends", "eager", "--peers", "broken,good")
    rows = by_name(result)
    assert (rows["broken at once"]["status"], rows["broken at once"]["rounds"]) == ("failed", 0)
    assert rows["broken at once"]["reason"] == "RuntimeError: no such instruction"
    assert rows["broken asleep"]["reason"] == "its steps leave the parameters as they are"
    assert "failed: broken at once: RuntimeError: no such instruction" in result["printed"]
    assert rows["good one"]["status"] == rows["collage plus, eager"]["status"] == "timed"


def test_peers_are_those_that_were_named(bench: Bench) -> None:
    names = {row["peer"] for row in bench("--strategies", "plus", "--peers", "torch,good")["rows"]}
    assert names == {None, "torch", "good"}
    assert {row["peer"] for row in bench("--strategies", "plus", "--peers", "none")["rows"]} == {None}


def test_many_small_tensors_are_set_beside_the_same_elements_in_one(bench: Bench) -> None:
    result = bench("--shapes", "many", "--strategies", "plus", "--backends", "eager", "--peers", "none")
    small, one = by_name(result, "many"), by_name(result, "many-joined")
    assert set(small) == set(one)
    for name, row in small.items():
        assert (row["tensors"], one[name]["tensors"]) == (5, 1)
        assert row["parameters"] == one[name]["parameters"] == MANY.parameters
        # A null kernel runs over one tensor anyway.
        assert (row["ratio_to_joined"] is None) == (row["kind"] == "null")
        assert one[name]["ratio_to_joined"] is None
    assert one["torch fused bf16"]["ratio"] == 1.0


def test_the_null_kernel_of_each_number_of_streams_runs_in_the_same_rounds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def null(read_write: Sequence[torch.Tensor], read_only: Sequence[torch.Tensor]) -> None:
        assert {each.shape for each in (*read_write, *read_only)} == {(TINY.parameters,)}
        calls.append(tuple(each.element_size() for each in (*read_write, *read_only)))

    monkeypatch.setattr(step, "null_step", lambda device: (null, ""))
    result = bench("--strategies", "plus,light,mixed,fp32", "--backends", "eager", "--peers", "none")
    nulls = {row["contender"]: row for row in result["rows"] if row["kind"] == "null"}
    assert list(nulls) == ["null 222+2", "null 2222+2", "null 22222+2", "null 2444+2", "null 444+4"]
    # Three turns of warm-up and two rounds.
    assert Counter(calls) == dict.fromkeys([(2,) * 4, (2,) * 5, (2,) * 6, (2, 4, 4, 4, 2), (4,) * 4], 5)
    assert nulls["null 22222+2"]["bytes_moved_per_param"] == 22
    assert all(row["rounds"] == 2 and row["ratio"] > 0 for row in nulls.values())
    assert all(row["null_share"] > 0 for row in result["rows"] if row["kind"] != "null")


@pytest.mark.skipif(not collage.backends()["native"].available, reason="no native kernel here")
def test_the_native_null_kernel_serves_the_cpu(bench: Bench) -> None:
    assert step.null_step(torch.device("cpu"))[0] is not None
    rows = bench("--strategies", "plus", "--peers", "none")["rows"]
    assert all(row["status"] == "timed" for row in rows), rows
    assert all(row["null_share"] > 0 for row in rows if row["kind"] != "null")


def test_a_large_null_kernel_runs_over_a_part_and_its_time_is_scaled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    scales: set[float] = set()
    monkeypatch.setattr(step, "NULL_ELEMENTS", TINY.parameters // 4)
    monkeypatch.setattr(step, "null_step", lambda device: (lambda both, read: sizes.add(read[0].numel()), ""))
    run_rounds = step.run_rounds

    def watched(lanes: Sequence[Lane], *arguments: Any) -> None:
        scales.update(lane.scale for lane in lanes if lane.name.startswith("null"))
        run_rounds(lanes, *arguments)

    monkeypatch.setattr(step, "run_rounds", watched)
    bench("--strategies", "plus", "--backends", "eager", "--peers", "none")
    assert (sizes, scales) == ({TINY.parameters // 4}, {4.0})


def test_of_a_peer_that_keeps_other_formats_than_stated_no_bytes_moved_are_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    says_8_bit = Variant("says 8-bit", adamw, Streams((2, 1, 1), (2,)))
    with_scales = Variant("with scales", adamw, Streams((2, 1.9, 1.9), (2,)))
    monkeypatch.setattr(peers, "PEERS", (peer("liar", "torch", says_8_bit, with_scales),))
    monkeypatch.setattr(peers, "NAMES", ("liar",))
    rows = by_name(bench("--strategies", "plus", "--backends", "eager", "--peers", "liar"))
    assert rows["liar says 8-bit"]["state_bytes_per_param"] == 4
    assert rows["liar says 8-bit"]["bytes_moved_per_param"] is None
    assert rows["liar says 8-bit"]["null_reason"] == step.NOT_KNOWN
    assert rows["liar with scales"]["bytes_moved_per_param"] is not None


def test_without_a_null_kernel_there_is_no_share_and_the_reason_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "null_step", lambda device: (None, "no compiler"))
    result = bench("--strategies", "plus", "--backends", "eager", "--peers", "none")
    row = by_name(result)["collage plus, eager"]
    assert (row["null_share"], row["null_reason"]) == (None, "no compiler")
    assert not [each for each in result["rows"] if each["kind"] == "null"]
    assert "no share of a null kernel: no compiler" in result["printed"]


def test_fp16_has_its_own_reference(bench: Bench) -> None:
    result = bench("--strategies", "plus", "--backends", "eager", "--peers", "none", "--dtype", "fp16")
    assert result["reference"] == "torch fused fp16"
    assert by_name(result)["collage plus, eager"]["dtype"] == "float16"


def test_the_threads_of_torch_are_as_before(bench: Bench) -> None:
    torch.set_num_threads(2)
    assert bench("--strategies", "plus", "--peers", "none")["threads"] == 1
    assert torch.get_num_threads() == 2


def test_gradients_that_a_peer_drops_or_writes_are_restored(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    seen: list[float] = []

    class Spoiler(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            params = self.param_groups[0]["params"]
            seen.append(sum(param.grad.float().norm().item() for param in params))
            super().step(closure)
            for param in params:
                param.grad.zero_()
                param.grad = None

    variant = Variant("one", lambda params: Spoiler(params, lr=0.1), None, spoils_gradients=True)
    monkeypatch.setattr(peers, "PEERS", (peer("spoiler", "torch", variant),))
    monkeypatch.setattr(peers, "NAMES", ("spoiler",))
    row = by_name(bench("--strategies", "plus", "--backends", "eager", "--peers", "spoiler"))["spoiler one"]
    assert row["status"] == "timed", row["reason"]
    assert len(seen) == 5
    assert len(set(seen)) == 1


def test_the_list_shows_shapes_and_peers_and_times_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert here("--list") == 0
    printed = capsys.readouterr().out
    for name in ("10m", "many-small", "llama-1b-whole", "torch", *(each.name for each in peers.PEERS)):
        assert name in printed
    assert "rounds" not in printed


# ---- refusals ------------------------------------------------------------------------------------------------------


def here(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "step", *map(str, arguments)])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--strategies", "plus,nonsense"), "--strategies must be names of plain, stochastic"),
        (("--strategies", ","), "--strategies must be names separated by commas, got ','"),
        (("--backends", "cobol"), "--backends must be names of eager, native on cpu, got 'cobol'"),
        (("--backends", "triton"), "--backends must be names of eager, native on cpu, got 'triton'"),
        (("--shapes", "huge"), "got 'huge'; see --list"),
        (("--peers", "good,nobody"), "--peers must be all, none, or names of torch, good, absent"),
        (("--dtype", "fp8"), "--dtype must be bf16 or fp16, got 'fp8'"),
        (("--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("--threads", 0), "--threads must be >= 1, got 0"),
        (("--rounds", 1), "--rounds must be >= 2, got 1"),
        (("--budget", 0), "--budget must be > 0 seconds, got 0"),
        (("--memory", "nan"), "--memory must be > 0 GB, got nan"),
        (("--memory", 1e-9), "--shapes tiny needs about 0.0 GB for the reference alone"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused_before_anything_is_timed(
    arguments: tuple[object, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "run_rounds", lambda *_: pytest.fail("something was timed"))
    assert here("--shapes", "tiny", *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_backend_that_cannot_run_here_is_refused_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = collage.backends()
    known["native"] = dataclasses.replace(known["native"], available=False, reason="no compiler at install")
    monkeypatch.setattr(collage, "backends", lambda: known)
    assert here("--shapes", "tiny", "--backends", "native") == 2
    assert "--backends native cannot run here: no compiler at install" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert here("--device", "cuda") == 2
    assert "finds none; use --device cpu" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds none here")
def test_on_a_gpu_the_host_and_a_copy_are_timed_too(bench: Bench) -> None:
    rows = by_name(bench("--device", "cuda", "--strategies", "plus", "--backends", "triton", "--peers", "none"))
    assert {row["status"] for row in rows.values()} == {"timed"}
    assert rows["copy"]["bytes_moved_per_param"] == 4
    assert rows["copy"]["gb_per_s"] > 0
    assert all(row["host_ms"] > 0 for row in rows.values())


def test_a_folder_as_json_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("--shapes", "tiny", "--json", tmp_path) == 2
    assert f"--json must be a file, got the folder {tmp_path}" in capsys.readouterr().err


# ---- groups that fit into memory -----------------------------------------------------------------------------------


def plan(contenders: list[Contender], memory: float) -> Plan:
    bf16 = torch.bfloat16
    return Plan(reference(bf16), tuple(contenders), (TINY,), torch.device("cpu"), bf16, 2, 1.0, memory)


def test_contenders_that_do_not_fit_together_are_timed_in_groups_of_their_own() -> None:
    shapes = ShapeSet("large", "", ((1000, 1000),))
    own = own_contenders(["plain", "light", "plus", "mixed"], ["eager"], torch.bfloat16)
    together, none = groups(plan(own, 1e9), shapes)
    assert (len(together), none) == (1, {})
    apart, none = groups(plan(own, 95e6), shapes)
    assert len(apart) > 1
    assert [each.name for group in apart for each in group] == [each.name for each in own]
    assert not none


def test_a_group_is_filled_before_the_next_begins() -> None:
    (own,) = own_contenders(["plus"], ["eager"], torch.bfloat16)
    four = [dataclasses.replace(own, name=name) for name in "abcd"]
    room_for_two = 1e6 * (4 + 8 + 8.8 + 8) + 1e6 * (12 + 2 * 13.2) + 1
    found, _ = groups(plan(four, room_for_two), ShapeSet("large", "", ((1000, 1000),)))
    assert [[each.name for each in group] for group in found] == [["a", "b"], ["c", "d"]]


def test_a_contender_that_does_not_fit_at_all_is_skipped_with_the_reason() -> None:
    large = dataclasses.replace(own_contenders(["plus"], ["eager"], torch.bfloat16)[0], streams=Streams((1000,), (2,)))
    found, too_large = groups(plan([large], 100e6), ShapeSet("large", "", ((1000, 1000),)))
    assert found == [[]]
    assert "needs about" in too_large[large.name]
    with pytest.raises(UserError, match="for the reference alone"):
        groups(plan([], 1e6), ShapeSet("large", "", ((1000, 1000),)))


def test_a_contender_that_would_compile_too_many_tensors_is_skipped_with_the_reason() -> None:
    (own,) = own_contenders(["plus"], ["eager"], torch.bfloat16)
    compiled = [dataclasses.replace(own, name=str(most), most_tensors=most) for most in (4, 5)]
    found, left_out = groups(plan(compiled, 1e9), MANY)
    assert [each.name for each in found[0]] == ["5"]
    assert left_out == {"4": "compiles all tensors into one graph, which takes hours for 5 of them"}


def test_groups_are_paired_with_their_own_reference_which_keeps_one_row(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "groups", lambda plan, shapes: ([[each] for each in plan.contenders], {}))
    result = bench("--strategies", "plain,plus", "--backends", "eager", "--peers", "none")
    rows = by_name(result)
    assert list(rows)[:3] == ["torch fused bf16", "collage plain, eager", "collage plus, eager"]
    assert (rows["torch fused bf16"]["rounds"], rows["collage plus, eager"]["rounds"]) == (4, 2)
    assert rows["torch fused bf16"]["ratio"] == 1.0


def test_only_rounds_of_both_are_paired() -> None:
    slow, fast = Lane("slow", lambda: None, seconds={1: 6.0, 3: 8.0}), Lane("fast", lambda: None)
    fast.seconds = {0: 1.0, 1: 3.0, 2: 1.0}
    assert step._paired(slow, fast) == [2.0]
    assert step._paired(fast, slow) == [0.5]
    assert step._paired(fast, None) == []


def test_ratios_are_medians_of_rounds() -> None:
    from collage.bench.results import row

    found = Measured("x", TINY, own_contenders(["plus"], ["eager"], torch.bfloat16)[0])
    found.seconds, found.ratios, found.shares = [1.0, 2.0, 9.0], [0.5, 0.25, 4.0], [0.1, 0.2, 0.3]
    known = dict.fromkeys(("device", "threads", "commit", "command", "created")) | {"versions": {"torch": "2"}}
    made = row(found, known)
    assert (made["ms_p50"], made["ratio"], made["null_share"]) == (2000.0, 0.5, 0.2)
    assert made["ms_p10"] == pytest.approx(1200.0)
    assert made["ms_p90"] == pytest.approx(7600.0)

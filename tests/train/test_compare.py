"""Planning a comparison and making its runs, with children that only pretend to train."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from collage.train import compare
from collage.train.compare import Child, Outcome, Plan, Planned, make_plan, run_all, share_machine
from collage.train.compare_display import CompareDisplay, figures_text
from collage.train.config import TrainConfig, UserError
from collage.train.loop import train
from collage.train.signals import StopSignals

CONFIG = TrainConfig(model="gpt-tiny", steps=4, device="cpu")


# ---- plans -----------------------------------------------------------------------------------------------------


def stored(out: Path, **plan: Any) -> Path:
    """Leave a comparison of CONFIG in `out`."""
    out.mkdir()
    entries = {"strategies": ["plain", "mixed"], "seeds": 2, "config": CONFIG.to_json(), **plan}
    (out / "compare.json").write_text(json.dumps({"plan": entries, "command": "collage compare", "wall_time_s": 5.0}))
    return out


def test_the_default_is_four_strategies_with_three_seeds(tmp_path: Path) -> None:
    plan = make_plan({}, None, None, tmp_path / "new", resume=False)
    assert (plan.strategies, plan.seeds) == (("plain", "light", "plus", "mixed"), 3)
    assert plan.config == TrainConfig()


def test_runs_differ_in_strategy_and_seed_alone_and_come_seed_by_seed(tmp_path: Path) -> None:
    plan = make_plan({"lr": 0.01}, "plus, mixed", 2, tmp_path, resume=False)
    runs = plan.runs()
    assert [each.name for each in runs] == ["plus-seed0", "mixed-seed0", "plus-seed1", "mixed-seed1"]
    assert [each.folder for each in runs] == [tmp_path / each.name for each in runs]
    assert {replace(each.config, strategy="plus", seed=0) for each in runs} == {TrainConfig(lr=0.01)}


@pytest.mark.parametrize("text", ["plus,mixed", " plus , mixed ,", "plus,mixed,plus"])
def test_strategies_are_a_list_with_each_name_once(tmp_path: Path, text: str) -> None:
    assert make_plan({}, text, 1, tmp_path, resume=False).strategies == ("plus", "mixed")


@pytest.mark.parametrize(
    ("strategies", "seeds", "said"),
    [
        ("plus,nonsense", 1, r"strategy must be one of .*plain.*mixed.*, got 'nonsense'"),
        ("", 1, "at least one strategy, got none"),
        (",", 1, "at least one strategy, got none"),
        ("plus", 0, "seeds must be >= 1, got 0"),
    ],
)
def test_a_plan_that_cannot_be_made_is_an_error(tmp_path: Path, strategies: str, seeds: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_plan({}, strategies, seeds, tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()


def test_a_strategy_that_the_settings_rule_out_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arithmetic working"):
        make_plan({"arithmetic": "working"}, "plain,mixed", 1, tmp_path, resume=False)


def test_a_folder_with_a_comparison_or_a_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "b" / "plus-seed0").mkdir(parents=True)
    (tmp_path / "b" / "plus-seed0" / "run.json").write_text("{}")
    for out in (stored(tmp_path / "a"), tmp_path / "b"):
        with pytest.raises(UserError, match="pass --resume to go on"):
            make_plan({}, None, None, out, resume=False)


def test_resuming_where_nothing_is_starts(tmp_path: Path) -> None:
    assert make_plan({}, "plus", 1, tmp_path, resume=True).strategies == ("plus",)


def test_settings_may_suit_the_strategies_that_are_named_alone(tmp_path: Path) -> None:
    plan = make_plan({"forward": "hi"}, "fp8,fp8-native", 1, tmp_path, resume=False)
    assert [run.config.strategy for run in plan.runs()] == ["fp8", "fp8-native"]
    assert {run.config.forward for run in plan.runs()} == {"hi"}
    with pytest.raises(UserError, match="with forward hi, got 'plus'"):
        make_plan({"forward": "hi"}, "fp8,plus", 1, tmp_path, resume=False).runs()


def test_a_resumed_plan_is_the_stored_one(tmp_path: Path) -> None:
    plan = make_plan({}, None, None, stored(tmp_path / "out"), resume=True)
    assert (plan.strategies, plan.seeds, plan.config) == (("plain", "mixed"), 2, CONFIG)


def test_strategies_and_seeds_may_be_added_and_none_is_taken_away(tmp_path: Path) -> None:
    out = stored(tmp_path / "out")
    plan = make_plan({}, "plus,plain", 3, out, resume=True)
    assert (plan.strategies, plan.seeds) == (("plain", "mixed", "plus"), 3)
    assert make_plan({}, None, 1, out, resume=True).seeds == 2


def test_a_resumed_plan_keeps_the_settings_that_change_what_is_trained(tmp_path: Path) -> None:
    out = stored(tmp_path / "out")
    with pytest.raises(UserError, match=r"--lr 0\.5 \(the run has 0\.001\)"):
        make_plan({"lr": 0.5}, None, None, out, resume=True)
    assert make_plan({"threads": 2}, None, None, out, resume=True).config.threads == 2


def test_a_compare_file_without_a_plan_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"strategies": []}')
    with pytest.raises(UserError, match="holds no plan"):
        make_plan({}, None, None, tmp_path, resume=True)


# ---- the machine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "threads", "jobs", "expected"),
    [
        (3, None, None, (1, 4)),  # a run for each core
        (1, None, None, (1, 2)),  # no more than there are runs
        (3, None, 1, (4, 1)),  # --jobs shares the cores out
        (3, None, 3, (1, 3)),
        (3, 2, None, (2, 2)),
        (3, 2, 3, (2, 3)),
        (3, 8, None, (8, 1)),
    ],
)
def test_cores_are_shared_between_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeds: int,
    threads: int | None,
    jobs: int | None,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setattr(compare, "cores", lambda: 4)
    plan, at_once = share_machine(Plan(("plus", "mixed"), seeds, replace(CONFIG, threads=threads), tmp_path), jobs)
    assert (plan.config.threads, at_once) == expected


def test_an_accelerator_has_one_run_at_a_time_unless_told_otherwise(tmp_path: Path) -> None:
    plan = Plan(("plus", "mixed"), 2, replace(CONFIG, device="cuda"), tmp_path)
    assert share_machine(plan, None) == (plan, 1)
    assert share_machine(plan, 3) == (plan, 3)


def test_fewer_than_one_job_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="jobs must be >= 1, got 0"):
        share_machine(Plan(("plus",), 1, CONFIG, tmp_path), 0)


# ---- the text and compare.json ---------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path, text: Path) -> Plan:
    return Plan(("plus", "mixed"), 1, replace(CONFIG, data=str(text), seq_len=8, batch_size=2), tmp_path / "out")


def test_the_text_is_prepared_once_and_the_plan_is_written_before_the_first_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = compare.prepare(plan, "collage compare --lr 1")
    record = json.loads((plan.out / "compare.json").read_text())
    assert (record["status"], record["plan"], record["strategies"]) == ("running", plan.to_json(), [])
    assert record["command"] == known["command"] == "collage compare --lr 1"
    assert (plan.corpus / "corpus.json").exists()
    monkeypatch.setattr(compare, "prepare_corpus", lambda config: pytest.fail("prepared again"))
    known = compare.prepare(plan, "collage compare --resume")
    assert known["command"] == "collage compare --lr 1\ncollage compare --resume"


def test_the_text_of_an_attempt_that_left_no_plan_is_not_used(plan: Plan) -> None:
    plan.corpus.mkdir(parents=True)
    (plan.corpus / "corpus.json").write_text("{}")
    compare.prepare(plan, "collage compare")
    assert json.loads((plan.corpus / "corpus.json").read_text())["name"] == "text"


def test_time_spent_before_counts_on(plan: Plan) -> None:
    compare.note_end(plan, "interrupted", {"command": "a", "plan": plan.to_json(), "wall_time_s": 7.0})
    assert compare.prepare(plan, "b")["wall_time_s"] == 7.0


# ---- from a checkpoint -----------------------------------------------------------------------------------------


@pytest.fixture
def source(tiny: TrainConfig, tmp_path: Path) -> Path:
    """A bpe run of two steps."""
    train(replace(tiny, steps=2, warmup=0, tokenizer="bpe", vocab_size=270, lr=1e-3), tmp_path / "source")
    return tmp_path / "source"


def test_a_plan_from_a_checkpoint_names_it_for_all_runs_and_has_the_defaults_of_a_continuation(
    source: Path, tmp_path: Path
) -> None:
    plan = make_plan({"from_checkpoint": str(source), "threads": 1}, "plain,fp32", 2, tmp_path / "out", resume=False)
    checkpoint = str((source / "checkpoints/step-000002").resolve())
    assert {each.config.from_checkpoint for each in plan.runs()} == {checkpoint}
    assert {(each.config.steps, each.config.lr, each.config.model) for each in plan.runs()} == {(250, 1e-4, "tiny")}
    compare.prepare(plan, "collage compare --from source")
    assert (plan.corpus / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


def test_a_plan_that_contradicts_its_checkpoint_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    given = {"from_checkpoint": str(source), "model": "gpt-1m"}
    with pytest.raises(UserError, match=r"--model gpt-1m \(the checkpoint has tiny\)"):
        make_plan(given, None, None, tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()


def test_a_resumed_plan_remembers_its_checkpoint_and_refuses_another(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = make_plan({"from_checkpoint": str(source)}, "plain", 1, out, resume=False)
    compare.prepare(plan, "collage compare --from source")
    assert make_plan({}, None, None, out, resume=True).config == plan.config
    assert make_plan({"from_checkpoint": str(source)}, "plus", None, out, resume=True).config == plan.config
    with pytest.raises(UserError, match=r"--from elsewhere \(the run has .*step-000002\)"):
        make_plan({"from_checkpoint": "elsewhere"}, None, None, out, resume=True)
    fresh = stored(tmp_path / "fresh")
    with pytest.raises(UserError, match=r"--from .*source \(the run has None\)"):
        make_plan({"from_checkpoint": str(source)}, None, None, fresh, resume=True)


# ---- the runs --------------------------------------------------------------------------------------------------

HEAD = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(status, step=4):
    (folder / "run.json").write_text(json.dumps({"status": status, "final": {"step": step}}))
def record(step):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 3.0}) + chr(10))
"""
FINISHES = "record(4); end('finished')"
FAILS = "print('what went wrong'); end('failed'); sys.exit(1)"
STOPS_WHEN_ASKED = """
def stop(*_): end('interrupted'); sys.exit(130)
signal.signal(signal.SIGINT, stop)
record(1)
time.sleep(60)
"""
DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN); record(1); time.sleep(60)"


class Recorder:
    """A watcher that writes down what it is told."""

    def __init__(self, on_progress: Callable[[Planned], None] = lambda planned: None) -> None:
        self.told: list[tuple[str, str]] = []
        self.running = self.most = 0
        self._on_progress = on_progress

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def started(self, planned: Planned) -> None:
        self.told.append((planned.name, "started"))
        self.running += 1
        self.most = max(self.most, self.running)

    def progressed(self, planned: Planned, figures: dict[str, Any]) -> None:
        if figures:
            self._on_progress(planned)

    def ended(self, outcome: Outcome) -> None:
        self.told.append((outcome.planned.name, outcome.status))
        self.running -= 1

    def stopping(self) -> None:
        self.told.append(("all", "stopping"))


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Planned]]:
    """`pretend(what plus does, what mixed does ...)` gives the runs of a plan whose children do that."""

    def make(*scripts: str) -> list[Planned]:
        names = ("plus", "mixed", "light", "plain")[: len(scripts)]
        by_strategy = dict(zip(names, scripts, strict=True))

        def command(self: Child, corpus: Path) -> list[str]:
            return [sys.executable, "-c", HEAD + by_strategy[self.planned.config.strategy], str(self.planned.folder)]

        monkeypatch.setattr(Child, "_command", command)
        return Plan(names, 1, CONFIG, tmp_path / "out").runs()

    return make


Pretend = Callable[..., list[Planned]]


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.planned.config.strategy: outcome.status for outcome in outcomes}


def test_no_more_runs_than_jobs_are_made_at_a_time(pretend: Pretend, tmp_path: Path) -> None:
    watcher = Recorder()
    outcomes = run_all(pretend(*[FINISHES] * 4), tmp_path, 2, watcher)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4
    assert watcher.most == 2


def test_a_failing_run_leaves_the_others_alone_and_says_its_last_lines(pretend: Pretend, tmp_path: Path) -> None:
    outcomes = run_all(pretend(FAILS, FINISHES), tmp_path, 1, Recorder())
    assert statuses(outcomes) == {"plus": "failed", "mixed": "finished"}
    assert outcomes[0].output == ("what went wrong", "exit code 1")


def test_a_run_that_ends_well_without_having_finished_has_failed(pretend: Pretend, tmp_path: Path) -> None:
    (short,) = run_all(pretend("end('finished', step=3)"), tmp_path, 1, Recorder())
    assert short.status == "failed"


def test_a_killed_run_has_failed_with_its_signal(pretend: Pretend, tmp_path: Path) -> None:
    (killed,) = run_all(pretend("import os; os.kill(os.getpid(), signal.SIGKILL)"), tmp_path, 1, Recorder())
    assert (killed.status, killed.output) == ("failed", ("exit code -9",))


def test_a_long_output_is_cut_to_its_last_lines(pretend: Pretend, tmp_path: Path) -> None:
    (failed,) = run_all(pretend("for i in range(9999): print('line', i)\nsys.exit(3)"), tmp_path, 1, Recorder())
    assert failed.output[-2:] == ("line 9998", "exit code 3")
    assert len(failed.output) == compare.TAIL_LINES + 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_ones_save_and_the_others_wait(
    pretend: Pretend, tmp_path: Path, number: signal.Signals
) -> None:
    sent: list[int] = []

    def send_once(planned: Planned) -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    watcher = Recorder(send_once)
    outcomes = run_all(pretend(STOPS_WHEN_ASKED, FINISHES), tmp_path, 1, watcher)
    assert statuses(outcomes) == {"plus": "interrupted", "mixed": "not started"}
    assert watcher.told.count(("all", "stopping")) == 1
    assert ("mixed-seed0", "started") not in watcher.told


def test_a_run_stopped_while_it_still_starts_is_interrupted_whatever_its_code(pretend: Pretend, tmp_path: Path) -> None:
    sent: list[Planned] = []

    def send_once(planned: Planned) -> None:
        # A second signal would mean that the children are to be ended at once.
        if not sent:
            sent.append(planned)
            os.kill(os.getpid(), signal.SIGINT)

    (outcome,) = run_all(pretend("record(1); time.sleep(60)"), tmp_path, 1, Recorder(send_once))
    assert outcome.status == "interrupted"


def test_a_run_that_fails_while_it_is_stopped_has_failed(pretend: Pretend, tmp_path: Path) -> None:
    script = "signal.signal(signal.SIGINT, lambda *_: (end('failed'), sys.exit(1)))\nrecord(1)\ntime.sleep(60)"
    sent: list[Planned] = []

    def send_once(planned: Planned) -> None:
        if not sent:
            sent.append(planned)
            os.kill(os.getpid(), signal.SIGINT)

    (outcome,) = run_all(pretend(script), tmp_path, 1, Recorder(send_once))
    assert outcome.status == "failed"


def test_a_second_signal_ends_children_that_do_not_listen(
    pretend: Pretend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PATIENCE_SECONDS", 0.2)
    children: list[Child] = []
    create = Child.__init__

    def remember(self: Child, *arguments: Any) -> None:
        create(self, *arguments)
        children.append(self)

    monkeypatch.setattr(Child, "__init__", remember)
    planned = pretend("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + DEAF)
    with pytest.raises(KeyboardInterrupt):
        run_all(planned, tmp_path, 1, Recorder(lambda planned: os.kill(os.getpid(), signal.SIGINT)))
    assert children[0]._process.returncode == -signal.SIGKILL


def test_a_child_gets_its_threads_and_does_not_spin(tmp_path: Path) -> None:
    config = replace(CONFIG, threads=3)
    child = Child.__new__(Child)
    child.planned = Planned(config, tmp_path)
    environment = child._environment()
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("3", "passive")


def test_a_child_is_collage_train_on_the_shared_text_and_goes_on_where_a_run_was_begun(tmp_path: Path) -> None:
    child = Child.__new__(Child)
    child.planned = Planned(CONFIG, tmp_path / "run")
    command = child._command(tmp_path / "corpus")
    assert command[:4] == [sys.executable, "-m", "collage", "train"]
    assert command[command.index("--corpus") + 1] == str(tmp_path / "corpus")
    assert "--resume" not in command
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "interrupted"}')
    assert child._command(tmp_path / "corpus")[-1] == "--resume"


def test_signals_are_put_back(pretend: Pretend, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run_all(pretend(FINISHES), tmp_path, 1, Recorder())
    assert signal.getsignal(signal.SIGINT) is before
    assert StopSignals().requested is False


# ---- figures of a running child --------------------------------------------------------------------------------


def test_the_latest_figures_are_the_last_of_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert compare.latest_figures(file) == {}
    file.write_text('{"step": 1, "loss": 3.0, "edq_ratio": 0.5}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert compare.latest_figures(file) == {"step": 2, "loss": 2.0, "edq_ratio": 0.5}


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 5001)))
    assert compare.latest_figures(file)["step"] == 5000


# ---- the display -----------------------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path: Path) -> list[Planned]:
    return Plan(("plus", "mixed"), 1, replace(CONFIG, steps=100), tmp_path).runs()


def display(planned: list[Planned], *, terminal: bool) -> tuple[CompareDisplay, StringIO]:
    file = StringIO()
    return CompareDisplay(planned, Console(file=file, force_terminal=terminal, width=80)), file


def test_without_a_terminal_a_run_has_a_few_plain_lines(planned: list[Planned]) -> None:
    shown, file = display(planned, terminal=False)
    with shown:
        shown.started(planned[0])
        for step in range(1, 101):
            shown.progressed(planned[0], {"step": step, "loss": 2.5, "tokens_per_s": 5000.0, "edq_ratio": 0.99})
        shown.ended(Outcome(planned[0], "finished"))
    lines = file.getvalue().splitlines()
    assert lines[0] == "plus-seed0: starting"
    assert lines[1] == "plus-seed0: step 25/100  loss 2.500  5,000 tokens/s  EDQ ratio 0.990"
    assert len(lines) == 6
    assert lines[-1] == "plus-seed0: finished"


def test_a_terminal_has_a_bar_for_each_run_and_one_for_all(planned: list[Planned]) -> None:
    shown, file = display(planned, terminal=True)
    with shown:
        shown.started(planned[0])
        shown.progressed(planned[0], {"step": 30, "loss": 2.5, "tokens_per_s": 5000.0, "edq_ratio": 0.99})
    last = file.getvalue().split("plus-seed0")[-1]
    assert "30/100" in last
    assert "30/200" in last
    assert "waiting" in last
    assert "EDQ ratio 0.990" in last


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failed_run_shows_its_last_lines_as_they_are(planned: list[Planned], terminal: bool) -> None:
    shown, file = display(planned, terminal=terminal)
    with shown:
        shown.ended(Outcome(planned[0], "failed", ("[red]Error[/red]: it broke", "exit code 1")))
    assert "plus-seed0 failed" in file.getvalue()
    assert "  [red]Error[/red]: it broke" in file.getvalue()


def test_figures_that_are_not_there_are_not_shown() -> None:
    assert figures_text({"step": 3, "loss": 2.0, "edq_ratio": None}) == "loss 2.000"

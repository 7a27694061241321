"""Following runs, and the server of the page: without a browser."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from collage.report import watch
from collage.report.follow import Follower, Tail
from collage.train.config import UserError
from collage.train.runfiles import write_text

MakeRun = Callable[..., Path]


def add(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# ---- reading -----------------------------------------------------------------------------------------------------


def test_only_what_was_added_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    tail = Tail(tmp_path / "metrics.jsonl")
    assert tail.read() is False
    add(tail.path, {"step": 1}, {"step": 2})
    assert tail.read() is True
    add(tail.path, {"step": 3})
    assert tail.read() is True
    assert tail.read() is False
    assert parsed == [b'{"step": 1}', b'{"step": 2}', b'{"step": 3}']
    assert [record["step"] for record in tail.records] == [1, 2, 3]


def test_a_line_counts_once_it_is_whole(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")
    tail.path.write_text('{"step": 1}\n{"st')
    assert tail.read() is True
    assert [record["step"] for record in tail.records] == [1]
    assert tail.read() is False
    with tail.path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.read() is True
    assert [record["step"] for record in tail.records] == [1, 2]


def test_a_file_that_a_resumed_run_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")
    add(tail.path, {"step": 1}, {"step": 2, "loss": 2.0})
    tail.read()
    write_text(tail.path, '{"step": 1}\n{"step": 2, "loss": 1.0}\n{"step": 3}\n')
    assert tail.read() is True
    assert tail.records == [{"step": 1}, {"step": 2, "loss": 1.0}, {"step": 3}]
    tail.path.write_text("")
    assert tail.read() is True
    assert tail.records == []


def test_a_whole_line_that_is_no_record_is_an_error(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")
    tail.path.write_text("{]\n")
    with pytest.raises(UserError, match="a JSON record per line"):
        tail.read()


def test_a_follower_finds_runs_that_appear_change_and_go(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    follower = Follower([folder])
    assert follower.read() is False
    assert follower.runs == []
    plus = make_run("plus", status="running", last=3)
    assert follower.read() is True
    assert follower.read() is False
    add(plus / "metrics.jsonl", {"step": 4, "loss": 1.0})
    assert follower.read() is True
    assert [run.last_step for run in follower.runs] == [4]
    record = json.loads((plus / "run.json").read_text())
    write_text(plus / "run.json", json.dumps({**record, "status": "finished"}))
    assert follower.read() is True
    assert [run.status for run in follower.runs] == ["finished"]
    add(plus / "audit.jsonl", {"step": 4, "modules": {}})
    assert follower.read() is True
    assert follower.runs[0].audits == [{"step": 4, "modules": {}}]
    make_run("mixed")
    assert follower.read() is True
    shutil.rmtree(plus)
    assert follower.read() is True
    assert [run.name for run in follower.runs] == ["mixed-seed0"]


def test_a_run_once_read_does_not_change_with_its_file(make_run: MakeRun) -> None:
    path = make_run("plus", status="running", last=3)
    follower = Follower([path])
    follower.read()
    (before,) = follower.runs
    add(path / "metrics.jsonl", {"step": 4, "loss": 1.0})
    follower.read()
    assert (before.last_step, follower.runs[0].last_step) == (3, 4)


# ---- serving -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "runs").mkdir()
    made = watch.serve([tmp_path / "runs"], 0)
    thread = Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def ask(server: Any, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_it_listens_to_this_machine_alone(server: Any) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/data.json", "evil.example")[0] == 403
    assert ask(server, "/data.json", f"localhost:{server.server_port}")[0] == 200


def test_the_data_come_when_they_are_newer_than_what_is_known(server: Any, make_run: MakeRun) -> None:
    first = json.loads(ask(server, "/data.json")[1])
    assert (first["view"]["runs"], first["title"]) == ([], "Waiting for runs")
    known = f"/data.json?known={first['version']}"
    assert ask(server, known) == (204, "")
    path = make_run("plus", status="running", last=3, final=None)
    second = json.loads(ask(server, known)[1])
    assert [run["step"] for run in second["view"]["runs"]] == [3]
    assert "plus-seed0 is running at step 3 of 60" in second["before"]
    add(path / "metrics.jsonl", {"step": 4, "loss": 1.0})
    third = json.loads(ask(server, f"/data.json?known={second['version']}")[1])
    assert third["version"] == second["version"] + 1
    assert third["view"]["runs"][0]["series"]["loss"]["x"] == [1, 2, 3, 4]


def test_the_page_is_the_whole_page_with_the_newest_data(server: Any, make_run: MakeRun) -> None:
    make_run("plus")
    status, page = ask(server, "/")
    assert status == 200
    assert '"live":2000' in page
    assert "Training with the strategy plus" in page


def test_there_is_nothing_else(server: Any) -> None:
    assert ask(server, "/../run.json")[0] == ask(server, "/plots/loss.png")[0] == 404


def test_what_cannot_be_shown_is_said_and_mended_files_are_shown_again(server: Any, make_run: MakeRun) -> None:
    path = make_run("plus")
    whole = (path / "run.json").read_text()
    (path / "run.json").write_text("{")
    status, text = ask(server, "/data.json?known=1")
    assert status == 503
    assert "can't be read as JSON" in text
    (path / "run.json").write_text(whole)
    assert ask(server, "/data.json?known=1")[0] == 200


# ---- the command -------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_an_error_and_without_one_the_next_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port must be a port that can be listened on, got {port}: Address"):
            watch.serve([tmp_path], port)
        monkeypatch.setattr(watch, "PORT", port)
        with watch.serve([tmp_path], None) as server:
            assert port < server.server_port < port + watch.TRIED
        monkeypatch.setattr(watch, "TRIED", 1)
        with pytest.raises(UserError, match=f"none of the ports {port} to {port} is free"):
            watch.serve([tmp_path], None)


def test_a_folder_that_is_none_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        watch.serve([tmp_path / "nothing"], 0)


def collage(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "collage", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_the_command_cleanly(make_run: MakeRun) -> None:
    path = make_run("plus")
    with collage("report", str(path), "--watch", "--port", "0") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert first.startswith(f"following {path} at http://127.0.0.1:")
    assert out == f"stopped; for a page to keep: collage report {path}\n"
    assert (process.returncode, errors) == (0, "")
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "8000"), "--port is for --watch, got 8000 without it"),
        (("--watch", "--json", "x.json"), "takes neither --out nor --json"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    from collage.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["report", str(make_run("plus")), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

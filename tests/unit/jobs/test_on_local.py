"""A launch on this machine, as its record, its process and its head tell of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ktrain
from ktrain.base import contract, ids
from ktrain.base.clock import Deadline
from ktrain.base.control import Server
from ktrain.base.job import WorkDir
from ktrain.base.process import ProcessId
from ktrain.base.settings import Timeouts
from ktrain.errors import ConfigError, ConflictError, CorruptionError, DeadlineError, NotFoundError
from ktrain.jobs import on_local
from ktrain.jobs import record as records
from ktrain.jobs.job import Job
from ktrain.jobs.look import State
from ktrain.jobs.on_local import LocalHost
from ktrain.jobs.record import LaunchRecord, LocalPlace, Recorder
from ktrain.launcher.backends.local import Outcome, lock_work_dir
from ktrain.launcher.job import plan_job
from ktrain.testing.fake_clock import FakeClock

GONE = ProcessId(2**22 - 1, 1)  # no process has this pid and this start
SPENT = {"crash": 1}


def place(tmp_path: Path, process: ProcessId, **changes: Any) -> LocalPlace:
    made = LocalPlace(ids.host_name(), process.pid, process.start_ticks, str(tmp_path / "work"), str(tmp_path / "log"))
    return dataclasses.replace(made, **changes)


def record(tmp_path: Path, process: ProcessId, **changes: Any) -> LaunchRecord:
    return LaunchRecord("a", local=place(tmp_path, process, **changes))


def host(tmp_path: Path, made: LaunchRecord) -> LocalHost:
    return LocalHost(str(tmp_path / "run"), made, clock=FakeClock())


class Head:
    """Answers as a head does."""

    def __init__(self, work: WorkDir) -> None:
        work.path.mkdir()
        work.write_token()
        self.status: dict[str, Any] = {"state": "running", "stop": None, "spent": {}, "ranks": {}}
        handlers = {"status": lambda said: self.status, "stop": self.stop}
        self.server = Server(handlers, address="tcp:127.0.0.1:0", token=work.read_token())
        work.head.write_text(f'{{"address": "{self.server.address}"}}')

    def stop(self, said: dict[str, Any]) -> dict[str, Any]:
        self.status["stop"] = said["reason"]
        return {}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    made = Head(WorkDir(tmp_path / "work"))
    yield made
    made.server.close()


# States


@pytest.mark.parametrize(
    ("code", "state"), [(0, State.DONE), (130, State.CANCELLED), (1, State.FAILED), (3, State.FAILED)]
)
def test_launch_that_has_ended_has_the_state_of_its_exit_code(tmp_path: Path, code: int, state: State) -> None:
    ended = dataclasses.replace(record(tmp_path, GONE), ended=Outcome(code, "so it was"))

    look = host(tmp_path, ended).look()

    assert (look.state, look.exit_code, look.message) == (state, code, "so it was")


def test_launch_whose_process_is_gone_without_an_outcome_failed_and_shows_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\ntwo\nthree\nout of memory\n")

    look = host(tmp_path, record(tmp_path, GONE)).look()

    assert (look.state, look.exit_code) == (State.FAILED, contract.EXIT_FAILED)
    assert look.message is not None and "without a verdict" in look.message
    assert look.message.splitlines()[1:] == ["two", "three", "out of memory"]


def test_outcome_that_was_recorded_since_is_read_when_the_process_is_gone(tmp_path: Path) -> None:
    run, old = str(tmp_path / "run"), record(tmp_path, GONE)
    records.write(run, dataclasses.replace(old, ended=Outcome(0, "done")), timeouts=Timeouts())
    assert host(tmp_path, old).look().state is State.DONE

    records.write(run, LaunchRecord("b", ended=Outcome(0, "done"), local=old.local), timeouts=Timeouts())
    assert host(tmp_path, old).look().state is State.FAILED, "of a later launch"


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ({"state": "joining"}, State.STARTING),
        ({"state": "starting"}, State.STARTING),
        ({"state": "starting", "spent": SPENT}, State.RECOVERING),
        ({"state": "running", "spent": SPENT}, State.RUNNING),
        ({"state": "stopping"}, State.RECOVERING),
        ({"state": "running", "stop": "asked"}, State.STOPPING),
        ({"state": "ended", "spent": SPENT}, State.STOPPING),
    ],
)
def test_live_launch_has_the_state_that_its_head_tells(
    tmp_path: Path, head: Head, said: dict[str, Any], state: State
) -> None:
    head.status |= said

    assert host(tmp_path, record(tmp_path, ProcessId.current())).look().state is state


def test_nodes_of_a_live_launch_are_those_of_its_ranks(tmp_path: Path, head: Head) -> None:
    head.status["ranks"] = {
        "0": {"node": "node-1", "phase": "train", "step": 3},
        "1": {"node": "node-1", "phase": "load", "step": 0},
        "2": {"node": "node-0", "phase": "train", "step": 3},
    }

    found = host(tmp_path, record(tmp_path, ProcessId.current())).look().nodes

    assert found is not None and [(node.name, node.said) for node in found] == [
        ("node-0", "rank 2: train, step 3"),
        ("node-1", "rank 0: train, step 3; rank 1: load, step 0"),
    ]


def test_live_launch_without_a_head_says_how_far_it_is(tmp_path: Path) -> None:
    alive = host(tmp_path, record(tmp_path, ProcessId.current()))
    work = WorkDir(tmp_path / "work")
    work.path.mkdir()
    assert alive.look().state is State.STARTING
    work.head.write_text('{"address": "tcp:127.0.0.1:1"}')
    work.write_token()
    assert alive.look().state is State.RECOVERING
    work.verdict.write_text("{}")
    assert alive.look().state is State.STOPPING


def test_launch_of_another_machine_is_not_taken_for_dead_and_not_cancelled_from_here(tmp_path: Path) -> None:
    away = host(tmp_path, record(tmp_path, GONE, host="elsewhere"))

    assert away.look().state is State.RUNNING and "elsewhere" in away.look().reasons[0]
    with pytest.raises(ConfigError, match="on elsewhere, process .*cancel it there"):
        away.cancel(Deadline.after(5.0))


def test_wait_that_is_over_first_says_what_the_job_does(tmp_path: Path, head: Head) -> None:
    job = Job(host(tmp_path, record(tmp_path, ProcessId.current())))

    with pytest.raises(DeadlineError, match=r"\(running\): not done within 3 s"):
        job.wait(timeout_s=3.0)
    with pytest.raises(DeadlineError, match="stop of "):
        job.cancel(timeout_s=3.0)
    assert head.status["stop"] == "job.cancel()"


# Records


def test_record_comes_back_as_it_was_written_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    made = dataclasses.replace(record(tmp_path, GONE), ended=Outcome(0, "done", "succeeded", 4))
    records.write(run, made, timeouts=Timeouts())
    assert records.read(run, timeouts=Timeouts()) == made

    (tmp_path / "run" / contract.LAUNCH_FILE).write_text('{"format": 1}')
    with pytest.raises(CorruptionError, match=contract.LAUNCH_FILE):
        ktrain.attach(run)


def test_record_that_cannot_be_written_does_not_end_the_launch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.py").touch()
    spec = plan_job(ktrain.Local(spares=1).wish((str(tmp_path / "train.py"),), str(tmp_path / "run")))
    assert spec.spares == 1
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file in its way")

    Recorder(spec, records.of_this_process(spec))(None)

    assert "the launch is not recorded in its run" in caplog.text


def test_run_that_nobody_launched_is_not_attached_to(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no launch of it is recorded there"):
        ktrain.attach(str(tmp_path / "absent"))
    with pytest.raises(NotFoundError, match="no launch of it is recorded there"):
        ktrain.attach("absent", on=ktrain.Local())


def test_job_of_this_machine_is_resumed_by_its_launch(tmp_path: Path) -> None:
    job = Job(host(tmp_path, record(tmp_path, GONE)), warnings=("kept",))

    with pytest.raises(ConfigError, match=r"by launching the same again: ktrain\.launch\(\.\.\., run='.*/run'\)"):
        job.resume()
    assert job.warnings == ("kept",)


# What is refused


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [
        (3, {}, "expected a script's path, a function or a Trainer, found int"),
        (["train.py", 3], {}, "expected a script's path and arguments as text, found 3"),
        ([], {}, "expected a script's path"),
        ("absent.py", {}, "there is no such file"),
        (print, {"on": "here"}, "on: expected ktrain.Local"),
        (print, {"on": ktrain.Local(nodes=0)}, "--nodes: expected 1 to"),
        (print, {"on": ktrain.Local(spares=-1)}, "--spares: expected 0 to"),
        (print, {"on": ktrain.Local(faults=("kill-all",))}, "kill-all"),
    ],
)
def test_launch_of_what_cannot_be_is_refused(
    tmp_path: Path, what: Any, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        ktrain.launch(what, **{"on": ktrain.Local(), **options})


def test_launch_of_a_run_that_is_live_is_refused_by_the_process_that_holds_it(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    work = WorkDir.of_run(run)
    with lock_work_dir(work), pytest.raises(ConflictError, match=f"launched by process {os.getpid()} "):
        ktrain.launch(print, on=ktrain.Local(), run=run)
    work.lock.unlink()
    work.path.rmdir()


def test_function_of_a_run_in_a_bucket_lies_beside_its_work_directory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    from ktrain.launcher.code.function import pack_function

    packed = pack_function(print, ("x",))
    script = on_local.put_function(packed, "s3://bucket/net")

    assert script.is_relative_to(tmp_path) and packed.sha256[:16] in script.parts
    assert (script.parents[2].stat().st_mode & 0o777) == 0o700

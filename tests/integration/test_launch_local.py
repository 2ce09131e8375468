"""Real launches on this machine with scripts that need no torch: ends, restarts, refusals, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from ktrain.base import contract
from tests.integration.launching import Place, place

pytestmark = pytest.mark.timeout(300)

WORKS_UNTIL_TOLD = """
import os, pathlib, sys, time
rank, epoch, root = os.environ["RANK"], os.environ["KTRAIN_EPOCH"], pathlib.Path(__file__).parent
(root / f"started-{epoch}-{rank}").write_text(str(os.getpid()))
while not (root / "done").exists():
    time.sleep(0.02)
"""


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        yield made


def started(here: Place, epoch: int, rank: int = 0) -> int:
    """The pid of a worker, once it runs."""
    file = here.root / f"started-{epoch}-{rank}"
    return int(here.await_that(f"start of rank {rank} in attempt {epoch}", lambda: file.exists() and file.read_text()))


def test_launch_script_ends_well_exits_zero_and_leaves_nothing(here: Place) -> None:
    here.script.write_text(
        "import os, sys\n"
        "print('out', sys.argv[1:], os.environ['RANK'], os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'])\n"
        "print('err', os.environ['MASTER_ADDR'], os.environ['GROUP_RANK'], file=sys.stderr)\n"
    )

    assert here.end(here.launch("--nodes", "2", args=("--lr", "1"))) == contract.EXIT_OK

    log = (here.run / "logs/attempt-1/rank-1.log").read_text().splitlines()
    assert log == ["out ['--lr', '1'] 1 0 2", "err 127.0.0.2 1"]
    assert [event["outcome"] for event in here.events("run_ended")] == ["succeeded"]
    here.await_nothing_left()
    assert here.leftovers() == []
    shown = here.ktrain("logs", str(here.run), "--rank", "1").stdout
    assert shown.splitlines() == log


def test_launch_worker_fails_again_and_again_ends_with_its_words(here: Place) -> None:
    here.script.write_text("import os\nif os.environ['RANK'] == '1': raise ValueError('nan in layer 3')\n")

    code = here.end(here.launch("--workers-per-node", "2", "--max-restarts", "1"))

    assert code == contract.EXIT_FAILED
    assert [event["rank"] for event in here.events("failure")] == [1, 1]
    assert "ValueError: nan in layer 3" in here.output() and "(1 allowed)" in here.output()
    here.await_nothing_left()


def test_launch_config_error_of_the_script_is_not_tried_again(here: Place) -> None:
    here.script.write_text("from ktrain.errors import ConfigError\nraise ConfigError('7 does not divide by 4')\n")

    assert here.end(here.launch()) == contract.EXIT_USAGE

    assert len(here.events("attempt_started")) == 1
    assert "7 does not divide by 4" in here.output()


def test_launch_any_process_killed_from_outside_goes_on(here: Place) -> None:
    here.script.write_text(WORKS_UNTIL_TOLD)
    launch = here.launch("--workers-per-node", "2")

    os.kill(started(here, epoch=1, rank=1), signal.SIGKILL)
    worker = started(here, epoch=2)
    (failure,) = here.events("failure")
    assert (failure["cause"], failure["rank"], failure["reason"]) == ("crash", 1, "killed by SIGKILL")

    os.kill(here.pid("supervisor"), signal.SIGKILL)
    started(here, epoch=3, rank=1)
    worker = started(here, epoch=3)
    assert "supervisor of node-0 died" in here.events("failure")[1]["reason"]

    agent = here.pid("agent")
    os.kill(agent, signal.SIGKILL)
    here.await_that("a new agent", lambda: [p for p in here.processes("run.agent ") if p.pid != agent])
    os.kill(here.pid("head"), signal.SIGKILL)
    here.await_that("adoption by a new head", lambda: here.events("head_adopted"))

    (here.root / "done").write_text("")
    assert here.end(launch) == contract.EXIT_OK
    assert (here.root / "started-3-0").read_text() == str(worker) and len(here.events("attempt_started")) == 3
    here.await_nothing_left()
    assert here.leftovers() == []


def test_launch_launcher_killed_takes_all_with_it_and_the_same_command_continues(here: Place) -> None:
    here.script.write_text(WORKS_UNTIL_TOLD)
    first = here.launch("--nodes", "2")
    started(here, epoch=1, rank=1)
    started(here, epoch=1)

    first.kill()
    first.wait()
    here.await_nothing_left()

    (here.root / "done").write_text("")
    assert here.end(here.launch("--nodes", "2")) == contract.EXIT_OK
    ended = {event["attempt"]: event["outcome"] for event in here.events("attempt_ended")}
    assert ended == {1: "failed", 2: "succeeded"}
    here.await_nothing_left()
    assert here.leftovers() == []


def test_launch_live_run_is_refused_by_name_and_cancelled(here: Place) -> None:
    here.script.write_text(WORKS_UNTIL_TOLD)
    launch = here.launch()
    started(here, epoch=1)

    same_machine = here.launch()
    assert here.end(same_machine) == contract.EXIT_CONFLICT
    assert str(launch.pid) in here.output(1)
    (here.root / "elsewhere").mkdir()
    elsewhere = here.launch(TMPDIR=str(here.root / "elsewhere"))
    assert here.end(elsewhere) == contract.EXIT_CONFLICT
    assert str(here.pid("head")) in here.output(2)

    status = here.ktrain("status", str(here.run))
    assert status.returncode == 0 and "live, running, attempt 1" in status.stdout
    assert here.ktrain("cancel", str(here.run)).returncode == contract.EXIT_OK
    assert here.end(launch) == contract.EXIT_STOPPED
    here.await_nothing_left()


def test_launch_interrupted_stops_and_a_second_time_kills(here: Place) -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    here.script.write_text(stubborn + WORKS_UNTIL_TOLD)
    launch = here.launch()
    started(here, epoch=1)

    launch.send_signal(signal.SIGINT)

    assert here.end(launch) == contract.EXIT_STOPPED
    assert here.events("run_ended")[0]["reason"] == "signal SIGINT"
    here.await_nothing_left()
    assert here.launch_files() == []


def test_launch_stopped_worker_does_not_outlive_a_killing(here: Place) -> None:
    here.script.write_text(WORKS_UNTIL_TOLD)
    launch = here.launch()
    os.kill(started(here, epoch=1), signal.SIGSTOP)

    launch.send_signal(signal.SIGTERM)
    launch.send_signal(signal.SIGINT)

    assert here.end(launch) == contract.EXIT_STOPPED
    here.await_nothing_left()


def test_launch_detached_goes_on_by_itself_until_cancelled(here: Place) -> None:
    here.script.write_text(WORKS_UNTIL_TOLD)

    assert here.end(here.launch("--detach")) == contract.EXIT_OK
    started(here, epoch=1)
    assert here.ktrain("cancel", str(here.run)).returncode == contract.EXIT_OK

    here.await_nothing_left()
    assert here.events("run_ended")[0]["outcome"] == "stopped"
    assert here.launch_files() == []

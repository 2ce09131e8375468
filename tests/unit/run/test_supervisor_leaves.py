"""With which code a supervisor leaves: what the head says last, or 130 for a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import atomic, contract
from ktrain.base.control import Server
from ktrain.base.job import WorkDir
from ktrain.run.supervisor import Supervisor
from tests.unit.run.builders import job

_TAKEN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    old = {signum: signal.getsignal(signum) for signum in _TAKEN}
    yield
    for signum, handler in old.items():
        signal.signal(signum, handler)


def leave(folder: Path, *answers: dict[str, Any]) -> tuple[int, list[str]]:
    """Runs a supervisor against a head with these answers, the last one for ever; its code and what it reported."""
    work, told, heard = WorkDir(folder), list(answers), list[str]()
    work.write_token()

    def supervise(said: dict[str, Any]) -> dict[str, Any]:
        heard.append(said["state"])
        if told[0]["action"] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            return {"epoch": 1, "action": "stop"}
        return told.pop(0) if len(told) > 1 else told[0]

    server = Server({"supervise": supervise}, address="tcp:127.0.0.1:0", token=work.read_token())
    try:
        atomic.write_json(work.head, {"address": server.address})
        return Supervisor(job(), work, 0).run(), heard
    finally:
        server.close()


@pytest.mark.parametrize(
    ("action", "code"),
    [("exit", contract.EXIT_OK), ("replace", contract.EXIT_BAD_NODE), ("signal", contract.EXIT_STOPPED)],
)
def test_supervisor_leaves_with_the_code_that_says_what_follows(action: str, code: int, tmp_path: Path) -> None:
    waits = {"epoch": 0, "action": "wait"}

    found, heard = leave(tmp_path, waits, {"epoch": 1, "action": action})

    assert found == code and heard[:2] == ["idle", "idle"]

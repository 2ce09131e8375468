"""The command line: its options are golden, its errors are one line and a code of the contract."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest

from ktrain.base import atomic, contract
from ktrain.base.control import Server
from ktrain.base.events import FileSink, make
from ktrain.base.job import WorkDir
from ktrain.cli.main import cli, main
from ktrain.errors import ConflictError, CorruptionError, DeadlineError, UnavailableError

ON_CLUSTER = {"--namespace", "--kubeconfig", "--context"}
EITHER = {"--backend", *ON_CLUSTER}
OPTIONS = {
    "launch": {
        "--nodes", "--workers-per-node", "--run", "--backend", "--fault", "--max-restarts", "--patience", "--detach",
        "--job", "--name", "--namespace", "--image", "--accelerator", "--tpu", "--slices", "--state",
        "--memory-scope", "--spares", "--queue", "--gang", "--env", "--secret", "--volume", "--code", "--set",
        "--facts", "--dry-run", "--explain", "--output", "--wait", "--follow", "--timeout", "--kubeconfig", "--context",
    },
    "status": {"--output", *EITHER},
    "logs": {"--rank", "--attempt", "--follow", "--previous", "--head", *EITHER},
    "cancel": EITHER,
    "wait": {"--timeout", "--output", *ON_CLUSTER},
    "events": {"--output", *ON_CLUSTER},
    "exec": {"--rank", "--head", "--container", "--stdin", "--timeout", *ON_CLUSTER},
    "port-forward": {"--rank", "--head", "--address", "--timeout", *ON_CLUSTER},
    "delete": {"--timeout", *ON_CLUSTER},
    "list": {"--output", *ON_CLUSTER},
    "doctor": {
        "--backend", "--run", "--nodes", "--active", "--output", "--job", "--name", "--namespace", "--image",
        "--accelerator", "--tpu", "--slices", "--state", "--memory-scope", "--queue", "--gang", "--env", "--secret",
        "--volume", "--code", "--set", "--kubeconfig", "--context",
    },
    "resume": {
        "--nodes", "--image", "--accelerator", "--queue", "--gang", "--max-restarts", "--code", "--set", "--dry-run",
        "--output", "--wait", "--timeout", *EITHER,
    },
    "history": {"--output", *EITHER},
    "gc": {"--older-than", "--confirm", "--dry-run", "--output", *ON_CLUSTER},
    "ckpt ls": {"--volume", "--output"},
    "ckpt verify": {"--step", "--tier", "--output"},
    "ckpt upgrade": {"--confirm", "--dry-run", "--output"},
    "ckpt rm": {"--step", "--volume", "--all", "--force", "--yes", "--dry-run", "--output"},
    "ckpt show": {"--step", "--output"},
    "ckpt diff": {"--step", "--output"},
    "ckpt repair": {"--step", "--confirm", "--dry-run", "--output"},
    "ckpt pin": {"--step", "--off", "--dry-run", "--output"},
    "ckpt gc": {"--keep", "--dry-run", "--output"},
    "ckpt export": {"--to", "--step", "--part", "--max-shard-size", "--dry-run", "--output"},
    "ckpt import": {"--from", "--part", "--step", "--key", "--exclude", "--tie", "--dry-run", "--output"},
    "ckpt quarantine": {"--step", "--epoch", "--off", "--reason", "--dry-run", "--output"},
}  # fmt: skip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def leaves(command: click.Command, name: str = "") -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {name: command}
    found: dict[str, click.Command] = {}
    for child, each in command.commands.items():
        found |= leaves(each, f"{name} {child}".strip())
    return found


def test_cli_options_are_the_golden_list() -> None:
    found = {
        name: {text for option in command.params if isinstance(option, click.Option) for text in option.opts}
        for name, command in leaves(cli).items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptionError("x is bad"), contract.EXIT_CORRUPT),
        (ConflictError("x is held"), contract.EXIT_CONFLICT),
        (UnavailableError("x is away"), contract.EXIT_UNAVAILABLE),
    ],
)
def test_main_error_is_one_line_and_its_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(cli.commands["status"], "invoke", fail)

    assert run("status", "x") == code
    assert capsys.readouterr().err == f"ktrain: {error}\n"


def required(command: click.Command) -> list[str]:
    """What the command does not run without."""
    words = []
    for param in command.params:
        if param.required:
            value = param.type.choices[0] if isinstance(param.type, click.Choice) else "1"
            words += [param.opts[0], value] if isinstance(param, click.Option) else [value]
    return words


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_main_of_every_command_a_wait_that_ended_is_unavailable(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = leaves(cli)[name]

    def late(*args: Any, **kwargs: Any) -> None:
        raise DeadlineError("the store: not done within 10 s")

    monkeypatch.setattr(command, "callback", late)

    assert run(*name.split(), *required(command)) == contract.EXIT_UNAVAILABLE
    assert capsys.readouterr().err == "ktrain: the store: not done within 10 s\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("launch", "nope.py"),
        ("launch", __file__, "--nodes", "0"),
        ("launch", __file__, "--nodes", "two"),
        ("launch", __file__, "--fault", "explode@step=1"),
        ("launch", __file__, "--run", "/proc/nope/x"),
        ("launch",),
        ("frobnicate",),
        ("status", "nope"),
        ("logs", "nope"),
        ("cancel", "nope"),
        ("ckpt", "ls"),
        ("ckpt", "ls", "nope"),
        ("ckpt", "verify", "nope"),
        ("ckpt", "rm", "--volume"),
    ],
)
def test_main_bad_input_exits_2_with_one_error(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KTRAIN_VOLUME", str(tmp_path / "volume"))

    assert run(*arguments) == contract.EXIT_USAGE

    said = capsys.readouterr()
    assert said.err and "Traceback" not in said.err
    assert not (tmp_path / "nope").exists()


def test_status_of_a_run_that_ended_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = FileSink(tmp_path / contract.EVENTS_FILE)
    sink.emit(make("run_started", 0, nodes=1, world_size=1, version="0"))
    sink.emit(make("attempt_started", 1, world_size=1, nodes={"node-0": [0]}))
    sink.emit(make("committed", 1, tier="memory", step=10))
    sink.emit(make("failure", 1, cause="crash", rank=0, reason="boom"))
    sink.emit(make("run_ended", 1, outcome="failed", exit_code=1, reason="boom", step=10))
    sink.close()

    assert run("status", str(tmp_path), "--output", "json") == contract.EXIT_OK

    found = json.loads(capsys.readouterr().out)
    assert found["live"] is None and found["ended"]["exit_code"] == 1
    assert found["committed"] == {"memory": 10}
    assert [failure["cause"] for failure in found["failures"]] == ["crash"]


def test_ckpt_ls_volume_of_nothing_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KTRAIN_VOLUME", str(tmp_path / "volume"))

    assert run("ckpt", "ls", "--volume", "--output", "json") == contract.EXIT_OK
    assert json.loads(capsys.readouterr().out) == []


def test_cancel_waits_for_a_head_that_is_too_busy_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sink = FileSink(tmp_path / contract.EVENTS_FILE)
    sink.emit(make("committed", 1, tier="memory", step=10))
    sink.close()
    work = WorkDir.of_run(str(tmp_path))
    work.make()
    asked = []

    def busy(said: dict[str, Any]) -> dict[str, Any]:
        asked.append(said)
        if len(asked) == 3:
            work.head.unlink()
        raise DeadlineError("no answer")

    work.write_token()
    handlers = {"stop": lambda said: {}, "status": busy}
    with closing(Server(handlers, address="tcp:127.0.0.1:0", token=work.read_token())) as head:
        atomic.write_json(work.head, {"address": head.address})
        assert run("cancel", str(tmp_path)) == contract.EXIT_OK
    assert len(asked) == 3
    assert "(step 10)" in capsys.readouterr().out

"""Runs on a cluster, for the verbs: the options by which one is named, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.errors import ConfigError, DeadlineError
from ktrain.jobs.record import ClusterPlace, record_on_cluster
from ktrain.launcher.backends.kubernetes import act, logs
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.backends.kubernetes.find import find_job
from ktrain.launcher.backends.kubernetes.status import FINAL, Status
from ktrain.launcher.backends.kubernetes.submit import Tried, submit, try_job
from ktrain.launcher.render.common import TRAINER

__all__ = [
    "Stay",
    "choice_of",
    "client_of",
    "deadline_of",
    "echo_line",
    "follow",
    "job_of",
    "record_launch",
    "send",
    "show",
    "try_job",
    "wait_for",
]

LONGEST_S = 30 * 86400.0  # that a command waits where nothing else was said


def client_of(given: Mapping[str, Any]) -> Client:
    """A client of the cluster that `--kubeconfig` and `--context` name."""
    kubeconfig: Path | None = given.get("kubeconfig")
    return Client(connect(kubeconfig, given.get("context")))


def job_of(run: str, namespace: str, given: Mapping[str, Any]) -> tuple[Client, str]:
    """A client of the cluster, and the name of the job there that RUN stands for. Raises as `find_job`."""
    client = client_of(given)
    return client, find_job(client, namespace, run)


def deadline_of(client: Client, timeout_s: float | None) -> Deadline:
    return Deadline.after(LONGEST_S if timeout_s is None else timeout_s, client.clock)


def choice_of(rank: int | None, *, head: bool, container: str | None = None) -> logs.Choice:
    """The container that `--rank`, `--container` and `--head` mean; rank 0's trainer where none was named."""
    if head and rank is not None:
        raise ConfigError("--head and --rank: each excludes the other; leave one out")
    if head and container is not None:
        raise ConfigError("--head and --container: the head's pod has one container; leave one out")
    return logs.head if head else logs.of_rank(rank or 0, container or TRAINER)


class Stay(StrEnum):
    """How long a command stays with a job that it has sent."""

    NOT = "not"
    WAIT = "wait"  # until its end, saying each change of its state
    FOLLOW = "follow"  # the same, and what its ranks write


def record_launch(namespace: str, name: str, run: str, given: Mapping[str, Any]) -> None:
    """Writes into a run which job it was launched as last, for `ktrain.attach`; says where it could not."""
    for line in record_on_cluster(run, ClusterPlace(namespace, name, given.get("context"))):
        click.echo(f"ktrain: {line}", err=True)


def send(client: Client, tried: Tried, archive: bytes | None, *, stay: Stay, given: Mapping[str, Any]) -> int:
    """Submits a job and says how to go on, or stays until its end, at most `--timeout`."""
    timeout_s: float | None = given.get("timeout")
    sent = submit(client, tried, archive)
    released = "" if sent.released_by == "ktrain" else f"; {sent.released_by} starts it"
    click.echo(f"{sent.namespace}/{sent.name}: submitted{released}")
    if sent.left is not None:
        click.echo(f"ktrain: {sent.left}", err=True)
    record_launch(sent.namespace, sent.name, tried.spec.run, given)
    if stay is Stay.FOLLOW:
        return follow(client, sent.namespace, sent.name, timeout_s=timeout_s)
    if stay is Stay.NOT:
        where = f"--backend kubernetes --namespace {sent.namespace}"
        click.echo(f"follow it with `ktrain status {where} {sent.name}` and `ktrain logs {where} --follow {sent.name}`")
        return contract.EXIT_OK
    return wait_for(client, sent.namespace, sent.name, timeout_s=timeout_s, output="text")


def wait_for(client: Client, namespace: str, name: str, *, timeout_s: float | None, output: str) -> int:
    """Waits for a job's end, says each change, and returns its exit code."""
    try:
        status = act.wait(client, namespace, name, deadline=deadline_of(client, timeout_s), observe=_teller(output))
    except DeadlineError as error:
        click.echo(f"ktrain: {error}", err=True)
        return contract.EXIT_UNFINISHED
    if output == "json":
        show(status, output)
    return contract.EXIT_FAILED if status.exit_code is None else status.exit_code


def follow(client: Client, namespace: str, name: str, *, timeout_s: float | None) -> int:
    """Prints what the ranks write and each change of the job's state until its end; returns its exit code."""
    tell, last = _teller("text"), [contract.EXIT_FAILED]

    def observe(status: Status) -> None:
        tell(status)
        last[:] = [contract.EXIT_FAILED if status.exit_code is None else status.exit_code]

    deadline = deadline_of(client, timeout_s)
    try:
        for source, line in logs.follow(client, namespace, name, logs.workers, deadline=deadline, observe=observe):
            echo_line(f"[{source.pod}] ", line)
    except DeadlineError as error:
        click.echo(f"ktrain: {error}", err=True)
        return contract.EXIT_UNFINISHED
    return last[0]


def echo_line(prefix: str, line: bytes) -> None:
    """Prints a line of a log, whether or not it has its line feed."""
    text = line.decode(errors="replace")
    click.echo(prefix + text, nl=not text.endswith("\n"))


def show(status: Status, output: str) -> None:
    """Prints a job: its state, what it waits for, its pods."""
    if output == "json":
        click.echo(json.dumps(status.to_value(), indent=1))
        return
    for line in _lines(status):
        click.echo(line)
    for pod in status.pods or ():
        ready = ", ready" if pod.ready else ""
        again = f", started again {pod.restarts} times" if pod.restarts else ""
        click.echo(f"  {pod.name}: {pod.phase}{ready}{again}{f', on {pod.node}' if pod.node else ''}")
    if status.pods is None:
        click.echo("  its pods may not be read")


def _lines(status: Status) -> list[str]:
    again = f", all pods made anew {status.restarts} times" if status.restarts else ""
    code = f" (exit code {status.exit_code})" if status.state in FINAL else ""
    said = f": {status.message}" if status.message else ""
    first = f"{status.namespace}/{status.name}: {status.state.value}{code}{again}{said}"
    return [first, *(f"  {reason}" for reason in status.reasons)]


def _teller(output: str) -> Callable[[Status], None]:
    """Says a status whenever it is another one than before."""
    said: list[list[str]] = []

    def tell(status: Status) -> None:
        lines = _lines(status)
        if output == "text" and (not said or said[-1] != lines):
            said[:] = [lines]
            for line in lines:
                click.echo(line)

    return tell

"""`ktrain port-forward`: a port of this machine that leads to one of a run's pods."""

from __future__ import annotations

from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.run_options import only_cluster_options, place_options
from ktrain.errors import ConfigError, KtrainError


@click.command("port-forward")
@click.argument("run")
@click.argument("ports", metavar="[LOCAL:]REMOTE")
@place_options
@click.option("--address", default="127.0.0.1", show_default=True, help="Of this machine, to listen on.")
@click.option("--timeout", type=float, metavar="SECONDS", help="At most so long. [default: 30 days]")
@only_cluster_options
def port_forward(run: str, ports: str, namespace: str, **given: Any) -> int:
    """Let a port of this machine lead to a port of a pod of RUN, until Ctrl-C.

    LOCAL is the same as REMOTE where it is left out, and a free port where it is 0.
    """
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes import remote
    from ktrain.launcher.backends.kubernetes.connect import Channels

    local, target = _parse(ports)
    client, name = cluster_run.job_of(run, namespace, given)
    choose = cluster_run.choice_of(given["rank"], head=given["head"])
    remote.find_pod(client, namespace, name, choose)  # what is wrong is said at once

    def connect() -> Channels:
        return remote.connect_port(client, namespace, remote.find_pod(client, namespace, name, choose), target)

    def report(error: KtrainError) -> None:
        click.echo(f"ktrain: {error}", err=True)

    with remote.Forwarder(connect, host=given["address"], port=local, report=report) as forwarder:
        click.echo(f"{given['address']}:{forwarder.port} -> {name}:{target}")
        try:
            forwarder.serve(cluster_run.deadline_of(client, given["timeout"]))
        except KeyboardInterrupt:
            pass  # the way to end it
    return contract.EXIT_OK


def _parse(text: str) -> tuple[int, int]:
    """Local and remote port."""
    first, colon, second = text.partition(":")
    words = (first, second) if colon else (text, text)
    numbers = [int(word) if word.isascii() and word.isdigit() else -1 for word in words]
    if not (0 <= numbers[0] < 65536 and 0 < numbers[1] < 65536):
        raise ConfigError(f"ports {text!r}: expected [LOCAL:]REMOTE, such as 8080 or 6006:6006")
    return numbers[0], numbers[1]

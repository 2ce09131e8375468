"""`ktrain exec`: a command in a container of a run on a cluster."""

from __future__ import annotations

import sys
from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.run_options import only_cluster_options, place_options
from ktrain.errors import DeadlineError


@click.command("exec", context_settings={"ignore_unknown_options": False})
@click.argument("run")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND")
@place_options
@click.option("--container", type=click.Choice(["trainer", "agent"]), help="Of a rank's pod. [default: trainer]")
@click.option("--stdin", "with_stdin", is_flag=True, help="Send what stands on standard input.")
@click.option("--timeout", type=float, metavar="SECONDS", help="At most so long. [default: 30 days]")
@only_cluster_options
def exec_command(run: str, command: tuple[str, ...], namespace: str, **given: Any) -> int:
    """Run COMMAND in a container of RUN on a cluster; its exit code is passed on."""
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes import remote

    client, name = cluster_run.job_of(run, namespace, given)
    choose = cluster_run.choice_of(given["rank"], head=given["head"], container=given["container"])
    source = remote.find_pod(client, namespace, name, choose)
    stdin = sys.stdin.fileno() if given["with_stdin"] else None
    streams = remote.Streams(stdin, sys.stdout.buffer, sys.stderr.buffer)
    deadline = cluster_run.deadline_of(client, given["timeout"])
    try:
        return remote.run_command(client, namespace, source, command, streams=streams, deadline=deadline)
    except DeadlineError as error:
        click.echo(f"ktrain: {error}", err=True)
        return contract.EXIT_UNFINISHED

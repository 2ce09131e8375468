"""`ktrain events`: what a cluster said of a run."""

from __future__ import annotations

import json
from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.run_options import only_cluster_options


@click.command()
@click.argument("run")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@only_cluster_options
def events(run: str, output: str, namespace: str, **given: Any) -> int:
    """Print what the cluster's controllers said of RUN, the oldest first, as long as the cluster keeps it."""
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes import view

    client, name = cluster_run.job_of(run, namespace, given)
    found = view.events_of(client, namespace, name)
    if output == "json":
        click.echo(json.dumps(found, indent=1))
        return contract.EXIT_OK
    for event in found:
        about = event.get("involvedObject") or {}
        what = f"{about.get('kind')} {about.get('name')}"
        click.echo(f"{view.when(event)} {event.get('type')} {what}: {event.get('reason')}: {event.get('message')}")
    return contract.EXIT_OK

"""`ktrain list`: the runs on a cluster."""

from __future__ import annotations

import json
from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.run_options import any_namespace_options


@click.command("list")
@click.option("--namespace", help="Only this namespace. [default: all]")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@any_namespace_options
def list_command(namespace: str | None, output: str, **given: Any) -> int:
    """List the jobs of ktrain on a cluster."""
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes import status, view

    found = [
        {
            "namespace": jobset["metadata"]["namespace"],
            "name": jobset["metadata"]["name"],
            "state": status.state_of(jobset).value,
            "run": status.run_of(jobset),
            "created": jobset["metadata"].get("creationTimestamp"),
        }
        for jobset in view.list_jobsets(cluster_run.client_of(given), namespace)
    ]
    if output == "json":
        click.echo(json.dumps(found, indent=1))
        return contract.EXIT_OK
    for item in found:
        click.echo("{namespace}/{name}  {state}  {created}  {run}".format(**item))
    return contract.EXIT_OK

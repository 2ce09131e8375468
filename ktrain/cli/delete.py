"""`ktrain delete`: takes a job off a cluster."""

from __future__ import annotations

from typing import Any

import click

from ktrain.base import contract
from ktrain.cli.run_options import only_cluster_options


@click.command()
@click.argument("run")
@click.option("--timeout", type=float, default=300.0, show_default=True, metavar="SECONDS", help="At most so long.")
@only_cluster_options
def delete(run: str, timeout: float, namespace: str, **given: Any) -> int:
    """Take the job of RUN off a cluster, with all that it owns there. Checkpoints and events of the run stay."""
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes import act

    client, name = cluster_run.job_of(run, namespace, given)
    act.delete(client, namespace, name, deadline=cluster_run.deadline_of(client, timeout))
    click.echo(f"{namespace}/{name}: deleted")
    return contract.EXIT_OK

"""`ktrain wait`: until a run on a cluster has ended."""

from __future__ import annotations

from typing import Any

import click

from ktrain.cli.run_options import only_cluster_options


@click.command()
@click.argument("run")
@click.option("--timeout", type=float, metavar="SECONDS", help="At most so long. [default: 30 days]")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@only_cluster_options
def wait(run: str, timeout: float | None, output: str, namespace: str, **given: Any) -> int:
    """Wait until RUN on a cluster has ended; the exit code is the run's, or 6 where the time was over before."""
    from ktrain.cli import cluster_run

    client, name = cluster_run.job_of(run, namespace, given)
    return cluster_run.wait_for(client, namespace, name, timeout_s=timeout, output=output)

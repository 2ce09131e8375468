"""`ktrain resume`: a job on a cluster goes on, rendered again for what the cluster is now."""

from __future__ import annotations

from typing import Any

import click

from ktrain.cli.cluster_options import LaunchCommand
from ktrain.cli.run_options import any_namespace_options


@click.command(cls=LaunchCommand)
@click.argument("run")
@click.option("--backend", type=click.Choice(["kubernetes"]), default="kubernetes", show_default=True, help="Where.")
@click.option("--namespace", help="Namespace of the job. [default: where it was, else default]")
@click.option("--nodes", type=int, help="Another number of nodes.")
@click.option("--image", help="Another image.")
@click.option("--accelerator", metavar="MODEL:N", help="Other devices of each node.")
@click.option("--queue", help="Another queue.")
@click.option("--gang", metavar="MECHANISM", help="Another gang mechanism.")
@click.option("--max-restarts", type=int, help="Another number of restarts.")
@click.option("--code", metavar="WHAT", help="Other code, as of `ktrain launch`. [default: the job's]")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any other field of the job file.")
@click.option(
    "--dry-run",
    type=click.Choice(["client", "server"]),
    metavar="[=server]",
    help="Print the manifests, with =server as this cluster would take them; change nothing.",
)
@click.option("--output", type=click.Choice(["yaml", "json"]), help="Form of --dry-run. [default: yaml]")
@click.option("--wait", is_flag=True, help="Return when the job has ended, with its exit code.")
@click.option("--timeout", type=float, metavar="SECONDS", help="With --wait: at most so long. [default: 30 days]")
@any_namespace_options
def resume(run: str, backend: str, **given: Any) -> int:
    """Send the job of RUN again, from what is stored of it, to the cluster as it is now.

    RUN is a job's name, or the URL of a run, whose job may have been deleted. A job that lives is refused. The training
    goes on from its newest checkpoint. Exit code: 0 sent, 2 nothing to resume, 4 it is live, 5 its old pods stay.
    """
    del backend
    from ktrain.cli import cluster_resume

    return cluster_resume.resume_job(run, given)

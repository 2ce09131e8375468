"""`ktrain doctor`: what a cluster, or this machine, has for a job, and what keeps the job from running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ktrain.base import contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.cli.cluster_options import job_options, refuse_cluster_options
from ktrain.errors import ConfigError

if TYPE_CHECKING:  # every verb pays for the imports of this module
    from ktrain.launcher.doctor.finding import Finding, Report

_CALL_S = 20.0  # of one read with its retries: an answer that takes longer is one of the findings
_JOB = ("job", "run", "image", "state", "nodes", "accelerator", "tpu", "code")


@click.command()
@click.argument("script", required=False)
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED, metavar="-- SCRIPT ARGS")
@click.option(
    "--backend",
    type=click.Choice(["local", "kubernetes"]),
    default="local",
    show_default=True,
    help="What is looked at: this machine, or a cluster.",
)
@click.option("--run", "run", metavar="URI", help="Where the run would live; whether it can be reached is looked at.")
@click.option("--nodes", type=int, help="Number of nodes of the job. [default: 1]")
@click.option("--active", is_flag=True, help="Also try it: pods in a namespace of their own, an object in RUN.")
@click.option("--output", type=click.Choice(["text", "json", "yaml"]), default="text", show_default=True)
@job_options
def doctor(script: str | None, script_args: tuple[str, ...], backend: str, output: str, **given: Any) -> int:
    """Look whether a job could run, on a cluster or on this machine. Reads alone; `--active` tries.

    With a job (its file or its options) the cluster is held against it. Exit code: 0 nothing keeps it from running,
    1 something does, 2 bad input, 5 the cluster is out of reach.
    """
    from ktrain.cli.doctor_text import show

    command = () if script is None else (script, *script_args)
    found = _look_at_cluster(command, given) if backend == "kubernetes" else _look_at_machine(given)
    show(found, output)
    return contract.EXIT_FAILED if found.failed else contract.EXIT_OK


def _look_at_cluster(command: tuple[str, ...], given: Mapping[str, Any]) -> Report:
    from ktrain.cli.cluster import job_with_code
    from ktrain.launcher.backends.kubernetes.client import Client
    from ktrain.launcher.backends.kubernetes.connect import connect
    from ktrain.launcher.doctor.active import run_tests
    from ktrain.launcher.doctor.cluster import report
    from ktrain.launcher.doctor.gang_trial import Terms
    from ktrain.launcher.doctor.looks import Looks

    has_job = bool(command) or any(given.get(name) for name in _JOB)
    spec, archive = job_with_code(command, given) if has_job else (None, None)
    door = connect(given.get("kubeconfig"), given.get("context"))
    space = spec.namespace if spec is not None else given.get("namespace") or "default"
    looks = Looks(Client(door, call_s=_CALL_S), space)
    # Where the tests run nobody has the Secrets that a private image takes.
    terms = Terms() if spec is None or spec.pull_secrets else Terms(image=spec.image)

    def more() -> tuple[Finding, ...]:
        """What is not read of the cluster: the bucket, and the tests."""
        found = () if spec is None else _look_at_store(spec.run, given["active"], spec.saving.bucket_bytes_per_s)
        return (*found, *(run_tests(looks, spec, terms, _say) if given["active"] else ()))

    return report(looks, door, spec, None if archive is None else archive.data, more)


def _look_at_machine(given: Mapping[str, Any]) -> Report:
    from ktrain.base.urls import local_path
    from ktrain.launcher.budget import volume_bytes
    from ktrain.launcher.doctor.finding import Report
    from ktrain.launcher.doctor.machine import Places, look_at_machine
    from ktrain.launcher.quantity import parse_bytes
    from ktrain.launcher.spec import Bytes, Memory

    refuse_cluster_options({name: value for name, value in given.items() if name != "state"})
    run, nodes = given["run"], given["nodes"] or 1
    path = None if run is None else local_path(run)
    needs = 0
    if given["state"]:
        needs = nodes * volume_bytes(Memory(Bytes(parse_bytes(given["state"], name="--state"))), nodes)
    places = Places(volume=settings.volume_root(), run=path, needs_bytes=needs)
    found = look_at_machine(places)
    if run is not None and path is None:
        found += _look_at_store(run, given["active"])
    return Report(target=f"This machine ({ids.host_name()})", findings=found)


def _look_at_store(run: str, active: bool, nodes_bytes_per_s: float | None = None) -> tuple[Finding, ...]:
    """The run's bucket, from here; a run on a volume of the pods is seen by them alone.

    With the rate that is assumed of a cluster's nodes, it is they who use the bucket, by an identity of their own.
    """
    from ktrain.base.urls import local_path, without_slash
    from ktrain.launcher.doctor.bucket import Probe, look_at_bucket, try_bucket
    from ktrain.launcher.doctor.clocks import date_of_store, look_at_clock
    from ktrain.launcher.doctor.finding import Check, Finding, Outcome, run_checks
    from ktrain.tier.location import open_tier

    if local_path(run) is not None:
        return ()
    scheme = run.partition("://")[0]
    refused = Outcome.FAILED if nodes_bytes_per_s is None else Outcome.UNKNOWN
    try:
        tier = open_tier(without_slash(run), timeouts=settings.timeouts())
    except ConfigError as error:
        return (Finding("bucket", refused, str(error), "it cannot be opened from here", "install what it names"),)
    probe = Probe(tier, run, SYSTEM_CLOCK, refused)
    checks = [Check("bucket", lambda: look_at_bucket(probe))]
    if active:
        checks.append(Check("bucket rate", lambda: try_bucket(probe, nodes_bytes_per_s or 0.0)))
    checks.append(
        Check("clock of the bucket", lambda: look_at_clock("the bucket", lambda: date_of_store(scheme), SYSTEM_CLOCK))
    )
    try:
        return run_checks(checks)
    finally:
        tier.close()


def _say(text: str) -> None:
    click.echo(f"ktrain: {text}", err=True)

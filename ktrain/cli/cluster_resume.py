"""What `ktrain resume` does: find the last submission, change it, try it, replace the job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from ktrain.base import contract
from ktrain.base.urls import without_slash
from ktrain.cli import cluster_run
from ktrain.cli.cluster import bring_code, job_from_value
from ktrain.errors import ConfigError, NotFoundError
from ktrain.jobs import run_records
from ktrain.launcher.backends.kubernetes import stored
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.find import is_url, try_find_job
from ktrain.launcher.backends.kubernetes.resume import Last, find_last, is_ticket_of, resume
from ktrain.launcher.backends.kubernetes.submission import Submission, changes
from ktrain.launcher.backends.kubernetes.submit import Tried, try_successor
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render import code
from ktrain.launcher.render.access import shown, token_secret
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.render.text import to_yaml
from ktrain.launcher.spec import JobSpec, default_name

_MOST_S = 900.0  # for the old job to be gone: its pods' grace and what the controllers take


def resume_job(target: str, given: Mapping[str, Any]) -> int:
    """Resumes a job, or prints what would be sent.

    Raises:
        KtrainError: it cannot be; the message says what to do.
    """
    client = cluster_run.client_of(given)
    last = last_of(client, target, given.get("namespace"))
    if last.is_sent:
        return _say_sent(client, last, given)
    value = {**last.submission.spec, "namespace": last.namespace}
    spec, archive = job_from_value(value, given)
    _expect_same_job(last, spec)
    data = archive.data if archive is not None else stored.carried_code(client, spec)
    if given.get("dry_run") == "client":
        return _show_stored(spec, last.submission, data, given)
    tried = try_successor(client, spec, data)
    for line in tried.warnings:
        click.echo(f"ktrain: {line}", err=True)
    said = changes(last.submission, spec, tried.facts, tried.rendered.gang)
    if given.get("dry_run"):
        return _show(spec, tried.rendered, said, data, given)
    if last.is_cut_off:
        click.echo("ktrain: a resume of this job was cut off; this one goes on from where that was", err=True)
    _say_changes(said)
    bring_code(spec, archive)
    return _replace(client, last, tried, data, given)


def _replace(client: Client, last: Last, tried: Tried, data: bytes | None, given: Mapping[str, Any]) -> int:
    gang, deadline = tried.rendered.gang, cluster_run.deadline_of(client, _MOST_S)
    click.echo(f"ktrain: gang {gang.kind.value}: {gang.reason}", err=True)
    done = resume(client, last, tried, data, keep=run_records.try_keep, deadline=deadline)
    for text in filter(None, (gang.warning, done.unkept, done.sent.left)):
        click.echo(f"ktrain: {text}", err=True)
    number, by = done.sent.submission.number, done.sent.released_by
    released = "" if by == "ktrain" else f"; {by} starts it"
    click.echo(f"{last.namespace}/{last.name}: resumed as submission {number}{released}")
    cluster_run.record_launch(last.namespace, last.name, tried.spec.run, given)
    return _wait(client, last, given)


def last_of(client: Client, target: str, namespace: str | None) -> Last:
    """The submission that a job's name or a run's URL stands for."""
    where = namespace or "default"
    if not is_url(target):
        return find_last(client, where, target)
    run = without_slash(target)
    name = try_find_job(client, where, run)
    return _last_of_gone(client, run, namespace) if name is None else find_last(client, where, name, run=run)


def _last_of_gone(client: Client, run: str, namespace: str | None) -> Last:
    """Of a run that has no job in the namespace: what a resume that was cut off left, else what the run has kept."""
    where, name = namespace or "default", default_name(run)
    if is_ticket_of(stored.try_read_ticket(client, where, name), run):
        return find_last(client, where, name, run=run)
    record = run_records.last(run)
    if record is None:
        raise NotFoundError(
            f"namespace {where}: there is no job of run {run}; `ktrain list --namespace {where}` lists them, and the "
            "run has kept no submission"
        )
    where, name = namespace or str(record.spec.get("namespace", "default")), str(record.spec["name"])
    return find_last(client, where, name, run=run, from_run=lambda: record)


def _expect_same_job(last: Last, spec: JobSpec) -> None:
    was = last.submission.spec
    for field, value in (("name", last.name), ("namespace", last.namespace), ("run", without_slash(was["run"]))):
        if getattr(spec, field) != value:
            raise ConfigError(
                f"{field}: a resumed job keeps it: expected {value!r}, found {getattr(spec, field)!r}; launch another"
            )


# What is said


def _say_sent(client: Client, last: Last, given: Mapping[str, Any]) -> int:
    """A resume sent it and died before it could say so."""
    number = last.submission.number
    if given.get("dry_run"):
        click.echo(f"ktrain: it was resumed as submission {number} already; nothing would be sent", err=True)
        return contract.EXIT_OK
    stored.drop_ticket(client, last.namespace, last.name)
    click.echo(f"{last.namespace}/{last.name}: it was resumed as submission {number} already")
    cluster_run.record_launch(last.namespace, last.name, last.submission.job.run, given)
    return _wait(client, last, given)


def _wait(client: Client, last: Last, given: Mapping[str, Any]) -> int:
    if not given.get("wait"):
        return contract.EXIT_OK
    return cluster_run.wait_for(client, last.namespace, last.name, timeout_s=given.get("timeout"), output="text")


def _say_changes(found: tuple[str, ...]) -> None:
    for line in found or ("nothing has changed since the last submission",):
        click.echo(f"ktrain: {line}", err=True)


def _show_stored(spec: JobSpec, last: Submission, data: bytes | None, given: Mapping[str, Any]) -> int:
    """For the cluster as the last submission found it; nothing is tried."""
    facts = ClusterFacts() if last.facts is None else ClusterFacts.from_value(last.facts)
    rendered = render(spec, facts)
    return _show(spec, rendered, changes(last, spec, facts, rendered.gang), data, given)


def _show(
    spec: JobSpec, rendered: Rendered, said: tuple[str, ...], data: bytes | None, given: Mapping[str, Any]
) -> int:
    carriers = code.config_maps(spec, data)
    objects = [shown(item) for item in (rendered.jobset, token_secret(spec, ""), *carriers, *rendered.owned)]
    if given.get("output") == "json":
        gang = {"kind": rendered.gang.kind.value, "reason": rendered.gang.reason}
        click.echo(json.dumps({"job": spec.name, "gang": gang, "changes": list(said), "objects": objects}, indent=2))
        return contract.EXIT_OK
    click.echo(to_yaml(objects), nl=False)
    _say_changes(said)
    return contract.EXIT_OK

"""`ktrain status`: where a run is."""

from __future__ import annotations

import json
from typing import Any

import click

from ktrain.base import settings
from ktrain.base.events import Event
from ktrain.base.job import HeadCaller, WorkDir, canonical_url
from ktrain.checkpoint.log import LogReader
from ktrain.cli import quarantine
from ktrain.cli.run_options import either_options
from ktrain.errors import DeadlineError, KtrainError, NotFoundError


def live_status(run: str) -> dict[str, Any] | None:
    """What the run's head on this machine says; None when there is none, or it does not say."""
    try:
        return _ask(run)
    except KtrainError:
        return None


def is_live(run: str) -> bool:
    """Whether the run has a head on this machine, also one that is too busy to answer."""
    try:
        _ask(run)
    except DeadlineError:
        return True
    except KtrainError:
        return False
    return True


def _ask(run: str) -> dict[str, Any]:
    return HeadCaller(WorkDir.of_run(run)).call("status", {}, timeout_s=settings.timeouts().call_s)


def read_events(run: str) -> list[Event]:
    """All events of a run.

    Raises:
        NotFoundError: there are none, so there is no such run.
    """
    found = LogReader(run, timeouts=settings.timeouts()).read_new()
    if not found:
        raise NotFoundError(
            f"run {run}: there is no run here (no events); check the name or start it with `ktrain launch`"
        )
    return found


def describe(run: str) -> dict[str, Any]:
    """The run as one JSON value: attempts, steps, tiers, failures, and what is live."""
    from ktrain.train.report import Report

    events = read_events(run)
    tiers: dict[str, int] = {}
    for event in events:
        if event.kind == "committed":
            tiers[event.fields["tier"]] = int(event.fields["step"])
    ended = next((event for event in reversed(events) if event.kind in ("run_ended", "run_started")), None)
    paced = next((event.fields for event in reversed(events) if event.kind == "cadence"), None)
    return {
        "run": run,
        "live": live_status(run),
        "ended": ended.fields if ended is not None and ended.kind == "run_ended" else None,
        "committed": tiers,
        "cadence": paced,
        "quarantined": quarantine.try_read(run),
        "failures": [event.to_json() for event in events if event.kind == "failure"],
        "report": Report.from_events(events).to_json(),
    }


def _on_cluster(run: str, output: str, namespace: str, given: dict[str, Any]) -> int:
    from ktrain.cli import cluster_run
    from ktrain.launcher.backends.kubernetes.status import assess
    from ktrain.launcher.backends.kubernetes.view import look

    client, name = cluster_run.job_of(run, namespace, given)
    cluster_run.show(assess(look(client, namespace, name)), output)
    return 0


@click.command()
@click.argument("run")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@either_options
def status(run: str, output: str, backend: str, namespace: str, **given: Any) -> int:
    """Show RUN's attempts, steps, tiers and failures; on a cluster its state, pods, and what it waits for."""
    if backend == "kubernetes":
        return _on_cluster(run, output, namespace, given)
    run = canonical_url(run)
    found = describe(run)
    if output == "json":
        click.echo(json.dumps(found, indent=1))
        return 0
    from ktrain.train.report import Report

    live = found["live"]
    if live is not None:
        click.echo(f"{run}: live, {live['state']}, attempt {live['epoch']}, step {live['step']}")
        for rank, item in live["ranks"].items():
            at = f"{item['phase']}, step {item['step']}, silent {item['silent_s']:.1f} s"
            click.echo(f"  rank {rank} on {item['node']}: {at}")
    else:
        ended = found["ended"]
        said = (
            f"{ended['outcome']} (exit code {ended['exit_code']})"
            if ended
            else "not live; its launcher ended without a word"
        )
        click.echo(f"{run}: {said}")
    if found["committed"]:
        click.echo("committed: " + ", ".join(f"{tier} {step}" for tier, step in found["committed"].items()))
    if found["cadence"]:
        paced = found["cadence"]
        slow = ", ".join(f"{tier} {paced[tier] or 'whenever idle'}" for tier in ("disk", "bucket"))
        click.echo(f"cadence: memory every {paced['memory']} steps, {slow}: {paced['reason']}")
    for line in quarantine.lines(found["quarantined"] or ()):
        click.echo(line)
    click.echo("\n" + Report.from_events(read_events(run)).to_text())
    return 0

"""`ktrain cancel`: save, stop, and say where the last step lies."""

from __future__ import annotations

import click

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.job import HeadCaller, WorkDir, canonical_url
from ktrain.cli.status import is_live, read_events
from ktrain.errors import NotFoundError, UnavailableError


@click.command()
@click.argument("run")
def cancel(run: str) -> int:
    """Stop RUN after its current step and a save. The same launch command continues it."""
    run = canonical_url(run)
    timeouts = settings.timeouts()
    try:
        HeadCaller(WorkDir.of_run(run)).call("stop", {"reason": "ktrain cancel"}, timeout_s=timeouts.call_s)
    except UnavailableError as error:
        raise NotFoundError(f"run {run}: it is not live on this machine ({error})") from error
    deadline = Deadline.after(timeouts.stop_s + timeouts.drain_s)
    while is_live(run):
        deadline.check(f"stop of {run}")
        SYSTEM_CLOCK.sleep(0.2)
    committed: dict[str, int] = {}
    for event in read_events(run):
        if event.kind == "committed":
            committed[event.fields["tier"]] = int(event.fields["step"])
    where = ", ".join(f"{tier} (step {step})" for tier, step in committed.items()) or "nowhere: nothing was saved yet"
    click.echo(f"{run}: stopped; the last saved step lies in {where}")
    return contract.EXIT_OK

"""`ktrain ckpt quarantine`: which steps are set aside; set one aside, or trust it again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.job import canonical_url
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.quarantine import Key, Mark, Quarantine, add_marks, describe, read_marks
from ktrain.cli.ckpt.base import DRY_RUN, OUTPUT
from ktrain.errors import ConfigError, KtrainError, NotFoundError
from ktrain.snapshot.volumes import list_volumes


@click.command()
@click.argument("run")
@click.option("--step", type=int, help="Set this step aside. [default: show what is set aside]")
@click.option("--epoch", type=int, help="Only of this epoch. [default: all that made the step]")
@click.option("--off", is_flag=True, help="Trust the step again.")
@click.option("--reason", default="asked for by hand", show_default=True)
@DRY_RUN
@OUTPUT
def quarantine(  # noqa: PLR0913 -- a verb: one parameter for each option
    run: str, step: int | None, epoch: int | None, off: bool, reason: str, dry_run: bool, output: str
) -> int:
    """Show or change which steps of RUN are set aside, so that no restore takes them. Nothing is ever deleted.

    With --dry-run what is shown is what would be set aside.
    """
    catalog = RunCatalog.open(canonical_url(run), timeouts=settings.timeouts(), create=False)
    known = read_marks(catalog)
    if step is not None:
        newest = max((attempt.epoch for attempt in catalog.attempts()), default=0)
        keys = _keys(catalog, known, step, epoch, off=off)
        marks = [Mark(*key, on=not off, reason=reason, after=newest) for key in keys]
        known = Quarantine((*known.marks, *marks)) if dry_run else add_marks(catalog, known, marks)
    elif off or epoch is not None:
        raise ConfigError("ckpt quarantine: expected --step with --off or --epoch")
    found = set_aside(known)
    if output == "json":
        click.echo(json.dumps(found, indent=1))
    else:
        for line in lines(found) or ["nothing is set aside"]:
            click.echo(f"after that {line}" if dry_run and step is not None else line)
    return contract.EXIT_OK


def _keys(catalog: RunCatalog, known: Quarantine, step: int, epoch: int | None, *, off: bool) -> list[Key]:
    """The step in each epoch that made it, as far as the bucket, this machine and the marks tell."""
    made = {commit.identity.epoch for commit in catalog.listing().commits if commit.identity.step == step}
    for info in list_volumes(settings.volume_root()):
        made |= {held.identity.epoch for held in info.held if info.run == catalog.run_id and held.identity.step == step}
    if off:
        made |= {mark.epoch for mark in known.marks if mark.step in (None, step)}
    wanted = [(step, found) for found in sorted(made) if epoch in (None, found)]
    keys = [key for key in wanted if (known.find(*key) is not None) == off]
    if not keys:
        state = "set aside" if off else "there to be set aside"
        raise NotFoundError(f"run {catalog.tier.url}: no step {step}{f' of epoch {epoch}' if epoch else ''} is {state}")
    return keys


def set_aside(known: Quarantine) -> list[dict[str, Any]]:
    """What is set aside now: the fields of its newest mark."""
    last = {(mark.step, mark.epoch): mark for mark in known.marks}
    return [describe(mark) for mark in last.values() if mark.on]


def lines(found: Iterable[dict[str, Any]]) -> list[str]:
    """The same for people."""
    return [
        f"set aside: {'every step' if item['step'] is None else 'step {}'.format(item['step'])} of epoch "
        f"{item['epoch']}: {item['reason']}"
        for item in found
    ]


def note(catalog: RunCatalog, rows: Iterable[dict[str, Any]]) -> None:
    """Adds the reason to rows of steps that are set aside."""
    known = read_marks(catalog)
    for row in rows:
        mark = known.find(row["step"], row["epoch"]) if row.get("epoch") is not None else None
        if mark is not None:
            row["quarantined"] = mark.reason


def try_read(run: str) -> list[dict[str, Any]] | None:
    """What is set aside in a run; None where that cannot be told."""
    try:
        return set_aside(read_marks(RunCatalog.open(run, timeouts=settings.timeouts(), create=False)))
    except NotFoundError:
        return []
    except KtrainError:
        return None

"""`ktrain ckpt repair`: make damaged checkpoints whole again from good copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.collect import Collector, Plan
from ktrain.checkpoint.commit import prove
from ktrain.checkpoint.marks import write_of
from ktrain.checkpoint.reading import reading
from ktrain.checkpoint.removal import Removal, Seen, Terms, unreadable
from ktrain.checkpoint.repair import Damage, Places, choose_spares, find_damage, rebuild
from ktrain.cli.ckpt.base import DRY_RUN, OUTPUT, held, open_run, say_wait, warn_unprotected
from ktrain.cli.ckpt.gc import describe
from ktrain.errors import KtrainError, NotFoundError


@click.command()
@click.argument("run")
@click.option("--step", type=int, help="Only this step.")
@click.option("--confirm", is_flag=True, help="Remove records that cannot be read, of checkpoints that are whole.")
@DRY_RUN
@OUTPUT
def repair(run: str, step: int | None, confirm: bool, dry_run: bool, output: str) -> int:
    """Read every byte of RUN's bucket and write new copies of what is damaged, from good ones.

    Good copies are looked for in this machine's memory volumes, its disk tier, and other commits of the step. Nothing
    is replaced. With --confirm a record that cannot be read is removed with its files, where another record of the same
    checkpoint is proven; RUN must not be live then. Exit code 0: all of the line is whole; 3: something could not be
    repaired.
    """
    catalog = open_run(run)
    disk = settings.env(contract.ENV_DISK)
    places = Places(settings.volume_root(), None if disk is None else Path(disk), settings.timeouts())
    seen = Seen.read(catalog)
    known = [commit.identity.step for commit in seen.listing.commits]
    if step is not None and step not in known and contract.step_dirname(step) not in str(seen.listing.broken):
        raise NotFoundError(f"run {run}: there is no checkpoint of step {step} in the bucket; see `ktrain ckpt ls`")
    damaged = find_damage(catalog, seen, places.timeouts, step)
    rows = [_repair(catalog, damage, places, dry_run) for damage in damaged]
    left = {(damage.step, damage.epoch) for damage in damaged}
    whole = {at for commit in seen.line() if (at := write_of(commit)[:2]) not in left and step in (None, at[0])}
    removals = unreadable(seen, whole)
    if confirm and not dry_run and removals:
        with held(catalog, run):
            removals = _remove(catalog, whole)
    is_removed = confirm and not dry_run
    if output == "json":
        listed = [removal.to_json() for removal in removals]
        click.echo(
            json.dumps({"dry_run": dry_run, "damaged": rows, "removed": is_removed, "unreadable": listed}, indent=1)
        )
    else:
        _print(rows, dry_run)
        for removal in removals:
            click.echo(f"{'removed' if is_removed else 'can be removed by --confirm'}: {describe(removal)}")
    return contract.EXIT_OK if all(row["failure"] is None for row in rows) else contract.EXIT_CORRUPT


def _remove(catalog: RunCatalog, whole: set[tuple[int, int]]) -> list[Removal]:
    """Plans anew, now that nobody else runs: what was whole a moment ago may have been collected since."""
    collector = Collector(catalog, timeouts=settings.timeouts())
    terms = Terms(None, catalog.newest_epoch(), holds_run=True)
    seen, _ = collector.plan_watched(terms, say_wait)
    proven = set()
    for commit in seen.line():
        if write_of(commit)[:2] in whole:
            prove(catalog, commit)
            proven.add(write_of(commit)[:2])
    outcome = collector.carry_out(Plan(removals=tuple(unreadable(seen, proven))), terms)
    if outcome.failure is not None:
        raise outcome.failure
    for step, reason in outcome.spared:
        click.echo(f"stays: the record of step {step} that cannot be read: {reason}", err=True)
    return outcome.removed


def _repair(catalog: RunCatalog, damage: Damage, places: Places, dry_run: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"step": damage.step, "epoch": damage.epoch, "reasons": damage.reasons, "write_id": None}
    with reading(catalog, damage.step, timeouts=places.timeouts) as failure:
        warn_unprotected(failure)
        choose_spares(catalog, damage, places)
        row["from"] = {str(rank): spare.where for rank, spare in sorted(damage.chosen.items())}
        row["failure"] = None
        if not damage.can_be_repaired():
            row["failure"] = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(damage.missing.items()))
        elif not dry_run:
            try:
                row["write_id"] = rebuild(catalog, damage).write_id
            except KtrainError as error:
                row["failure"] = f"{error.kind}: {error}"
    return row


def _print(rows: list[dict[str, Any]], dry_run: bool) -> None:
    if not rows:
        click.echo("every checkpoint of the line is whole")
    for row in rows:
        for reason in row["reasons"]:
            click.echo(f"damaged: step {row['step']} epoch {row['epoch']}: {reason}")
        if row["failure"] is not None:
            click.echo(f"NOT REPAIRED: step {row['step']} epoch {row['epoch']}: {row['failure']}", err=True)
            continue
        places = ", ".join(f"rank {rank} from {where}" for rank, where in row["from"].items())
        said = "can be repaired" if dry_run else f"repaired as {row['write_id']}"
        click.echo(f"{said}: step {row['step']} epoch {row['epoch']}: {places}")

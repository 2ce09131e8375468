"""`ktrain ckpt gc`: remove what dead attempts left in the bucket."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.clock import Deadline
from ktrain.checkpoint import quarantine
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.collect import Collector, Outcome, Plan
from ktrain.checkpoint.removal import Removal, Seen, Terms
from ktrain.checkpoint.retention import parse
from ktrain.cli.ckpt.base import DRY_RUN, OUTPUT, held, open_run, say_wait
from ktrain.launcher.code import bucket


@click.command("gc")
@click.argument("run")
@click.option(
    "--keep",
    metavar="POLICY",
    help="Also remove what this policy gives up: 3, or latest:3,every_steps:1000,best:1:loss. [default: keep all]",
)
@DRY_RUN
@OUTPUT
def collect_garbage(run: str, keep: str | None, dry_run: bool, output: str) -> int:
    """Remove from RUN's bucket what nobody can use: uploads that were never committed, checkpoints off the line, and
    archives of code that none of its last launches used.

    RUN must not be live. Exit code 0: done; 3: nothing was removed, because something cannot be told.
    """
    policy = None if keep is None else parse(keep)
    catalog, timeouts = open_run(run), settings.timeouts()
    collector = Collector(catalog, timeouts=timeouts, grace_s=timeouts.storage_s)
    terms = Terms(policy, catalog.newest_epoch(), holds_run=True, set_aside=quarantine.read_marks(catalog).holds)
    if dry_run:
        plan = collector.plan(Seen.read(catalog), terms)
        old = _old_code(catalog, plan)
        _report(plan, Outcome(spared=list(plan.spared), doubts=plan.doubts), old, output, dry_run=True)
        return contract.EXIT_CORRUPT if plan.doubts or old.doubts else contract.EXIT_OK
    with held(catalog, run):
        _, plan = collector.plan_watched(terms, say_wait)
        outcome = collector.carry_out(plan, terms)
        old = bucket.Removal() if outcome.failure is not None else _old_code(catalog, plan)
        gone = bucket.remove(catalog.tier, old, deadline=_deadline())
    old = replace(old, records=tuple(record for record in old.records if record.sha256 in gone))
    _report(plan, outcome, old, output, dry_run=False)
    if outcome.failure is not None:
        raise outcome.failure
    return contract.EXIT_CORRUPT if plan.doubts or old.doubts else contract.EXIT_OK


def _old_code(catalog: RunCatalog, plan: Plan) -> bucket.Removal:
    """Archives that are to go; none where checkpoints stay because something cannot be told."""
    if plan.doubts:
        return bucket.Removal()
    return bucket.plan_removal(bucket.look(catalog.tier, deadline=_deadline()))


def _deadline() -> Deadline:
    return Deadline.after(settings.timeouts().start_s)


def _report(plan: Plan, outcome: Outcome, code: bucket.Removal, output: str, *, dry_run: bool) -> None:
    removed = list(plan.removals) if dry_run else outcome.removed
    if output == "json":
        value: dict[str, Any] = {
            "dry_run": dry_run,
            "removed": [removal.to_json() for removal in removed],
            "spared": [{"step": step, "reason": reason} for step, reason in outcome.spared],
            "waiting": [{"step": step, "epoch": epoch, "write_id": name} for step, epoch, name in plan.waiting],
            "code": list(code.digests),
            "doubts": [*plan.doubts, *code.doubts],
        }
        click.echo(json.dumps(value, indent=1))
        return
    for doubt in plan.doubts:
        click.echo(f"nothing is removed: {doubt}", err=True)
    for step, reason in outcome.spared:
        click.echo(f"stays: step {step}: {reason}")
    for step, epoch, name in plan.waiting:
        click.echo(f"stays for now: upload {name} of step {step} epoch {epoch}, until it was watched")
    for removal in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'}: {describe(removal)}")
    for doubt in code.doubts:
        click.echo(f"no code is removed: {doubt}", err=True)
    for digest in code.digests:
        click.echo(f"{'would remove' if dry_run else 'removed'}: code {digest}")
    if not removed and not code.digests and not plan.doubts and not code.doubts:
        click.echo("nothing to remove")


def describe(removal: Removal) -> str:
    """One line for a person."""
    said = removal.to_json()
    return f"step {said['step']} epoch {said['epoch']} ({said['write_id']}), {said['nbytes']} bytes, {said['why']}"

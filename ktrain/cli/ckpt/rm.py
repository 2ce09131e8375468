"""`ktrain ckpt rm`: remove a step from the bucket, or free what runs left in this machine's memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.collect import Collector, Plan
from ktrain.checkpoint.commit import prove
from ktrain.checkpoint.marks import pin_name, remove_mark
from ktrain.checkpoint.removal import Removal, Seen, Terms, is_plain, removal_of
from ktrain.cli.ckpt.base import DRY_RUN, OUTPUT, held, open_run, say_wait, volumes_of
from ktrain.cli.ckpt.gc import describe
from ktrain.errors import ConfigError, ConflictError, CorruptionError, KtrainError, NotFoundError
from ktrain.snapshot.volumes import remove_volume


@click.command("rm")
@click.argument("run", required=False)
@click.option("--step", type=int, help="Remove this step from the bucket.")
@click.option("--volume", is_flag=True, help="Remove from the memory volume of this machine.")
@click.option("--all", "everything", is_flag=True, help="With --volume: of every run that is not live.")
@click.option(
    "--force",
    type=click.Choice(["pinned", "last"]),
    multiple=True,
    help="Remove even a pinned step, or even the last step that can be proven.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@DRY_RUN
@OUTPUT
def remove(  # noqa: PLR0913 -- one parameter for each option
    run: str | None,
    step: int | None,
    volume: bool,
    everything: bool,
    force: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    output: str,
) -> int:
    """Remove a step of RUN from its bucket (--step), or what RUN left in this machine's memory (--volume)."""
    if volume == (step is not None):
        raise ConfigError("ckpt rm: expected RUN --step N for the bucket, or --volume for this machine's memory")
    if volume:
        return _free_volumes(run, everything, dry_run, output)
    if run is None or everything or step is None:
        raise ConfigError("ckpt rm --step: expected one RUN")
    catalog = open_run(run)
    removals = _plan(Seen.read(catalog), catalog, step, force, run)
    if not dry_run:
        _ask(removals, yes)
        with held(catalog, run):
            removals = _remove(catalog, step, force, run)
    if output == "json":
        click.echo(json.dumps({"dry_run": dry_run, "removed": [removal.to_json() for removal in removals]}, indent=1))
    else:
        for removal in removals:
            click.echo(f"{'would remove' if dry_run else 'removed'}: {describe(removal)}")
    return contract.EXIT_OK


def _plan(seen: Seen, catalog: RunCatalog, step: int, force: Collection[str], run: str) -> list[Removal]:
    """The records of this step, unless something speaks against it."""
    chosen = [commit for commit in seen.listing.commits if commit.identity.step == step]
    if not chosen:
        raise NotFoundError(f"run {run}: there is no checkpoint of step {step} in the bucket; see `ktrain ckpt ls`")
    if not all(map(is_plain, chosen)):
        raise ConfigError(f"run {run}: a record of step {step} names files of another checkpoint; nothing is removed")
    if step in seen.marks.pins and "pinned" not in force:
        raise ConfigError(f"run {run}: step {step} is pinned; unpin it (`ktrain ckpt pin --off`) or add --force pinned")
    if "last" not in force and not _another_is_proven(seen, catalog, step):
        raise CorruptionError(
            f"run {run}: no other step than {step} can be proven, so this is the last one; nothing is removed. To "
            "remove it all the same add --force last"
        )
    return [removal_of(commit, seen.listing, "asked for") for commit in chosen]


def _another_is_proven(seen: Seen, catalog: RunCatalog, step: int) -> bool:
    for commit in reversed([commit for commit in seen.line() if commit.identity.step != step]):
        try:
            prove(catalog, commit)
        except (CorruptionError, NotFoundError, ConfigError):
            continue
        return True
    return False


def _ask(removals: list[Removal], yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("ckpt rm --step: nobody can be asked here; add --yes, or --dry-run to see what would go")
    for removal in removals:
        click.echo(f"to be removed: {describe(removal)}", err=True)
    click.confirm("Remove?", abort=True, err=True)


def _remove(catalog: RunCatalog, step: int, force: Collection[str], run: str) -> list[Removal]:
    """Plans anew, now that nobody else runs and readers were watched until it is known whether they live."""
    collector = Collector(catalog, timeouts=settings.timeouts())
    terms = Terms(None, catalog.newest_epoch(), holds_run=True)
    seen, _ = collector.plan_watched(terms, say_wait)
    removals = _plan(seen, catalog, step, force, run)
    if step in seen.marks.pins:
        remove_mark(catalog, pin_name(step))
    outcome = collector.carry_out(Plan(removals=tuple(removals)), terms)
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.spared:
        raise ConflictError(f"run {run}: step {step} stays: {outcome.spared[0][1]}")
    return outcome.removed


def _free_volumes(run: str | None, everything: bool, dry_run: bool, output: str) -> int:
    if (run is None) != everything:
        raise ConfigError("ckpt rm --volume: expected RUN, or --all for every run that is not live")
    found = volumes_of(run)
    if not found:
        raise NotFoundError(f"volume {settings.volume_root()}: nothing of {run or 'any run'} is here")
    freed: list[dict[str, Any]] = []
    failures = []
    for info in found:
        if everything and info.live:
            continue
        try:
            nbytes = info.nbytes if dry_run else remove_volume(info)
            freed.append({"run": info.run, "node": info.node, "nbytes": nbytes})
        except KtrainError as error:
            failures.append(error)
    if output == "json":
        click.echo(json.dumps({"dry_run": dry_run, "freed": freed}, indent=1))
    else:
        total = sum(row["nbytes"] for row in freed)
        click.echo(f"{'would free' if dry_run else 'freed'} {total} bytes in {settings.volume_root()}")
    if failures:
        raise failures[0]
    return contract.EXIT_OK

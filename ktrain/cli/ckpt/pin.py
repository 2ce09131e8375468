"""`ktrain ckpt pin`: a step that stays whatever the policy says."""

from __future__ import annotations

import json

import click

from ktrain.base import contract, ids, settings
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.marks import pin_name, read_marks, remove_mark, write_mark
from ktrain.checkpoint.reading import await_collectors
from ktrain.cli.ckpt.base import DRY_RUN, OUTPUT, open_run
from ktrain.errors import NotFoundError


@click.command()
@click.argument("run")
@click.option("--step", type=int, required=True, help="The step to keep.")
@click.option("--off", is_flag=True, help="Take the pin away: the policy decides again.")
@DRY_RUN
@OUTPUT
def pin(run: str, step: int, off: bool, dry_run: bool, output: str) -> int:
    """Keep a checkpoint of RUN until it is unpinned. It does not count in the run's retention."""
    catalog = open_run(run)
    if off:
        _require_pinned(catalog, step, run)
    else:
        _require_committed(catalog, step, run)
    if not dry_run and off:
        remove_mark(catalog, pin_name(step))
    elif not dry_run:
        _pin(catalog, step, run)
    if output == "json":
        click.echo(json.dumps({"dry_run": dry_run, "step": step, "pinned": not off}))
    else:
        said = ("would not be" if off else "would be") if dry_run else ("is not" if off else "is")
        click.echo(f"step {step} {said} pinned{' any more' if off else ''}")
    return contract.EXIT_OK


def _pin(catalog: RunCatalog, step: int, run: str) -> None:
    """The mark first, then a look whether a collector came before it."""
    write_mark(catalog, pin_name(step), {"by": ids.process_name()})
    await_collectors(catalog, step, timeouts=settings.timeouts())
    try:
        _require_committed(catalog, step, run)
    except NotFoundError:
        remove_mark(catalog, pin_name(step))
        raise


def _require_pinned(catalog: RunCatalog, step: int, run: str) -> None:
    if step not in read_marks(catalog).pins:
        raise NotFoundError(f"run {run}: step {step} is not pinned")


def _require_committed(catalog: RunCatalog, step: int, run: str) -> None:
    if all(commit.identity.step != step for commit in catalog.listing().commits):
        raise NotFoundError(f"run {run}: there is no checkpoint of step {step} in the bucket; see `ktrain ckpt ls`")

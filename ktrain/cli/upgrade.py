"""`ktrain ckpt upgrade`: from now on a run is written in the newest format version."""

from __future__ import annotations

import json

import click

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.checkpoint import formats
from ktrain.cli.ckpt.base import DRY_RUN, OUTPUT, open_run
from ktrain.format import document


@click.command()
@click.argument("run")
@click.option("--confirm", is_flag=True, help="Do it; without this only what would be done is said.")
@DRY_RUN
@OUTPUT
def upgrade(run: str, confirm: bool, dry_run: bool, output: str) -> int:
    """Let RUN be written in the newest format from its next attempt on.

    A run keeps the format version it began with, so that an older ktrain can continue it. After the upgrade it cannot.
    Checkpoints that are there stay as they are.
    """
    timeouts = settings.timeouts()
    catalog = open_run(run)
    is_newest, does = catalog.format == document.FORMAT, confirm and not dry_run
    if does and not is_newest:
        formats.upgrade(catalog.tier, catalog.format, document.FORMAT, timeouts=timeouts, clock=SYSTEM_CLOCK)
    if output == "json":
        click.echo(json.dumps({"dry_run": not does, "format": catalog.format, "newest": document.FORMAT}))
    elif is_newest:
        click.echo(f"run {run}: it is written in format {catalog.format}, the newest of this ktrain; nothing to do")
    else:
        words = f"from format {catalog.format} to {document.FORMAT}; a ktrain that knows only {catalog.format}"
        if does:
            click.echo(f"run {run}: upgraded {words} cannot continue it any more")
        else:
            click.echo(f"run {run}: would be upgraded {words} could not continue it any more; say --confirm to do it")
    return contract.EXIT_OK

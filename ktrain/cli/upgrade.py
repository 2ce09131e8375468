"""`ktrain ckpt upgrade`: from now on a run is written in the newest format version."""

from __future__ import annotations

import click

from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.job import canonical_url
from ktrain.checkpoint import formats
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.format import document


@click.command()
@click.argument("run")
@click.option("--confirm", is_flag=True, help="Do it; without this only what would be done is said.")
def upgrade(run: str, confirm: bool) -> int:
    """Let RUN be written in the newest format from its next attempt on.

    A run keeps the format version it began with, so that an older ktrain can continue it. After the upgrade it cannot.
    Checkpoints that are there stay as they are.
    """
    timeouts = settings.timeouts()
    catalog = RunCatalog.open(canonical_url(run), timeouts=timeouts, create=False)
    if catalog.format == document.FORMAT:
        click.echo(f"run {run}: it is written in format {catalog.format}, the newest of this ktrain; nothing to do")
        return contract.EXIT_OK
    words = f"from format {catalog.format} to {document.FORMAT}; a ktrain that knows only {catalog.format}"
    if not confirm:
        click.echo(f"run {run}: would be upgraded {words} could not continue it any more; say --confirm to do it")
        return contract.EXIT_OK
    formats.upgrade(catalog.tier, catalog.format, document.FORMAT, timeouts=timeouts, clock=SYSTEM_CLOCK)
    click.echo(f"run {run}: upgraded {words} cannot continue it any more")
    return contract.EXIT_OK

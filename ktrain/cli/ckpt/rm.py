"""`ktrain ckpt rm`: free what runs left in this machine's memory."""

from __future__ import annotations

import click

from ktrain.base import contract, settings
from ktrain.cli.ckpt.base import volumes_of
from ktrain.errors import ConfigError, KtrainError, NotFoundError
from ktrain.snapshot.volumes import remove_volume


@click.command("rm")
@click.argument("run", required=False)
@click.option("--volume", is_flag=True, required=True, help="Remove from the memory volume of this machine.")
@click.option("--all", "everything", is_flag=True, help="Of every run that is not live.")
def remove(run: str | None, volume: bool, everything: bool) -> int:
    """Free what RUN (by URI or id) left in this machine's memory volume. The bucket is not touched."""
    del volume
    if (run is None) != everything:
        raise ConfigError("ckpt rm --volume: expected RUN, or --all for every run that is not live")
    found = volumes_of(run)
    if not found:
        raise NotFoundError(f"volume {settings.volume_root()}: nothing of {run or 'any run'} is here")
    freed, failures = 0, []
    for info in found:
        if everything and info.live:
            continue
        try:
            freed += remove_volume(info)
        except KtrainError as error:
            failures.append(error)
    click.echo(f"freed {freed} bytes in {settings.volume_root()}")
    if failures:
        raise failures[0]
    return contract.EXIT_OK

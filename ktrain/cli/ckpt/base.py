"""What the verbs of `ktrain ckpt` share: opening a run, rows and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.job import canonical_url, local_path
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.holder import Holder
from ktrain.checkpoint.removal import Seen
from ktrain.errors import KtrainError, NotFoundError
from ktrain.format.record import CommitRecord
from ktrain.snapshot.volumes import VolumeInfo, list_volumes

DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
OUTPUT = click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)


def open_run(run: str) -> RunCatalog:
    return RunCatalog.open(canonical_url(run), timeouts=settings.timeouts(), create=False)


@contextmanager
def held(catalog: RunCatalog, run: str) -> Iterator[None]:
    """Holds the run as its only user within the block.

    Raises:
        ConflictError: it is live; the message names the holder.
    """
    holder = Holder(catalog.tier, local_path=local_path(canonical_url(run)), timeouts=settings.timeouts())
    try:
        yield
    finally:
        holder.close()


def choose_commit(seen: Seen, step: int | None, run: str) -> CommitRecord:
    """The checkpoint of a step, of the line where there are several; without a step the newest of the line.

    Raises:
        NotFoundError: there is none.
    """
    line = seen.line()
    others = [commit for commit in seen.listing.commits if commit not in line]
    found = [commit for commit in (*others, *line) if step is None or commit.identity.step == step]
    if not found:
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise NotFoundError(f"run {run}: there is no {what} in the bucket; see `ktrain ckpt ls`")
    return found[-1]


def say_wait(seconds: float) -> None:
    """Says why nothing happens for a while."""
    click.echo(f"watching for {seconds:g} s whether anybody still writes or reads", err=True)


def warn_unprotected(failure: KtrainError | None) -> None:
    """Says that a collector may remove what is being read."""
    if failure is not None:
        click.echo(f"ktrain: nobody is told that this is read, so the run may remove it meanwhile: {failure}", err=True)


def commit_row(commit: CommitRecord) -> dict[str, Any]:
    return {
        "step": commit.identity.step,
        "epoch": commit.identity.epoch,
        "tier": contract.TIER_BUCKET,
        "committed": True,
        "ranks": len(commit.ranks),
        "nbytes": sum(files.nbytes for files in commit.ranks),
    }


def volumes_of(run: str | None) -> list[VolumeInfo]:
    found = list_volumes(settings.volume_root())
    if run is None:
        return found
    wanted = canonical_url(run)
    return [info for info in found if run == info.run or info.uri in (run, wanted)]


def show_rows(rows: Sequence[dict[str, Any]], output: str) -> None:
    """Rows as a table, or as a JSON array."""
    if output == "json":
        click.echo(json.dumps(list(rows), indent=1))
    else:
        print_rows(rows)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a table; its columns are the names in the order in which they are met."""
    if not rows:
        click.echo("nothing here")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[name.replace("nbytes", "bytes") for name in names]]
    cells += [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)

"""What the verbs of `ktrain ckpt` share: opening a run, rows and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.job import canonical_url
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.format.record import CommitRecord
from ktrain.snapshot.volumes import VolumeInfo, list_volumes

OUTPUT = click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)


def open_run(run: str) -> RunCatalog:
    return RunCatalog.open(canonical_url(run), timeouts=settings.timeouts(), create=False)


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
    if output == "json":
        click.echo(json.dumps(list(rows), indent=1))
        return
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

"""`ktrain ckpt show`: what one checkpoint holds."""

from __future__ import annotations

import json
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.checkpoint.describe import describe_commit
from ktrain.checkpoint.reading import reading
from ktrain.checkpoint.removal import Seen
from ktrain.cli.ckpt.base import OUTPUT, choose_commit, open_run, print_rows, warn_unprotected


@click.command()
@click.argument("run")
@click.option("--step", type=int, help="This step. [default: the newest of the line]")
@OUTPUT
def show(run: str, step: int | None, output: str) -> int:
    """Show what a checkpoint of RUN holds: identity, parts, tensors, bytes of each rank, metrics, pins."""
    catalog = open_run(run)
    step = choose_commit(Seen.read(catalog), step, run).identity.step
    with reading(catalog, step, timeouts=settings.timeouts()) as failure:
        warn_unprotected(failure)
        seen = Seen.read(catalog)
        found = describe_commit(catalog, seen, choose_commit(seen, step, run))
    if output == "json":
        click.echo(json.dumps(found, indent=1))
    else:
        _print(found)
    return contract.EXIT_OK


def _print(found: dict[str, Any]) -> None:
    said = [f"step {found['step']} epoch {found['epoch']} of run {found['run']}, {found['world_size']} ranks"]
    said.append(f"{found['nbytes']} bytes, plan {found['plan_digest']}, {found['record']}")
    said += ["off the line: never restored"] if not found["on_line"] else []
    said += ["pinned"] if found["pinned"] else []
    said += [f"read now by {who}" for who in found["readers"]]
    said += [f"{name}: {value:g}" for name, value in sorted(found["metrics"].items())]
    for line in said:
        click.echo(line)
    for title in ("parts", "tensors", "ranks"):
        rows = [{key: _plain(value) for key, value in row.items() if key != "origin"} for row in found[title]]
        click.echo(f"\n{title}:")
        print_rows(rows)


def _plain(value: Any) -> Any:
    return [f"{rank}:{nbytes}" for rank, nbytes in value.items()] if isinstance(value, dict) else value

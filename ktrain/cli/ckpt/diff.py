"""`ktrain ckpt diff`: in what two checkpoints differ."""

from __future__ import annotations

import json
from contextlib import ExitStack

import click

from ktrain.base import contract, settings
from ktrain.checkpoint.compare import Difference, Side, compare
from ktrain.checkpoint.reading import reading
from ktrain.checkpoint.removal import Seen
from ktrain.cli.ckpt.base import OUTPUT, choose_commit, open_run, warn_unprotected
from ktrain.errors import ConfigError


@click.command()
@click.argument("run")
@click.argument("other", required=False)
@click.option(
    "--step", "steps", type=int, multiple=True, help="Given twice: these two. Once, with OTHER: this step of both."
)
@OUTPUT
def diff(run: str, other: str | None, steps: tuple[int, ...], output: str) -> int:
    """Compare two checkpoints of RUN, or one of RUN (a) with one of OTHER (b): tensors, their form and their bytes.

    Digests decide where they can; bytes are read only where they cannot. Exit code 0: the same; 1: they differ;
    3: something could not be proven, so that nothing can be said of it.
    """
    if other is None and len(steps) != 2:
        raise ConfigError("ckpt diff: expected --step A --step B, or a second run to compare with")
    if len(steps) > 2:
        raise ConfigError(f"ckpt diff: expected two steps, found {len(steps)}")
    wanted: tuple[int | None, ...] = steps or (None,)
    with ExitStack() as stack:
        a = _open(run, wanted[0], stack)
        b = _open(other or run, wanted[-1], stack)
        found = compare(a, b)
    if output == "json":
        said = {
            side: {**each.commit.identity.to_json(), "write_id": each.commit.write_id}
            for side, each in (("a", a), ("b", b))
        }
        click.echo(json.dumps({**said, **found.to_json()}, indent=1))
    else:
        _print(found)
    if found.unproven:
        return contract.EXIT_CORRUPT
    return contract.EXIT_OK if found.is_empty() else contract.EXIT_FAILED


def _open(run: str, step: int | None, stack: ExitStack) -> Side:
    catalog = open_run(run)
    chosen = choose_commit(Seen.read(catalog), step, run).identity.step
    warn_unprotected(stack.enter_context(reading(catalog, chosen, timeouts=settings.timeouts())))
    return Side(catalog, choose_commit(Seen.read(catalog), chosen, run))


def _print(found: Difference) -> None:
    for row in found.removed:
        click.echo(f"- {row['name']}: {row['dtype']} {row['shape']}")
    for row in found.added:
        click.echo(f"+ {row['name']}: {row['dtype']} {row['shape']}")
    for row in found.changed:
        a, b = row["a"], row["b"]
        click.echo(f"! {row['name']}: {a['role']} {a['dtype']} {a['shape']} -> {b['role']} {b['dtype']} {b['shape']}")
    for name in found.differing:
        click.echo(f"~ {name}: other bytes")
    for name in found.objects:
        click.echo(f"~ {name}: other values that are no tensors")
    for name, reason in found.unproven.items():
        click.echo(f"? {name}: {reason}", err=True)
    click.echo(f"{len(found.equal)} tensors are equal; {found.nbytes_read} bytes were compared")

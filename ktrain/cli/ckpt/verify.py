"""`ktrain ckpt verify`: whether every byte of a run's checkpoints is proven."""

from __future__ import annotations

import json
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.reading import verify_read
from ktrain.cli.ckpt.base import OUTPUT, commit_row, open_run, warn_unprotected
from ktrain.errors import CorruptionError, NotFoundError
from ktrain.format.record import CommitRecord
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.slots import Held
from ktrain.snapshot.volumes import list_volumes


@click.command()
@click.argument("run")
@click.option("--step", type=int, help="Only this step.")
@click.option(
    "--tier", type=click.Choice([contract.TIER_MEMORY, contract.TIER_BUCKET]), help="Only this tier. [default: all]"
)
@OUTPUT
def verify(run: str, step: int | None, tier: str | None, output: str) -> int:
    """Read every byte of RUN's checkpoints and prove it. Exit code 0: all proven; 3: something is not."""
    catalog = open_run(run)
    proven: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    if tier in (None, contract.TIER_BUCKET):
        for row, findings in _verify_bucket(catalog, step):
            (bad if findings else proven).append({**row, "findings": findings})
    if tier in (None, contract.TIER_MEMORY):
        for row, findings in _verify_memory(catalog.run_id, step):
            (bad if findings else proven).append({**row, "findings": findings})
    if not proven and not bad:
        what = f"step {step}" if step is not None else "checkpoint"
        raise NotFoundError(f"run {run}: there is no {what} here to verify")
    if output == "json":
        click.echo(json.dumps({"proven": proven, "bad": bad}, indent=1))
    else:
        for row in proven:
            click.echo(f"proven: step {row['step']} epoch {row['epoch']} in {row['tier']}{row.get('where', '')}")
        for row in bad:
            for finding in row["findings"]:
                click.echo(f"BAD: step {row['step']} in {row['tier']}: {_describe(finding)}", err=True)
    return contract.EXIT_CORRUPT if bad else contract.EXIT_OK


def _describe(finding: dict[str, Any]) -> str:
    rank = f"rank {finding['rank']}, " if finding.get("rank") is not None else ""
    where = f", bytes {finding['begin']} to {finding['end']}" if finding.get("begin") is not None else ""
    return f"{rank}{finding['name']}{where}: {finding['reason']}"


def _verify_bucket(catalog: RunCatalog, step: int | None) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    listing = catalog.listing()
    results = []
    for commit in listing.commits:
        if step in (None, commit.identity.step):
            findings = _verify_commit(catalog, commit)
            if findings is not None:
                results.append(({**commit_row(commit)}, findings))
    for name, reason in listing.broken:
        if step is None or contract.step_dirname(step) in name:
            row = {"step": step, "epoch": None, "tier": contract.TIER_BUCKET}
            results.append((row, [{"rank": None, "name": name, "reason": reason}]))
    return results


def _verify_commit(catalog: RunCatalog, commit: CommitRecord) -> list[dict[str, Any]] | None:
    """What is not proven of one checkpoint; None when it was collected before it could be read."""
    found, failure = verify_read(catalog, commit, timeouts=settings.timeouts())
    warn_unprotected(failure)
    if found is None:
        click.echo(f"step {commit.identity.step} was collected meanwhile", err=True)
        return None
    return [
        {"rank": item.rank, "name": item.name, "reason": item.reason, "begin": item.begin, "end": item.end}
        for item in found
    ]


def _verify_memory(run_id: str, step: int | None) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    from ktrain.format.manifest import bad_ranges

    results = []
    for info in list_volumes(settings.volume_root()):
        wanted = [held for held in info.held if info.run == run_id and step in (None, held.identity.step)]
        if not wanted:
            continue
        volume = NodeVolume(settings.volume_root(), node=info.node, run=run_id)
        try:
            for held in wanted:
                row = {"step": held.identity.step, "epoch": held.identity.epoch, "tier": contract.TIER_MEMORY}
                row["where"] = f", rank {held.rank} on {info.node}"
                results.append((row, _verify_slot(volume, held, bad_ranges)))
        finally:
            volume.close()
    return results


def _verify_slot(volume: NodeVolume, held: Held, bad_ranges: Any) -> list[dict[str, Any]]:
    name = f"{volume.node}/{held.slot}"
    try:
        with volume.open(held.rank, held.identity) as slot:
            bad = bad_ranges(slot.manifest, slot.memory)
    except CorruptionError as error:
        return [{"rank": held.rank, "name": name, "reason": str(error)}]
    except NotFoundError:
        return []  # superseded while we looked
    reason = "bytes differ from the digest made at the snapshot"
    return [{"rank": held.rank, "name": name, "reason": reason, "begin": begin, "end": end} for begin, end in bad]

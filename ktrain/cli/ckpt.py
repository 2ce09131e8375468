"""`ktrain ckpt`: what is committed where, whether it is proven, and what was left in memory volumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.base.job import canonical_url
from ktrain.checkpoint.catalog import RunCatalog, verify_commit
from ktrain.cli import quarantine
from ktrain.errors import ConfigError, CorruptionError, KtrainError, NotFoundError
from ktrain.format.record import CommitRecord
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.slots import Held
from ktrain.snapshot.volumes import VolumeInfo, list_volumes, remove_volume

_OUTPUT = click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)


@click.group()
def ckpt() -> None:
    """List, verify and remove checkpoints."""


@ckpt.command("ls")
@click.argument("run", required=False)
@click.option("--volume", is_flag=True, help="List what lies in the memory volume of this machine, of any run.")
@_OUTPUT
def list_checkpoints(run: str | None, volume: bool, output: str) -> int:
    """One row per step and tier of RUN, committed or not."""
    if volume:
        _show(_volume_rows(_volumes_of(run)), output)
        return contract.EXIT_OK
    if run is None:
        raise ConfigError("ckpt ls: expected RUN, or --volume for what lies in this machine's memory")
    catalog = _open(run)
    listing = catalog.listing()
    rows = [_commit_row(commit) for commit in listing.commits]
    rows += [
        {"step": None, "tier": contract.TIER_BUCKET, "committed": False, "where": name, "reason": reason}
        for name, reason in listing.broken
    ]
    rows += _memory_rows(catalog.run_id)
    quarantine.note(catalog, rows)
    _show(
        sorted(rows, key=lambda row: (row["step"] is None, row["step"] or 0, contract.TIERS.index(row["tier"]))), output
    )
    return contract.EXIT_OK


def _open(run: str) -> RunCatalog:
    return RunCatalog.open(canonical_url(run), timeouts=settings.timeouts(), create=False)


def _commit_row(commit: CommitRecord) -> dict[str, Any]:
    return {
        "step": commit.identity.step,
        "epoch": commit.identity.epoch,
        "tier": contract.TIER_BUCKET,
        "committed": True,
        "ranks": len(commit.ranks),
        "nbytes": sum(files.nbytes for files in commit.ranks),
    }


def _held(run_id: str) -> list[tuple[str, Held]]:
    return [
        (info.node, held) for info in list_volumes(settings.volume_root()) if info.run == run_id for held in info.held
    ]


def _memory_rows(run_id: str) -> list[dict[str, Any]]:
    """Snapshots in this machine's volumes: committed in memory when every rank of the step is there."""
    by_identity: dict[tuple[int, int], list[tuple[str, Held]]] = {}
    for node, held in _held(run_id):
        by_identity.setdefault((held.identity.step, held.identity.epoch), []).append((node, held))
    rows = []
    for (step, epoch), copies in sorted(by_identity.items()):
        ranks = {held.rank for _, held in copies}
        rows.append(
            {
                "step": step,
                "epoch": epoch,
                "tier": contract.TIER_MEMORY,
                "committed": len(ranks) == copies[0][1].identity.world_size,
                "ranks": len(ranks),
                "copies": len(copies),
                "nodes": sorted({node for node, _ in copies}),
                "nbytes": sum(held.nbytes for _, held in copies),
            }
        )
    return rows


def _volumes_of(run: str | None) -> list[VolumeInfo]:
    found = list_volumes(settings.volume_root())
    if run is None:
        return found
    wanted = canonical_url(run)
    return [info for info in found if run == info.run or info.uri in (run, wanted)]


def _volume_rows(found: Sequence[VolumeInfo]) -> list[dict[str, Any]]:
    return [
        {
            "run": info.run,
            "uri": info.uri,
            "node": info.node,
            "steps": sorted({held.identity.step for held in info.held}),
            "nbytes": info.nbytes,
            "state": "live" if info.live else "left over",
        }
        for info in found
    ]


def _show(rows: Sequence[dict[str, Any]], output: str) -> None:
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


@ckpt.command()
@click.argument("run")
@click.option("--step", type=int, help="Only this step.")
@click.option(
    "--tier", type=click.Choice([contract.TIER_MEMORY, contract.TIER_BUCKET]), help="Only this tier. [default: all]"
)
@_OUTPUT
def verify(run: str, step: int | None, tier: str | None, output: str) -> int:
    """Read every byte of RUN's checkpoints and prove it. Exit code 0: all proven; 3: something is not."""
    catalog = _open(run)
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
        if step not in (None, commit.identity.step):
            continue
        findings = [
            {"rank": item.rank, "name": item.name, "reason": item.reason, "begin": item.begin, "end": item.end}
            for item in verify_commit(catalog, commit)
        ]
        results.append(({**_commit_row(commit)}, findings))
    for name, reason in listing.broken:
        if step is None or contract.step_dirname(step) in name:
            row = {"step": step, "epoch": None, "tier": contract.TIER_BUCKET}
            results.append((row, [{"rank": None, "name": name, "reason": reason}]))
    return results


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


@ckpt.command("rm")
@click.argument("run", required=False)
@click.option("--volume", is_flag=True, required=True, help="Remove from the memory volume of this machine.")
@click.option("--all", "everything", is_flag=True, help="Of every run that is not live.")
def remove(run: str | None, volume: bool, everything: bool) -> int:
    """Free what RUN (by URI or id) left in this machine's memory volume. The bucket is not touched."""
    del volume
    if (run is None) != everything:
        raise ConfigError("ckpt rm --volume: expected RUN, or --all for every run that is not live")
    found = _volumes_of(run)
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

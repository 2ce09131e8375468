"""`ktrain ckpt ls`: what is committed where, and what was left in memory volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ktrain.base import contract, settings
from ktrain.checkpoint.removal import Seen
from ktrain.cli import quarantine
from ktrain.cli.ckpt.base import OUTPUT, commit_row, open_run, show_rows, volumes_of
from ktrain.errors import ConfigError
from ktrain.snapshot.slots import Held
from ktrain.snapshot.volumes import VolumeInfo, list_volumes


@click.command("ls")
@click.argument("run", required=False)
@click.option("--volume", is_flag=True, help="List what lies in the memory volume of this machine, of any run.")
@OUTPUT
def list_checkpoints(run: str | None, volume: bool, output: str) -> int:
    """One row per step and tier of RUN, committed or not."""
    if volume:
        show_rows(_volume_rows(volumes_of(run)), output)
        return contract.EXIT_OK
    if run is None:
        raise ConfigError("ckpt ls: expected RUN, or --volume for what lies in this machine's memory")
    catalog = open_run(run)
    seen = Seen.read(catalog)
    listing, line = seen.listing, seen.line()
    rows = [
        {**commit_row(commit), "on_line": commit in line, "pinned": commit.identity.step in seen.marks.pins}
        for commit in listing.commits
    ]
    rows += [
        {"step": None, "tier": contract.TIER_BUCKET, "committed": False, "where": name, "reason": reason}
        for name, reason in listing.broken
    ]
    rows += _memory_rows(catalog.run_id)
    quarantine.note(catalog, rows)
    show_rows(
        sorted(rows, key=lambda row: (row["step"] is None, row["step"] or 0, contract.TIERS.index(row["tier"]))), output
    )
    return contract.EXIT_OK


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


def _held(run_id: str) -> list[tuple[str, Held]]:
    return [
        (info.node, held) for info in list_volumes(settings.volume_root()) if info.run == run_id for held in info.held
    ]


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

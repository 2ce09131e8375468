"""What a committed checkpoint holds, as one JSON value for people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ktrain.checkpoint.catalog import RunCatalog, commit_path
from ktrain.checkpoint.lineage import on_line
from ktrain.checkpoint.removal import Seen
from ktrain.format.manifest import Manifest
from ktrain.format.record import CommitRecord


def describe_commit(catalog: RunCatalog, seen: Seen, commit: CommitRecord) -> dict[str, Any]:
    """Identity, files, parts and tensors of a checkpoint; reads its manifests.

    Raises:
        CorruptionError, NotFoundError: a manifest is not the one that was committed.
    """
    identity = commit.identity
    manifests = [catalog.read_manifest(commit, files) for files in commit.ranks]
    return {
        **identity.to_json(),
        "write_id": commit.write_id,
        "record": commit_path(commit),
        "plan_digest": commit.plan_digest,
        "time": commit.time,
        "on_line": on_line(identity, seen.attempts),
        "pinned": identity.step in seen.marks.pins,
        "readers": [reader.who for reader in seen.marks.readers if reader.reads(identity.step)],
        "metrics": seen.metrics_of(commit),
        "nbytes": sum(files.nbytes for files in commit.ranks),
        "ranks": [
            {
                "rank": files.rank,
                "payload": files.payload,
                "nbytes": files.nbytes,
                "tensors": len(manifest.entries),
                "plan_digest": manifest.plan_digest,
                "origin": manifest.origin,
            }
            for files, manifest in zip(commit.ranks, manifests, strict=True)
        ],
        "parts": _parts(manifests),
        "tensors": tensors_of(manifests),
    }


def tensors_of(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """One row for each tensor, by name: what it is, and how many bytes of it each rank stores."""
    rows: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        for entry in manifest.entries:
            shard = entry.shard
            about = {"dtype": shard.dtype, "shape": list(shard.global_shape), "role": shard.role.value}
            row = rows.setdefault(shard.name, {"name": shard.name, **about, "nbytes": 0, "ranks": {}})
            row["nbytes"] += entry.end - entry.begin
            row["ranks"][str(manifest.rank)] = row["ranks"].get(str(manifest.rank), 0) + entry.end - entry.begin
    return [rows[name] for name in sorted(rows)]


def _parts(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """One row for each part, the name before the first "/"; parts without tensors are known from their objects."""
    rows: dict[str, dict[str, Any]] = {}

    def row_of(name: str) -> dict[str, Any]:
        return rows.setdefault(name, {"name": name, "kind": None, "tensors": set(), "nbytes": 0})

    for manifest in manifests:
        for name, about in manifest.objects.items():
            row_of(name)["kind"] = about.get("kind") if isinstance(about, Mapping) else None
        for entry in manifest.entries:
            row = row_of(entry.shard.name.partition("/")[0])
            row["tensors"].add(entry.shard.name)
            row["nbytes"] += entry.end - entry.begin
    return [{**rows[name], "tensors": len(rows[name]["tensors"])} for name in sorted(rows)]

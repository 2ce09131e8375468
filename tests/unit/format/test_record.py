"""Commit records, names, and the proof that manifests make a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError, CorruptionError
from ktrain.format import record
from ktrain.format.manifest import Manifest
from ktrain.format.record import CommitRecord, check_coverage, commit_name, parse_commit_name
from ktrain.format.shard import Box, Role, Shard
from tests.unit.format.builders import checkpoint, shard, snapshot, with_identity


def commit() -> CommitRecord:
    return CommitRecord.from_bytes(checkpoint()[commit_name(10, 2, "0a1b2c")])


def manifests(*ranks: Sequence[Shard]) -> list[Manifest]:
    return [snapshot(shards, rank=rank, world_size=len(ranks)).manifest for rank, shards in enumerate(ranks)]


def rows(begin: int, end: int, **options: object) -> Shard:
    return shard("w", (4, 3), box=Box((begin, 0), (end - begin, 3)), **options)  # type: ignore[arg-type]


def test_record_comes_back_equal() -> None:
    assert CommitRecord.from_bytes(commit().to_bytes()) == commit()
    assert commit().time == 1767225600.5


def test_record_names_the_digests_of_the_files_beside_it() -> None:
    files = checkpoint()
    for row in commit().ranks:
        manifest = Manifest.from_bytes(files[row.manifest])
        assert manifest.rank == row.rank
        assert manifest.digest() == row.manifest_digest
        assert manifest.payload_digest() == row.payload_digest
        assert (len(files[row.manifest]), len(files[row.payload])) == (row.manifest_nbytes, row.nbytes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"write_id": "A-1"}, "write_id"),
        ({"plan_digest": "0"}, "plan_digest"),
        ({"ranks": ()}, "ranks 0 to 1"),
        ({"ranks": commit().ranks[::-1]}, "ranks 0 to 1"),
        ({"time": 1e300}, "time"),
        ({"time": "now"}, "time"),
        ({"origin": []}, "origin"),
    ],
)
def test_from_bytes_record_that_cannot_be_is_corruption(change: dict[str, object], match: str) -> None:
    with pytest.raises(CorruptionError, match=match):
        CommitRecord.from_bytes(replace(commit(), **change).to_bytes())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "checkpoints/../../x",
        "/checkpoints/x",
        "checkpoints//x",
        "checkpoints/.hidden",
        "s3://bucket/checkpoints/x",
        "checkpoints/a\\b",
        "checkpoints/a\n",
        "checkpoints/" + "a" * 2000,
        "",
    ],
)
def test_from_bytes_record_with_a_name_outside_the_checkpoints_is_corruption(name: str) -> None:
    first, second = commit().ranks
    for bad in (replace(second, payload=name), replace(second, manifest=name)):
        with pytest.raises(CorruptionError, match="expected a name below checkpoints/"):
            CommitRecord.from_bytes(replace(commit(), ranks=(first, bad)).to_bytes())


def test_names_are_those_of_the_format() -> None:
    assert commit_name(10, 2, "0a1b2c") == "checkpoints/step-00000010/commit-000002-0a1b2c.json"
    assert (
        record.payload_name(10, 2, "0a1b2c", 3) == "checkpoints/step-00000010/data-000002-0a1b2c/rank-00003.safetensors"
    )
    assert record.manifest_name(10, 2, "0a1b2c", 3) == "checkpoints/step-00000010/data-000002-0a1b2c/rank-00003.json"


@given(st.integers(0, 10**10), st.integers(0, 10**7), st.from_regex("[0-9a-z]{1,64}", fullmatch=True))
def test_parse_commit_name_any_commit_comes_back(step: int, epoch: int, write_id: str) -> None:
    assert parse_commit_name(commit_name(step, epoch, write_id)) == (step, epoch, write_id)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/step-00000010/data-000002-0a1b2c/rank-00003.json",
        "checkpoints/step-00000010/commit-000002-0a1b2c.json.tmp",
        "checkpoints/step-10/commit-000002-0a1b2c.json",
        "checkpoints/step-000000010/commit-000002-0a1b2c.json",
        "checkpoints/step-00000010/commit-2-0a1b2c.json",
        "checkpoints/step-00000010/commit-000002-.json",
        "checkpoints/step-00000010/commit-000002-A.json",
        "checkpoints/step-0000001\u0660/commit-000002-0a1b2c.json",
        "x/checkpoints/step-00000010/commit-000002-0a1b2c.json",
        "checkpoints/step-00000010/commit-000002-0a1b2c.json\n",
    ],
)
def test_parse_commit_name_other_name_is_none(name: str) -> None:
    assert parse_commit_name(name) is None


def test_commit_name_write_id_that_walks_is_refused() -> None:
    with pytest.raises(ConfigError, match="write id"):
        commit_name(1, 1, "../a")


@given(st.data())
def test_check_coverage_tensor_cut_anyhow_passes_until_a_piece_is_lost(data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, 7), max_size=4)) | {0, 8})
    pieces = [
        shard("w", (8, 2), box=Box((a, column), (b - a, 1)))
        for a, b in zip(cuts, cuts[1:], strict=False)
        for column in range(2)
    ]
    world_size = data.draw(st.integers(1, 4))
    owners = [data.draw(st.integers(0, world_size - 1)) for _ in pieces]
    extra = shard("w", (8, 2), box=Box((1, 0), (3, 2)))

    def held(kept: Sequence[Shard]) -> list[Manifest]:
        return manifests(*([p for p, o in zip(kept, owners, strict=True) if o == rank] for rank in range(world_size)))

    check_coverage(held(pieces))
    lost = data.draw(st.integers(0, len(pieces) - 1))
    broken = [*pieces[:lost], shard("other", (1,)), *pieces[lost + 1 :]]
    with pytest.raises(CorruptionError, match="'w'.*no rank holds"):
        check_coverage(held(broken))
    check_coverage([*held(pieces)[:-1], _with(held(pieces)[-1], extra)])


def _with(manifest: Manifest, extra: Shard) -> Manifest:
    shards = [*(entry.shard for entry in manifest.entries), extra]
    return snapshot(shards, rank=manifest.rank, world_size=manifest.identity.world_size).manifest


def test_check_coverage_names_the_box_that_nobody_holds() -> None:
    with pytest.raises(
        CorruptionError, match=r"step 10 .*'w'.*no rank holds 3 items.*offsets \(2, 0\) lengths \(1, 3\)"
    ):
        check_coverage(manifests([rows(0, 2)], [rows(3, 4)]))


def test_check_coverage_each_ranks_own_value_must_be_whole_on_its_rank() -> None:
    own = [shard("rng", (k + 1,), role=Role.RANK) for k in range(2)]
    check_coverage(manifests(*([each] for each in own)))
    with pytest.raises(CorruptionError, match="'w'"):
        check_coverage(manifests([rows(0, 2, role=Role.RANK)], [rows(2, 4, role=Role.RANK)]))


def test_check_coverage_tensors_without_items_need_no_box() -> None:
    check_coverage(manifests([shard("w", (0, 3), box=Box((0, 0), (0, 2)))]))


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"role": Role.REPLICATED}])
def test_check_coverage_ranks_that_disagree_about_a_tensor_are_corruption(other: dict[str, object]) -> None:
    with pytest.raises(CorruptionError, match="'w': expected sharded float32"):
        check_coverage(manifests([rows(0, 2)], [rows(2, 4, **other)]))


def test_check_coverage_missing_or_doubled_rank_is_corruption() -> None:
    both = manifests([rows(0, 4)], [])
    check_coverage(both)
    with pytest.raises(CorruptionError, match=r"lacking \[1\]"):
        check_coverage(both[:1])
    with pytest.raises(CorruptionError, match="each of 2 ranks once"):
        check_coverage([*both, both[0]])
    with pytest.raises(CorruptionError, match="found none"):
        check_coverage([])


@pytest.mark.parametrize("change", [{"step": 11}, {"epoch": 3}, {"world_size": 3}, {"run": "other"}])
def test_check_coverage_another_identity_is_corruption(change: dict[str, object]) -> None:
    first, second = manifests([rows(0, 4)], [])
    with pytest.raises(CorruptionError, match="rank 1 has"):
        check_coverage([first, with_identity(second, **change)])

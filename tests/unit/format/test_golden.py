"""Old bytes stay readable: a small checkpoint of the format is read, and written alike, by today's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load

from ktrain.format import dtype as dtypes
from ktrain.format.manifest import Manifest, verify_payload
from ktrain.format.objects import decode
from ktrain.format.payload import check_header
from ktrain.format.record import (
    CommitRecord,
    check_coverage,
    commit_name,
    manifest_name,
    parse_commit_name,
    payload_name,
)
from ktrain.format.shard import Box, Role
from tests.unit.format.builders import checkpoint, oracle_crc64

GOLDEN = Path(__file__).parents[2] / "golden" / "format-1"


def golden() -> dict[str, bytes]:
    return {path.relative_to(GOLDEN).as_posix(): path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()}


def test_format_1_todays_code_writes_the_same_bytes() -> None:
    assert checkpoint() == golden()


def test_format_1_commit_record_leads_to_proven_payloads() -> None:
    files = golden()
    (name,) = [name for name in files if parse_commit_name(name)]
    commit = CommitRecord.from_bytes(files[name])
    manifests = [Manifest.from_bytes(files[row.manifest]) for row in commit.ranks]
    check_coverage(manifests)
    for row, manifest in zip(commit.ranks, manifests, strict=True):
        payload = files[row.payload]
        verify_payload(manifest, payload)
        check_header(manifest.entries, payload)
        assert f"{oracle_crc64(payload):016x}" == row.payload_digest
        assert f"{oracle_crc64(files[row.manifest]):016x}" == row.manifest_digest


def test_format_1_manifest_says_what_was_stored() -> None:
    manifest = Manifest.from_bytes(golden()["checkpoints/step-00000010/data-000002-0a1b2c/rank-00001.json"])
    assert [(e.key, e.shard.name, e.shard.box, e.shard.role, e.begin, e.end) for e in manifest.entries] == [
        ("model/phase", "model/phase", Box((0,), (2,)), Role.RANK, 4096, 4112),
        ("model/weight", "model/weight", Box((2, 0), (2, 2)), Role.SHARDED, 4112, 4128),
        ("model/weight#1", "model/weight", Box((0, 1), (1, 1)), Role.SHARDED, 4128, 4132),
        ("model/mask", "model/mask", Box((0,), (3,)), Role.RANK, 4132, 4135),
    ]
    first = Manifest.from_bytes(golden()["checkpoints/step-00000010/data-000002-0a1b2c/rank-00000.json"])
    assert decode(first.objects, tensor=str) == {"optimizer": {"lr": 0.5, "betas": (0.9, 0.999)}}


def test_format_1_payload_is_opened_by_safetensors_for_torch() -> None:
    payload = golden()["checkpoints/step-00000010/data-000002-0a1b2c/rank-00000.safetensors"]
    tensors = load(payload)
    assert tensors["model/weight"].shape == (2, 2)
    assert tensors["model/bias"].dtype == torch.bfloat16
    assert tensors["model/phase"].view(torch.complex64).flatten().shape == (2,)
    assert len(safetensors.deserialize(payload)) == 4


def test_format_page_reader_reads_what_our_reader_reads() -> None:
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text("ascii")
    program = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(program, "docs/format.md", "exec"), names)
    found = list(names["read_checkpoint"](GOLDEN, commit_name(10, 2, "0a1b2c")))
    expected = []
    for rank in range(2):
        payload = golden()[payload_name(10, 2, "0a1b2c", rank)]
        for entry in Manifest.from_bytes(golden()[manifest_name(10, 2, "0a1b2c", rank)]).entries:
            shard, data = entry.shard, payload[entry.begin : entry.end]
            sizes = [list(row) for row in (shard.global_shape, shard.box.offsets, shard.box.lengths)]
            expected.append((rank, shard.name, shard.dtype, *sizes, data))
    assert found == expected
    assert len(found) == 8


def test_format_page_names_every_dtype_that_headers_have() -> None:
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text("ascii")
    listed = page.split("the header names `")[1].split("`")[0].split()
    assert set(listed) == {dtypes.safetensors_dtype(name) for name in dtypes._DTYPES}


def test_format_page_item_sizes_are_ours() -> None:
    page = (Path(__file__).parents[3] / "docs" / "format.md").read_text("ascii")
    table = page.split("ITEM = ")[1].split("}")[0] + "}"
    assert json.loads(table) == {name: size for name, (size, _) in dtypes._DTYPES.items() if size > 1}

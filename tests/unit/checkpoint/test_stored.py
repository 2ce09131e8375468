"""Tensors out of a committed checkpoint's payloads: joined from boxes, read by ranges, proven."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktrain import native
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.drain import Drain
from ktrain.checkpoint.stored import (
    ProvenRanges,
    StoredCheckpoint,
    assemble,
    choose_commit,
    ranges_of,
    span,
    strides_of,
)
from ktrain.errors import CorruptionError, NotFoundError
from ktrain.format import record as records
from ktrain.format.digest import join_digests
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import lay_out
from ktrain.format.record import CommitRecord, RankFiles
from ktrain.format.shard import Box, Role, Shard
from ktrain.testing.fake_bucket import FakeBucket
from tests.unit.checkpoint.builders import RUN, catalog, deadline

CHUNK = 256  # small, so that small payloads have many


def commit(bucket: FakeBucket, ranks: Sequence[dict[Shard, numpy.ndarray]], objects: Sequence[dict] = ()) -> RunCatalog:
    """A committed checkpoint of what each rank holds."""
    step, at = 1, Identity(RUN, 1, 1, len(ranks))
    drain = Drain(at, 0.0)
    files = []
    for rank, held in enumerate(ranks):
        layout = lay_out(list(held))
        payload = bytearray(layout.header) + bytearray(layout.nbytes - len(layout.header))
        for entry in layout.entries:
            payload[entry.begin : entry.end] = numpy.ascontiguousarray(held[entry.shard]).tobytes()
        chunks = tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK))
        plan = f"{rank:016x}"
        about = objects[rank] if objects else {}
        manifest = Manifest(at, rank, plan, layout.nbytes, CHUNK, chunks, layout.entries, about, {})
        data, names = manifest.to_bytes(), (step, 1, drain.write_id, rank)
        bucket.write(records.payload_name(*names), payload, deadline=deadline())
        bucket.write(records.manifest_name(*names), data, deadline=deadline())
        proof = (layout.nbytes, manifest.payload_digest(), records.manifest_name(*names), len(data), manifest.digest())
        files.append(RankFiles(rank, records.payload_name(*names), *proof))
    made = catalog(bucket)
    plan = join_digests([f"{rank:016x}" for rank in range(len(ranks))])
    made.write_commit(CommitRecord(at, drain.write_id, plan, tuple(files), 0.0, {}))
    return made


def piece(name: str, whole: numpy.ndarray, box: Box, role: Role = Role.SHARDED) -> tuple[Shard, numpy.ndarray]:
    where = tuple(slice(at, at + length) for at, length in zip(box.offsets, box.lengths, strict=True))
    return Shard(name, str(whole.dtype), whole.shape, box, role), whole[where]


def opened(made: RunCatalog) -> StoredCheckpoint:
    return StoredCheckpoint.of(made, choose_commit(made, None))


def read_all(stored: StoredCheckpoint, prefix: str = "") -> dict[str, bytes]:
    tensors = stored.tensors(prefix)
    with ProvenRanges(stored, ranges_of(tensors)) as proven:
        return {tensor.name: assemble(tensor, proven).tobytes() for tensor in tensors}


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[dict[str, numpy.ndarray], list[dict[Shard, numpy.ndarray]]]:
    """Tensors, and ranks that hold grids of boxes of them, some several times."""
    num_ranks = draw(st.integers(1, 4))
    ranks: list[dict[Shard, numpy.ndarray]] = [{} for _ in range(num_ranks)]
    wholes = {}
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        dtype = draw(st.sampled_from(["float32", "int64", "uint8", "float16"]))
        whole = numpy.arange(numpy.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        wholes[f"t{index}"] = whole
        cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
        boxes = [Box((), ())]
        for edges in cuts:
            steps = list(zip(edges, edges[1:], strict=False)) or [(0, 0)]
            boxes = [Box((*box.offsets, low), (*box.lengths, high - low)) for box in boxes for low, high in steps]
        for box in boxes:
            for rank in draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)):
                shard, data = piece(f"t{index}", whole, box)
                ranks[rank][shard] = data
    return wholes, ranks


@given(cut_tensors())
@settings(max_examples=60)
def test_assemble_of_any_boxes_gives_the_whole_tensors(cut: tuple[dict[str, numpy.ndarray], list]) -> None:
    wholes, ranks = cut
    stored = opened(commit(FakeBucket(), ranks))

    assert read_all(stored) == {name: whole.tobytes() for name, whole in wholes.items()}


@given(st.data())
@settings(max_examples=60)
def test_span_holds_every_item_of_its_box_where_strides_say(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    lengths = tuple(data.draw(st.integers(1, size - at)) for size, at in zip(shape, offsets, strict=True))
    whole = numpy.arange(numpy.prod(shape), dtype="int32").reshape(shape)
    shard, _ = piece("a", whole, Box.whole(shape))
    (entry,) = lay_out([shard]).entries

    begin, end = span(entry, Box(offsets, lengths))

    flat = whole.reshape(-1)[(begin - entry.begin) // 4 : (end - entry.begin) // 4]
    strides = tuple(4 * stride for stride in strides_of(shape))
    found = numpy.lib.stride_tricks.as_strided(flat, lengths, strides)
    where = tuple(slice(at, at + length) for at, length in zip(offsets, lengths, strict=True))
    assert (found == whole[where]).all() and flat[-1] == whole[where].reshape(-1)[-1]


def test_tensors_of_a_rank_alone_are_those_of_the_lowest_rank() -> None:
    ranks = [dict([piece("part/own", numpy.full(2, rank, "int64"), Box.whole((2,)), Role.RANK)]) for rank in range(3)]
    stored = opened(commit(FakeBucket(), ranks))

    assert read_all(stored, "part/") == {"own": numpy.zeros(2, "int64").tobytes()}


def test_ranges_of_many_ranks_are_read_once_each() -> None:
    """Tensors that lie across all ranks, more of these than windows of the full size would fit."""
    num_ranks = 80
    whole = numpy.arange(num_ranks * 3000, dtype="int64").reshape(num_ranks, 3000)
    ranks: list[dict[Shard, numpy.ndarray]] = [{} for _ in range(num_ranks)]
    for name in ("a", "b", "c"):
        for rank in range(num_ranks):
            shard, data = piece(name, whole, Box((rank, 0), (1, 3000)))
            ranks[rank][shard] = data
    stored = opened(commit(FakeBucket(), ranks))
    tensors = stored.tensors("")

    with ProvenRanges(stored, ranges_of(tensors)) as proven:
        for tensor in tensors:
            assert assemble(tensor, proven).tobytes() == whole.tobytes()
        assert proven.read_nbytes <= 1.1 * 3 * whole.nbytes


def test_changed_byte_is_found_only_by_who_needs_it() -> None:
    bucket = FakeBucket()
    values = numpy.arange(1000, dtype="int64")
    made = commit(bucket, [dict([piece("a", values, Box.whole((1000,))), piece("b", values, Box.whole((1000,)))])])
    (name,) = (name for name in bucket.objects if name.endswith(".safetensors"))
    data = bytearray(bucket.objects[name])
    data[-5] ^= 4
    bucket.objects[name] = bytes(data)
    stored = opened(made)

    assert read_all(stored, "a") == {"": values.tobytes()}
    end = len(data)
    with pytest.raises(CorruptionError, match=rf"rank 0, .*: bytes {(end - 1) // CHUNK * CHUNK} to {end} differ"):
        read_all(stored, "b")


def test_payload_that_is_gone_is_not_found() -> None:
    bucket = FakeBucket()
    made = commit(bucket, [dict([piece("a", numpy.ones(4), Box.whole((4,)))])])
    stored = opened(made)
    for name in [name for name in bucket.objects if name.endswith(".safetensors")]:
        del bucket.objects[name]

    with pytest.raises(NotFoundError):
        read_all(stored)


def test_tensor_that_no_rank_holds_whole_is_corruption() -> None:
    values = numpy.ones((4, 2), "float32")
    stored = opened(commit(FakeBucket(), [dict([piece("a", values, Box((0, 0), (3, 2)))])]))

    with pytest.raises(CorruptionError, match=r"'a': no rank stored the items from \(3, 0\)"):
        stored.tensors("")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_folder_of_a_pipelines_stages_has_every_stages_parameters(tmp_path: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    from ktrain.exchange.torch_write import write_dcp

    ranks, abouts = [], []
    for stage in range(2):
        values = numpy.full(3, stage, "float32")
        names = (f"model/s{stage}", f"opt/model.s{stage}/m")
        ranks.append(dict(piece(name, values + at, Box.whole((3,)), Role.RANK) for at, name in enumerate(names)))
        group = {"lr": 0.5, "params": [f"model.s{stage}"]}
        optimizer = {"kind": "optimizer", "groups": [group], "keys": [["m"]], "state": {f"model.s{stage}": 0}}
        module = {"kind": "module", "keys": [f"s{stage}"], "aliases": {}, "extra": {}}
        abouts.append({"model": module, "opt": {**optimizer, "values": {}, "other": {"x": 1}}})
    stored = opened(commit(FakeBucket(), ranks, abouts))

    _, tensors, left_out = write_dcp(stored, None, tmp_path)

    moments = {f"s{stage}": {"m": torch.zeros(3)} for stage in range(2)}
    found = {
        "model": {f"s{stage}": torch.zeros(3) for stage in range(2)},
        "opt": {"state": moments, "param_groups": [{"lr": 0.0, "params": []}]},
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    assert [found["model"][f"s{stage}"][0] for stage in range(2)] == [0, 1]
    assert [moments[f"s{stage}"]["m"][0] for stage in range(2)] == [1, 2]
    assert found["opt"]["param_groups"] == [{"lr": 0.5, "params": ["s0", "s1"]}]
    assert (len(tensors), left_out) == (4, ["opt/x"])

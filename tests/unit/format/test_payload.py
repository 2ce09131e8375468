"""Payloads: the form, its order and alignment, and foreign readers."""

from __future__ import annotations

import json

import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError, CorruptionError
from ktrain.format import dtype as dtypes
from ktrain.format.payload import BORDER_NBYTES, check_header, lay_out, read_header, shard_nbytes
from ktrain.format.shard import Box, Role, Shard
from tests.unit.format.builders import fill, shard

DTYPES = list(dtypes._DTYPES)
SHARDS = st.builds(
    lambda name, dtype, shape: shard(name, shape, dtype=dtype),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
    | st.sampled_from(["a", "a#1", "a#2"]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)


@given(st.lists(SHARDS, max_size=12))
def test_lay_out_any_shards_leaves_no_hole_and_aligns_each(shards: list[Shard]) -> None:
    layout = lay_out(shards)
    place = len(layout.header)
    assert place % BORDER_NBYTES == 0
    for entry in layout.entries:
        assert entry.begin == place
        assert entry.begin % dtypes.item_nbytes(entry.shard.dtype) == 0
        assert entry.end == entry.begin + shard_nbytes(entry.shard)
        place = entry.end
    assert layout.nbytes == place


@given(st.lists(SHARDS, max_size=12))
def test_lay_out_any_shards_is_opened_by_safetensors_as_read_by_us(shards: list[Shard]) -> None:
    layout = lay_out(shards)
    payload = fill(layout)
    theirs = dict(safetensors.deserialize(payload))
    assert len(theirs) == len(shards)
    header = read_header(payload)
    check_header(layout.entries, payload)
    for ours in header.entries:
        assert theirs[ours.key]["shape"] == list(ours.shape)
        assert theirs[ours.key]["dtype"] == ours.dtype
        assert bytes(theirs[ours.key]["data"]) == payload[ours.begin : ours.end]


@given(st.lists(SHARDS, max_size=12))
def test_lay_out_any_shards_keeps_every_shard_under_its_own_key(shards: list[Shard]) -> None:
    layout = lay_out(shards)
    assert sorted(map(repr, shards)) == sorted(repr(entry.shard) for entry in layout.entries)
    assert len({entry.key for entry in layout.entries}) == len(shards)
    named = {entry.key for entry in layout.entries if entry.key == entry.shard.name}
    assert named == {each.name for each in shards}
    assert lay_out(shards) == layout


def test_lay_out_laid_out_entries_again_gives_the_same_bytes() -> None:
    first = lay_out([shard("a", (3,), dtype=dtype) for dtype in DTYPES])
    assert lay_out([entry.shard for entry in first.entries]) == first


def test_lay_out_no_shards_is_a_header_alone() -> None:
    layout = lay_out([])
    assert layout.nbytes == len(layout.header) == BORDER_NBYTES
    assert safetensors.deserialize(layout.header) == []


def test_lay_out_further_box_of_a_name_gets_a_numbered_key() -> None:
    halves = [shard("w", (4,), box=Box((offset,), (2,))) for offset in (0, 2)]
    keys = [entry.key for entry in lay_out([*halves, shard("w#1", (1,))]).entries]
    assert keys == ["w", "w#2", "w#1"]


def test_lay_out_many_tensors_moves_data_to_a_later_border() -> None:
    layout = lay_out([shard(f"layer.{k}", (1,)) for k in range(200)])
    assert len(layout.header) == 4 * BORDER_NBYTES
    assert read_header(layout.header).entries[-1].end == layout.nbytes


def test_lay_out_dtype_that_safetensors_lacks_is_bytes_with_a_last_dimension() -> None:
    layout = lay_out([shard("phase", (3, 2), dtype="complex64")])
    array = safetensors.numpy.load(fill(layout))["phase"]
    assert array.dtype == "uint8"
    assert array.shape == (3, 2, 8)


@pytest.mark.parametrize("name", ["", "__metadata__", "x" * 5000, "\ud800"])
def test_lay_out_name_that_cannot_be_a_key_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a name"):
        lay_out([shard(name, (1,))])


def test_lay_out_box_beyond_its_tensor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'w'.*shape \(4,\).*offsets \(3,\) lengths \(2,\)"):
        lay_out([shard("w", (4,), box=Box((3,), (2,)))])


def test_lay_out_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'w'.*'quint8'"):
        lay_out([Shard("w", "quint8", (1,), Box.whole((1,)), Role.RANK)])


def test_check_header_other_tensor_in_the_payload_is_corruption() -> None:
    ours, other = lay_out([shard("w", (2, 3))]), lay_out([shard("w", (3, 2))])
    with pytest.raises(CorruptionError, match="'w'"):
        check_header(ours.entries, other.header)


def test_read_header_names_its_metadata_for_readers_made_for_torch() -> None:
    header = read_header(lay_out([]).header)
    assert header.metadata == {"format": "pt", "ktrain": "1"}
    assert json.loads(lay_out([]).header[8:]) == {"__metadata__": header.metadata}

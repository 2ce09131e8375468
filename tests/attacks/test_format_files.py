"""Files that somebody made on purpose: each is refused as corruption, in bounded time, and nothing breaks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError, CorruptionError
from ktrain.format.digest import digest_text
from ktrain.format.manifest import Manifest, verify_payload
from ktrain.format.payload import header_nbytes, read_header
from ktrain.format.record import CommitRecord
from ktrain.format.shard import Box
from tests.unit.format.builders import checkpoint, shard, snapshot


def header(members: Any, *, length: int | None = None) -> bytes:
    text = members if isinstance(members, bytes) else json.dumps(members).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def tensor(begin: int, end: int, *, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS = {
    "empty file": b"",
    "cut length": b"\x10\0\0",
    "length of nothing": header(b""),
    "length beyond the file": header({}, length=50),
    "length beyond the limit": header({}, length=10**9),
    "length of all ones": header({}, length=2**64 - 1),
    "no JSON": header(b"{nothing"),
    "no object": header([1]),
    "leading space": header(b"  {}"),
    "not UTF-8": header(b'{"\xff":1}'),
    "NaN": header(b'{"a":NaN}'),
    "endless nesting": header(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "endless number": header(b'{"a":' + b"9" * 100_000 + b"}"),
    "name twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 1)).encode(),) * 2)),
    "metadata of numbers": header({"__metadata__": {"a": 1}}),
    "metadata of text": header({"__metadata__": "a"}),
    "tensor of text": header({"a": "b"}),
    "tensor without offsets": header({"a": {"dtype": "U8", "shape": [1]}}),
    "tensor with more": header({"a": tensor(0, 1) | {"code": "os.system"}}),
    "unknown dtype": header({"a": tensor(0, 1, dtype="OBJECT")}),
    "dtype that is no text": header({"a": tensor(0, 1, dtype=["U8"])}),
    "negative shape": header({"a": tensor(0, 1, shape=[-1, -1])}),
    "shape of fractions": header({"a": tensor(0, 1, shape=[1.0])}),
    "shape of truths": header({"a": tensor(0, 1, shape=[True])}),
    "shape of too many dimensions": header({"a": tensor(0, 1, shape=[1] * 1000)}),
    "shape that overflows": header({"a": tensor(0, 0, shape=[2**32, 2**32])}),
    "size beyond 63 bits": header({"a": tensor(0, 2**64)}),
    "offsets backwards": header({"a": tensor(1, 0, shape=[0])}),
    "three offsets": header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}),
    "negative offsets": header({"a": tensor(-1, 0)}),
    "hole": header({"a": tensor(0, 4), "b": tensor(5, 8)}),
    "hole at the begin": header({"a": tensor(4, 8)}),
    "overlap": header({"a": tensor(0, 4), "b": tensor(3, 8)}),
    "one place twice": header({"a": tensor(0, 4), "b": tensor(0, 4)}),
    "shape without the bytes": header({"a": tensor(0, 4, dtype="F32", shape=[4])}),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_read_header_crafted_header_is_corruption(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="payload header: .*; take another copy"):
        read_header(data)


def test_header_nbytes_of_a_wild_length_reads_nothing_of_that_size() -> None:
    with pytest.raises(CorruptionError, match="found a length of 18446744073709551615"):
        header_nbytes(b"\xff" * 8)


@given(st.binary(max_size=200))
def test_readers_given_random_bytes_say_corruption(data: bytes) -> None:
    for read in (read_header, Manifest.from_bytes, CommitRecord.from_bytes):
        with pytest.raises(CorruptionError):
            read(data)


def seal(members: Any) -> bytes:
    """Seals as ktrain does: whoever attacks can compute the digest too."""
    body = json.dumps(members, separators=(",", ":")).encode()[:-1]
    return body + b',"digest":"' + digest_text(body).encode() + b'"}\n'


def members() -> dict[str, Any]:
    shards = [
        shard("model/a", (4, 2), box=Box((2, 0), (2, 2))),
        shard("model/a", (4, 2), box=Box((0, 0), (1, 1))),
        shard("model/b", (3,), dtype="bool"),
    ]
    value: dict[str, Any] = json.loads(snapshot(shards).manifest.to_bytes())
    del value["digest"]
    return value


def changed(path: str, new: Any) -> bytes:
    """The manifest with one member changed (`...` takes it out) and a good digest."""
    value = members()
    *parents, last = path.split("/")
    place = value
    for parent in parents:
        place = place[parent]
    if new is ...:
        del place[last]
    else:
        place[last] = new
    return seal(value)


CHANGES: list[tuple[str, Any]] = [
    *((name, ...) for name in members()),
    *((f"tensors/{name}", ...) for name in members()["tensors"]),
    # A table where no name stands twice is a good one.
    *((f"tensors/{name}", []) for name in members()["tensors"] if name != "further"),
    *((f"tensors/{name}", [None, None, None]) for name in members()["tensors"]),
    ("format", 0),
    ("format", "1"),
    ("kind", "ktrain.commit"),
    ("more", 1),
    ("rank", 1),
    ("rank", -1),
    ("rank", 0.0),
    ("nbytes", 2**70),
    ("nbytes", 4097),
    ("chunk_nbytes", 0),
    ("chunk_nbytes", 100),
    ("chunks", "0"),
    ("chunks", "G" * 16),
    ("chunks", "\u0660" * 16),
    ("chunks", ""),
    ("data_begin", 0),
    ("plan_digest", "../../../../etc/"),
    ("objects", []),
    ("origin", "text"),
    ("tensors", []),
    ("tensors/more", []),
    ("tensors/key_shared", [0, 99, 0]),
    ("tensors/key_shared", [0, -1, 0]),
    ("tensors/key_shared", [0, True, 0]),
    ("tensors/key_rest", ["a", "", "b"]),
    ("tensors/key_rest", ["a" * 5000, "b", "c"]),
    ("tensors/key_rest", [1, 2, 3]),
    ("tensors/dtype", [0, 0, 9]),
    ("tensors/dtype", [0, 0, -1]),
    ("tensors/shape", [0, 0, 9]),
    ("tensors/role", [0, 0, 9]),
    ("tensors/box", [0, 0, 0]),
    ("tensors/box", [0, 9, -1]),
    ("tensors/box", [0, 1, -2]),
    ("tensors/dtypes", ["float32", "object"]),
    ("tensors/dtypes", ["float32", ["bool"]]),
    ("tensors/shapes", [[4, 2], [2**63]]),
    ("tensors/shapes", [[4, 2], [1] * 100]),
    ("tensors/shapes", [[4, 2], [2**62, 2**62, 2**62]]),
    ("tensors/shapes", [[4, 2], [-3]]),
    ("tensors/roles", ["owner"]),
    ("tensors/boxes", [[[2, 0], [2, 2]], [[0, 0], [9, 1]]]),
    ("tensors/boxes", [[[2, 0], [2, 2]], [[-1, 0], [1, 1]]]),
    ("tensors/boxes", [[[2, 0], [2, 2]], [[0], [1]]]),
    ("tensors/boxes", [[[2, 0], [2, 2]], [[0, 0], [4, 2]]]),
    ("tensors/boxes", [[[2, 0], [2, 2]], [0, 0]]),
    ("tensors/further", [[1, 9]]),
    ("tensors/further", [[-1, 0]]),
    ("tensors/further", [[1, 0, 0]]),
    ("tensors/further", ["ab"]),
]


def test_from_bytes_sealed_members_unchanged_are_read() -> None:
    assert Manifest.from_bytes(seal(members())).to_bytes() == seal(members())


@pytest.mark.parametrize(("path", "new"), CHANGES, ids=lambda value: str(value)[:30])
def test_from_bytes_crafted_manifest_is_corruption(path: str, new: Any) -> None:
    with pytest.raises(CorruptionError, match="take another copy"):
        Manifest.from_bytes(changed(path, new))


@given(st.data())
def test_from_bytes_any_flipped_bit_or_cut_is_corruption(data: st.DataObject) -> None:
    files = checkpoint()
    name = data.draw(st.sampled_from([name for name in files if name.endswith(".json")]))
    whole = files[name]
    read = CommitRecord.from_bytes if "commit" in name else Manifest.from_bytes
    cut = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[cut] ^= 1 << data.draw(st.integers(0, 7))
    for bad in (whole[:cut], bytes(flipped), whole + b"\n", whole[1:]):
        with pytest.raises((CorruptionError, ConfigError)) as caught:
            read(bad)
        assert caught.type is CorruptionError


@given(st.data())
def test_verify_payload_any_flipped_bit_is_corruption(data: st.DataObject) -> None:
    made = snapshot([shard("w", (700,))], chunk_nbytes=1000)
    bad = bytearray(made.payload)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptionError):
        verify_payload(made.manifest, bad)


def test_from_bytes_one_key_twice_is_corruption() -> None:
    value = members()
    value["tensors"] |= {"key_shared": [0, 7, 6], "key_rest": ["model/a", "", "b"]}
    with pytest.raises(CorruptionError, match="every key once"):
        Manifest.from_bytes(seal(value))


def test_from_bytes_whole_tensor_written_as_a_box_is_corruption() -> None:
    # Two ways to write one thing would give one manifest two digests.
    value = members()
    value["tensors"]["box"][2] = 2
    value["tensors"]["boxes"].append([[0], [3]])
    with pytest.raises(CorruptionError, match="'model/b'.*a part of shape"):
        Manifest.from_bytes(seal(value))


def test_from_bytes_keys_that_grow_without_end_are_corruption() -> None:
    value = members()
    num = 20_000
    value["tensors"] |= {"key_shared": list(range(num)), "key_rest": ["a"] * num}
    with pytest.raises(CorruptionError, match="1 to 4096 characters"):
        Manifest.from_bytes(seal(value))

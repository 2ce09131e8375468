"""The payload file: tensors in the safetensors form.

Invariant: data begins on a 4096-byte border and follows without holes in descending item size, and so every
tensor is aligned to its item size. The same shards in the same order give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ktrain.errors import ConfigError, CorruptionError
from ktrain.format import dtype as dtypes
from ktrain.format.document import FORMAT, check_version, parse_object
from ktrain.format.shard import Shard

# Digests cover [k * CHUNK_NBYTES, (k + 1) * CHUNK_NBYTES) of the file, header included. A part of a payload is proven
# by the whole chunks around it, so this is what a restore onto another layout reads in vain for each part (ADR 0011).
CHUNK_NBYTES = 128 << 10
BORDER_NBYTES = 4096
MAX_KEY_CHARS = 4096

_LENGTH_NBYTES = 8
_MAX_HEADER_NBYTES = 100_000_000  # the limit of safetensors' own reader
_METADATA = "__metadata__"
_VERSION = "ktrain"  # the member of the metadata that names the format version


class Entry(NamedTuple):
    """A shard's place in a payload: absolute byte range of the file, and the key of its header entry."""

    key: str
    shard: Shard
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A payload before its data: the header's bytes, every entry in file order, and the size of the file."""

    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor as a payload's header describes it; absolute byte range of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: `nbytes` is where data begins; entries in file order."""

    nbytes: int
    entries: tuple[HeaderEntry, ...]
    metadata: dict[str, str]


def lay_out(shards: Sequence[Shard], *, version: int = FORMAT, metadata: Mapping[str, str] | None = None) -> Layout:
    """Gives every shard its key and place.

    Tensors follow in descending item size, else in the order given. In that order, the first shard of a name
    has the name as its key, further ones get `name#1`, `name#2`. `version` is the run's; `metadata` is the header's,
    for files that are not payloads of a run.

    Raises:
        ConfigError: a name cannot be a key, a box leaves its tensor, a dtype cannot be stored, or the version is newer.
    """
    for shard in shards:
        _require_storable(shard)
    order = sorted(shards, key=lambda shard: -dtypes.item_nbytes(shard.dtype))
    header: dict[str, Any] = {_METADATA: dict(_about(version) if metadata is None else metadata)}
    places = []
    end = 0
    for key, shard in zip(_keys(order), order, strict=True):
        begin, end = end, end + shard_nbytes(shard)
        header[key] = {
            "dtype": dtypes.safetensors_dtype(shard.dtype),
            "shape": stored_shape(shard),
            "data_offsets": (begin, end),
        }
        places.append((key, shard, begin, end))
    data = _header_bytes(header)
    base = len(data)
    entries = tuple(Entry(key, shard, base + begin, base + end) for key, shard, begin, end in places)
    return Layout(header=data, entries=entries, nbytes=base + end)


def copies_begin(share_nbytes: int, chunk_nbytes: int = CHUNK_NBYTES) -> int:
    """The byte of a slot at which copies begin, behind a share of so many bytes: the next chunk border (ADR 0015)."""
    return -(-share_nbytes // chunk_nbytes) * chunk_nbytes


def _about(version: int) -> dict[str, str]:
    """The metadata of a payload's header, in a format version that this ktrain knows."""
    return {"format": "pt", _VERSION: str(check_version("payload", version))}  # readers made for torch ask for "pt"


def shard_nbytes(shard: Shard) -> int:
    """Bytes of the shard's data."""
    return math.prod(shard.box.lengths) * dtypes.item_nbytes(shard.dtype)


def stored_shape(shard: Shard) -> tuple[int, ...]:
    """The shape that the payload's header names for the shard."""
    if dtypes.is_stored_as_bytes(shard.dtype):
        return (*shard.box.lengths, dtypes.item_nbytes(shard.dtype))
    return shard.box.lengths


def header_nbytes(prefix: bytes | bytearray | memoryview) -> int:
    """Where data begins, from the first 8 bytes of a payload.

    Raises:
        CorruptionError: the bytes cannot be the beginning of a safetensors file.
    """
    if len(prefix) < _LENGTH_NBYTES:
        raise _corrupt(f"expected at least {_LENGTH_NBYTES} bytes, found {len(prefix)}")
    length = int.from_bytes(prefix[:_LENGTH_NBYTES], "little")
    if not 2 <= length <= _MAX_HEADER_NBYTES:
        raise _corrupt(f"expected a header of 2 to {_MAX_HEADER_NBYTES} bytes, found a length of {length}")
    return _LENGTH_NBYTES + length


def read_header(prefix: bytes | bytearray | memoryview) -> Header:
    """Parses a payload's header strictly; `prefix` holds at least the whole header.

    Raises:
        CorruptionError: the header is cut, is not the form, or its tensors overlap or leave holes.
        ConfigError: a newer ktrain wrote it.
    """
    nbytes = header_nbytes(prefix)
    text = bytes(prefix[_LENGTH_NBYTES:nbytes])
    if len(text) < nbytes - _LENGTH_NBYTES:
        raise _corrupt(f"expected a header of {nbytes} bytes, found {len(prefix)}")
    if not text.startswith(b"{"):
        raise _corrupt(f"expected a header that begins with a brace, found {text[:16]!r}")
    members = parse_object("payload header", text)
    metadata = members.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(f"{_METADATA}: expected an object of texts, found {str(metadata)[:40]!r}")
    version = metadata.get(_VERSION, "")  # absent where another program wrote the file
    if version.isascii() and version.isdecimal():
        check_version("payload header", int(version))
    entries = sorted(
        (_header_entry(key, value, nbytes) for key, value in members.items()),
        key=lambda entry: (entry.begin, entry.end),
    )
    place = nbytes
    for entry in entries:
        if entry.begin != place:
            raise _corrupt(f"tensor {entry.key!r}: expected its data at byte {place}, found it at {entry.begin}")
        place = entry.end
    return Header(nbytes, tuple(entries), metadata)


def check_header(entries: Sequence[Entry], prefix: bytes | bytearray | memoryview) -> None:
    """Proves that a payload's header says what the manifest's entries say.

    Raises:
        CorruptionError: it does not, or it is no header.
    """
    found = read_header(prefix).entries
    expected = tuple(
        HeaderEntry(e.key, dtypes.safetensors_dtype(e.shard.dtype), stored_shape(e.shard), e.begin, e.end)
        for e in entries
    )
    if sorted(found, key=_place) != sorted(expected, key=_place):
        wrong = sorted({e.key for e in set(found) ^ set(expected)})
        raise _corrupt(f"the manifest says otherwise about tensors {wrong[:10]}")


def _place(entry: HeaderEntry) -> tuple[int, int, str]:
    return entry.begin, entry.end, entry.key


def _keys(shards: Sequence[Shard]) -> list[str]:
    taken = {shard.name for shard in shards}
    used: dict[str, int] = {}
    keys = []
    for shard in shards:
        name, number = shard.name, used.get(shard.name, -1) + 1
        key = name
        while number and (key := f"{name}#{number}") in taken:
            number += 1
        used[name] = number
        taken.add(key)
        keys.append(key)
    return keys


def _require_storable(shard: Shard) -> None:
    name = shard.name
    if not name or name == _METADATA or len(name) > MAX_KEY_CHARS - 16 or not _is_utf8(name):
        raise ConfigError(
            f"tensor {name[:80]!r}: expected a name of 1 to {MAX_KEY_CHARS - 16} UTF-8 characters other than "
            f"{_METADATA!r}; rename it"
        )
    if not dtypes.is_dtype(shard.dtype):
        raise ConfigError(f"tensor {name!r}: dtype {shard.dtype!r} cannot be stored; convert the tensor first")
    if not shard.box.is_inside(shard.global_shape):
        raise ConfigError(
            f"tensor {name!r}: expected a box inside of shape {shard.global_shape}, found {box_text(shard)}"
        )


def box_text(shard: Shard) -> str:
    """The box in words, for errors."""
    return f"offsets {shard.box.offsets} lengths {shard.box.lengths}"


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: JSON can write it, other readers refuse the file
        return False
    return True


def _header_bytes(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    nbytes = -(-(_LENGTH_NBYTES + len(text)) // BORDER_NBYTES) * BORDER_NBYTES
    length = nbytes - _LENGTH_NBYTES
    if length > _MAX_HEADER_NBYTES:
        raise ConfigError(
            f"payload header: {len(header) - 1} tensors need {length} bytes, safetensors allows "
            f"{_MAX_HEADER_NBYTES}; store fewer tensors on a rank or use shorter names"
        )
    return length.to_bytes(_LENGTH_NBYTES, "little") + text.ljust(length)


def _header_entry(key: str, value: Any, base: int) -> HeaderEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(f"tensor {key!r}: expected dtype, shape and data_offsets, found {str(value)[:60]!r}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    item = dtypes.safetensors_item_nbytes(dtype) if isinstance(dtype, str) else None
    if item is None:
        raise _corrupt(f"tensor {key!r}: unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _corrupt(f"tensor {key!r}: expected sizes, found shape {shape!r:.60} and data_offsets {offsets!r:.60}")
    if offsets[1] - offsets[0] != math.prod(shape) * item:
        raise _corrupt(
            f"tensor {key!r}: expected {math.prod(shape) * item} bytes for {dtype} {shape}, "
            f"found data_offsets {offsets}"
        )
    return HeaderEntry(key, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _corrupt(problem: str) -> CorruptionError:
    return CorruptionError(f"payload header: {problem}; take another copy")

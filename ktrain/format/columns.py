"""The tensor table of a manifest: one column per property, one row per tensor in file order.

Invariant: row i is entry i of the payload's header in file order. What follows from other columns is not
written: byte ranges follow from dtypes and boxes, a box that is the whole tensor is left out, a key gives
only what differs from the key before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ktrain.format import document
from ktrain.format import dtype as dtypes
from ktrain.format.document import Members, Written
from ktrain.format.payload import MAX_KEY_CHARS, Entry
from ktrain.format.shard import Box, Role, Shard

_WHOLE = -1  # in the column of boxes


def to_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """The table as columns; equal entries give equal columns."""
    dtype_rows, shape_rows, role_rows, box_rows = _Table(), _Table(), _Table(), _Table()
    shared, rest = _front_code([entry.key for entry in entries])
    shards = [entry.shard for entry in entries]
    return {
        "key_shared": shared,
        "key_rest": rest,
        "dtype": [dtype_rows.index(shard.dtype) for shard in shards],
        "shape": [shape_rows.index(shard.global_shape) for shard in shards],
        "role": [role_rows.index(shard.role.value) for shard in shards],
        "box": [
            _WHOLE if shard.is_whole() else box_rows.index((shard.box.offsets, shard.box.lengths)) for shard in shards
        ],
        "dtypes": dtype_rows.rows(),
        "shapes": shape_rows.rows(),
        "roles": role_rows.rows(),
        "boxes": box_rows.rows(),
        # Rows whose name is not their key: [row, row of the first shard of that name].
        "further": _further(entries),
    }


def write(entries: Sequence[Entry]) -> Written:
    """The table as a member of a document."""
    return document.write(to_json(entries))


def from_json(members: Members, *, begin: int) -> tuple[Entry, ...]:
    """The opposite of `to_json`; the first tensor's data begins at byte `begin` of the payload.

    Raises:
        CorruptionError: the columns do not fit one another or name what cannot be.
    """
    keys = _front_decode(members)
    names = _names(members, keys)
    dtype_rows, role_rows = _dtypes(members), _roles(members)
    shapes = [_sizes(members, "shapes", row) for row in members.array("shapes")]
    boxes = [_box(members, row) for row in members.array("boxes")]
    wholes = [Box.whole(shape) for shape in shapes]
    dtype = _column(members, "dtype", len(keys), len(dtype_rows))
    shape = _column(members, "shape", len(keys), len(shapes))
    role = _column(members, "role", len(keys), len(role_rows))
    box = [row - 1 for row in _column(members, "box", len(keys), len(boxes), shift=1)]
    members.finish()
    item_nbytes = [dtypes.item_nbytes(name) for name in dtype_rows]
    for row, (shape_row, box_row) in enumerate(zip(shape, box, strict=True)):
        if box_row != _WHOLE and not _is_part(boxes[box_row], shapes[shape_row]):
            raise members.corrupt(
                f"tensor {keys[row][:80]!r}: expected a box that is a part of shape {shapes[shape_row]}, "
                f"found {boxes[box_row]}"
            )
    parts = [wholes[s] if b == _WHOLE else boxes[b] for s, b in zip(shape, box, strict=True)]
    sizes = [part.numel * item_nbytes[row] for part, row in zip(parts, dtype, strict=True)]
    ends = list(accumulate(sizes, initial=begin))
    shards = map(
        Shard,
        names,
        map(dtype_rows.__getitem__, dtype),
        map(shapes.__getitem__, shape),
        parts,
        map(role_rows.__getitem__, role),
    )
    return tuple(map(Entry, keys, shards, ends, ends[1:]))


def _is_part(box: Box, shape: tuple[int, ...]) -> bool:
    return box.is_inside(shape) and not box.is_whole(shape)


class _Table:
    """Gives equal values the same row number."""

    def __init__(self) -> None:
        self._rows: dict[Any, int] = {}

    def index(self, value: Any) -> int:
        return self._rows.setdefault(value, len(self._rows))

    def rows(self) -> list[Any]:
        return list(self._rows)


def _front_code(keys: Sequence[str]) -> tuple[list[int], list[str]]:
    shared, rest = [], []
    before = ""
    for key in keys:
        num = _num_shared(before, key)
        shared.append(num)
        rest.append(key[num:])
        before = key
    return shared, rest


def _num_shared(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _front_decode(members: Members) -> list[str]:
    shared, rest = members.integers("key_shared"), members.array("key_rest")
    if len(shared) != len(rest) or not {str}.issuperset(map(type, rest)):
        raise members.corrupt(f"key_rest: expected {len(shared)} texts, found {len(rest)} members")
    keys = []
    key = ""
    for num, text in zip(shared, rest, strict=True):
        if num > len(key):
            raise members.corrupt(f"key_shared: expected at most {len(key)} characters of {key[:80]!r}, found {num}")
        key = key[:num] + text
        if not 0 < len(key) <= MAX_KEY_CHARS:
            raise members.corrupt(f"key_rest: expected a key of 1 to {MAX_KEY_CHARS} characters, found {len(key)}")
        keys.append(key)
    if len(set(keys)) != len(keys):
        raise members.corrupt("key_rest: expected every key once, found one twice")
    return keys


def _further(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    first = {entry.key: row for row, entry in enumerate(entries) if entry.key == entry.shard.name}
    return [(row, first[entry.shard.name]) for row, entry in enumerate(entries) if entry.key != entry.shard.name]


def _names(members: Members, keys: list[str]) -> list[str]:
    names = list(keys)
    for pair in members.array("further"):
        row, first = _sizes(members, "further", pair) if isinstance(pair, list) and len(pair) == 2 else (-1, -1)
        if not (0 <= row < len(keys) and 0 <= first < len(keys)):
            raise members.corrupt(f"further: expected two rows below {len(keys)}, found {str(pair)[:40]}")
        names[row] = keys[first]
    return names


def _column(members: Members, name: str, num_rows: int, num_values: int, *, shift: int = 0) -> list[int]:
    values = members.array(name)
    if len(values) != num_rows or not {int}.issuperset(map(type, values)):
        raise members.corrupt(f"{name}: expected {num_rows} integers, found {len(values)} members")
    if values and not -shift <= min(values) <= max(values) < num_values:
        raise members.corrupt(f"{name}: expected row numbers below {num_values}, found {max(values)}")
    return [value + shift for value in values] if shift else values


def _dtypes(members: Members) -> list[str]:
    names = members.array("dtypes")
    for name in names:
        if not dtypes.is_dtype(name):
            raise members.corrupt(f"dtypes: unknown dtype {str(name)[:40]!r}")
    return names


def _roles(members: Members) -> list[Role]:
    known = {role.value: role for role in Role}
    names = members.array("roles")
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise members.corrupt(f"roles: unknown role {str(name)[:40]!r}")
    return [known[name] for name in names]


def _sizes(members: Members, name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 64:
        raise members.corrupt(f"{name}: expected an array of sizes, found {str(values)[:40]!r}")
    if any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise members.corrupt(f"{name}: expected sizes, found {str(values)[:40]!r}")
    return tuple(values)


def _box(members: Members, row: Any) -> Box:
    if not isinstance(row, list) or len(row) != 2:
        raise members.corrupt(f"boxes: expected offsets and lengths, found {str(row)[:40]!r}")
    return Box(_sizes(members, "boxes", row[0]), _sizes(members, "boxes", row[1]))

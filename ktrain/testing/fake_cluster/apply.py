"""Server-side apply: who owns which field, what an apply merges and removes, and who objects.

A set of fields is a set of paths. A path is a tuple of steps: `f:NAME` for a field, `k:{...}` for the item of a list
that its keys tell apart, `v:VALUE` for an item of a set, as in `managedFields` (structured-merge-diff, FieldsV1).
Sets hold leaves and the items of keyed lists.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.testing.fake_cluster.schemas import Schema
from ktrain.testing.fake_cluster.status import Refusal

Path = tuple[str, ...]
Fields = frozenset[Path]
Object = dict[str, Any]

APPLY, UPDATE = "Apply", "Update"
_OWNED_METADATA = ("f:labels", "f:annotations", "f:finalizers", "f:ownerReferences")


@dataclass(frozen=True, slots=True)
class Owner:
    """One entry of `managedFields`."""

    manager: str
    operation: str
    api_version: str
    subresource: str
    time: str
    fields: Fields

    def same_as(self, other: Owner) -> bool:
        mine = self.manager, self.operation, self.api_version, self.subresource
        return mine == (other.manager, other.operation, other.api_version, other.subresource)

    def without(self, fields: Iterable[Path]) -> Owner:
        return self.with_fields(self.fields - frozenset(fields))

    def with_fields(self, fields: Fields) -> Owner:
        return Owner(self.manager, self.operation, self.api_version, self.subresource, self.time, fields)


def owners(obj: Mapping[str, Any]) -> list[Owner]:
    """Returns who owns what, as `managedFields` says."""
    entries = obj.get("metadata", {}).get("managedFields") or []
    return [
        Owner(
            entry.get("manager", ""),
            entry.get("operation", UPDATE),
            entry.get("apiVersion", ""),
            entry.get("subresource", ""),
            entry.get("time", ""),
            frozenset(_decoded(entry.get("fieldsV1") or {}, ())),
        )
        for entry in entries
    ]


def with_owners(obj: Object, found: Iterable[Owner]) -> Object:
    """The object with `managedFields` that say this; owners of nothing are left out."""
    entries = [_entry(owner) for owner in found if owner.fields]
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    return {**obj, "metadata": {**metadata, "managedFields": entries} if entries else metadata}


def apply(schema: Schema | None, live: Object, wanted: Object, owner: Owner, *, force: bool) -> Object:
    """Returns the object after the owner has applied `wanted`; the owner's fields are what it applies.

    Raises:
        Refusal: others own fields that would change (409), unless `force` takes them.
    """
    applied = _fields(schema, wanted)
    before = next((known.fields for known in owners(live) if known.same_as(owner)), frozenset())
    others = [known for known in owners(live) if not known.same_as(owner)]
    changed = {path for path in applied if _changes(_value(schema, live, path), _value(schema, wanted, path))}
    if not force:
        _check(others, changed)
    others = [known.without(changed) for known in others]
    kept = frozenset().union(*(known.fields for known in others))
    merged = _merged(schema, live, wanted)
    owned = applied | kept
    for path in sorted(before - owned, key=len):  # an item of a list before the fields that name it
        _remove(merged, path, owned)
    return with_owners(merged, [*others, owner.with_fields(applied)])


def updated(schema: Schema | None, old: Object, new: Object, owner: Owner) -> Object:
    """Returns `new` with the owner as owner of what it changed, and nobody as owner of what is gone."""
    before, after = _fields(schema, old), _fields(schema, new)
    changed = {path for path in after if path not in before or _value(schema, old, path) != _value(schema, new, path)}
    found = [known.with_fields((known.fields & after) - changed) for known in owners(old) if not known.same_as(owner)]
    mine = next((known.fields & after for known in owners(old) if known.same_as(owner)), frozenset())
    if not changed and mine:
        owner = next(known for known in owners(old) if known.same_as(owner))
    return with_owners(new, [*found, owner.with_fields(mine | changed)])


def _changes(live: Any, wanted: Any) -> bool:
    """Whether an apply changes a value; an empty object takes nothing from one that is there."""
    return bool(live != wanted and not (wanted == {} and isinstance(live, Mapping)))


def _check(others: list[Owner], changed: set[Path]) -> None:
    conflicts = [(owner, path) for owner in others for path in sorted(owner.fields & changed)]
    if not conflicts:
        return
    causes: list[Object] = []
    groups: dict[str, list[str]] = {}
    for owner, path in conflicts:
        using = f" using {owner.api_version}" if owner.operation == UPDATE else ""
        who = f'"{owner.manager}"{using}'
        groups.setdefault(who, []).append(_text(path))
        causes.append({"reason": "FieldManagerConflict", "message": f"conflict with {who}", "field": _text(path)})
    count = f"{len(conflicts)} conflict{'s' if len(conflicts) > 1 else ''}"
    if len(conflicts) == 1:
        words = f"conflict with {who}: {causes[0]['field']}"
    else:
        words = "\n".join(f"conflicts with {who}:\n- " + "\n- ".join(paths) for who, paths in groups.items())
    raise Refusal(409, f"Apply failed with {count}: {words}", "Conflict", {"causes": causes})


# ---------------------------------------------------------------------------- sets of fields


def _fields(schema: Schema | None, obj: Mapping[str, Any]) -> Fields:
    """The paths of an object that can be owned."""
    return frozenset(path for path in _paths(schema, obj, ()) if _can_be_owned(path))


def _can_be_owned(path: Path) -> bool:
    if path[0] == "f:metadata":
        return len(path) > 1 and path[1] in _OWNED_METADATA
    return path[0] not in ("f:apiVersion", "f:kind")


def _paths(schema: Schema | None, value: Any, path: Path) -> Iterable[Path]:
    if isinstance(value, Mapping) and value and not (schema and schema.is_atomic):
        for key, entry in value.items():
            yield from _paths(_child(schema, key), entry, (*path, f"f:{key}"))
    elif isinstance(value, list) and schema is not None and value and (schema.list_keys or schema.is_set):
        for entry in value:
            step = _step(schema, entry)
            yield (*path, step)
            if schema.list_keys:
                yield from _paths(schema.item(), entry, (*path, step))
    else:
        yield path


def _child(schema: Schema | None, key: str) -> Schema | None:
    return schema.child(key) if schema is not None else None


def _step(schema: Schema, entry: Any) -> str:
    if schema.list_keys:
        keys = {key: entry.get(key, _default(schema, key)) for key in schema.list_keys}
        return "k:" + json.dumps({key: value for key, value in keys.items() if value is not None}, sort_keys=True)
    return "v:" + json.dumps(entry, sort_keys=True)


def _default(schema: Schema, key: str) -> Any:
    """What a key that an item lacks stands for: ports are told apart by a protocol that is TCP where it is not said."""
    item = schema.item()
    child = item.child(key) if item is not None else None
    return child.node.get("default") if child is not None else None


def _value(schema: Schema | None, value: Any, path: Path) -> Any:
    """What lies at a path; an item of a list is only there or not."""
    for i, step in enumerate(path):
        if step.startswith("f:"):
            if not isinstance(value, Mapping) or step[2:] not in value:
                return None
            value, schema = value[step[2:]], _child(schema, step[2:])
            continue
        entries = value if isinstance(value, list) and schema is not None else []
        value = next((entry for entry in entries if schema and _step(schema, entry) == step), None)
        schema = schema.item() if schema is not None else None
        if i == len(path) - 1:
            return value is not None
    return value


def _merged(schema: Schema | None, live: Any, wanted: Any) -> Any:
    if isinstance(live, Mapping) and isinstance(wanted, Mapping) and not (schema and schema.is_atomic):
        result = dict(live)
        for key, entry in wanted.items():
            result[key] = _merged(_child(schema, key), live.get(key), entry)
        return result
    if not (isinstance(live, list) and isinstance(wanted, list) and schema and (schema.list_keys or schema.is_set)):
        return copy.deepcopy(wanted)
    there = {_step(schema, entry): entry for entry in live}
    for entry in wanted:
        step = _step(schema, entry)
        there[step] = _merged(schema.item(), there[step], entry) if step in there else copy.deepcopy(entry)
    return list(there.values())


def _remove(value: Any, path: Path, owned: Fields) -> None:
    """Removes what lies at a path, and what is left empty above it, but for what is owned or holds what is owned."""
    if not path or any(other[: len(path)] == path for other in owned):
        return
    *above, last = path
    holder = value
    for step in above:
        holder = _inside(holder, step)
        if holder is None:
            return
    if last.startswith("f:"):
        if isinstance(holder, dict):
            holder.pop(last[2:], None)
    elif isinstance(holder, list):
        found = _inside(holder, last)
        if found is not None:
            holder.remove(found)
    if not holder and above and above[0] != "f:metadata":
        _remove(value, tuple(above), owned)


def _inside(value: Any, step: str) -> Any:
    if step.startswith("f:"):
        return value.get(step[2:]) if isinstance(value, dict) else None
    wanted = json.loads(step[2:])
    for entry in value if isinstance(value, list) else ():
        if entry == wanted or (
            isinstance(entry, dict) and isinstance(wanted, dict) and wanted.items() <= entry.items()
        ):
            return entry
    return None


# ---------------------------------------------------------------------------- managedFields


def _text(path: Path) -> str:
    """A path in the words of a conflict: `.spec.containers[name="main"].image`."""
    text = ""
    for step in path:
        if step.startswith("f:"):
            text += f".{step[2:]}"
        elif step.startswith("k:"):
            keys = json.loads(step[2:])
            text += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in keys.items()) + "]"
        else:
            text += f"[={step[2:]}]"
    return text


def _entry(owner: Owner) -> Object:
    entry: Object = {"manager": owner.manager, "operation": owner.operation, "apiVersion": owner.api_version}
    entry |= {"time": owner.time, "fieldsType": "FieldsV1", "fieldsV1": _encoded(owner.fields)}
    return entry | ({"subresource": owner.subresource} if owner.subresource else {})


def _encoded(fields: Fields) -> Object:
    tree: Object = {}
    for path in sorted(fields):
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node.setdefault(".", {})
    return _pruned(tree)


def _pruned(tree: Object) -> Object:
    """A leaf is written as an empty set; a step that is owned and has owned steps below it keeps its dot."""
    result: Object = {}
    for step, below in tree.items():
        if step == ".":
            result["."] = {}
        else:
            result[step] = {} if below == {".": {}} else _pruned(below)
    return result


def _decoded(tree: Mapping[str, Any], path: Path) -> Iterable[Path]:
    for step, below in tree.items():
        if step == ".":
            yield path
        elif not below:
            yield (*path, step)
        else:
            yield from _decoded(below, (*path, step))

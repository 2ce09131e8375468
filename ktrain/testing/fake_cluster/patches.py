"""The three patches that are no applies: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ktrain.errors import ConfigError
from ktrain.testing.fake_cluster.schemas import Schema

_DIRECTIVE = "$patch"
_DELETE_FROM_LIST = "$deleteFromPrimitiveList/"
_ORDER = "$setElementOrder/"


def merge(value: Any, patch: Any) -> Any:
    """Returns what a merge patch makes of a value."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    result = dict(value) if isinstance(value, Mapping) else {}
    for key, entry in patch.items():
        if entry is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), entry)
    return result


def strategic_merge(schema: Schema | None, value: Any, patch: Any) -> Any:
    """Returns what a strategic merge patch makes of a value: lists that have a merge key are merged by it."""
    if isinstance(patch, list) and schema is not None and isinstance(value, list):
        return _merge_list(schema, value, patch)
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    if patch.get(_DIRECTIVE) == "replace":
        return {key: copy.deepcopy(entry) for key, entry in patch.items() if key != _DIRECTIVE}
    result = dict(value) if isinstance(value, Mapping) else {}
    for key, entry in patch.items():
        if key.startswith(_ORDER):
            continue
        if key.startswith(_DELETE_FROM_LIST):
            name = key.removeprefix(_DELETE_FROM_LIST)
            result[name] = [item for item in result.get(name, []) if item not in entry]
        elif entry is None:
            result.pop(key, None)
        else:
            result[key] = strategic_merge(schema.child(key) if schema else None, result.get(key), entry)
    return result


def _merge_list(schema: Schema, value: list[Any], patch: list[Any]) -> list[Any]:
    key = schema.merge_key
    if not key:
        return value + [entry for entry in patch if entry not in value] if schema.is_set else copy.deepcopy(patch)
    if any(entry.get(_DIRECTIVE) == "replace" for entry in patch):
        return [copy.deepcopy(entry) for entry in patch if _DIRECTIVE not in entry]
    result = list(value)
    for entry in patch:
        places = [i for i, item in enumerate(result) if item.get(key) == entry.get(key)]
        if entry.get(_DIRECTIVE) == "delete":
            result = [item for i, item in enumerate(result) if i not in places]
        elif places:
            result[places[0]] = strategic_merge(schema.item(), result[places[0]], entry)
        else:
            result.append(copy.deepcopy(entry))
    return result


def json_patch(value: Any, operations: Sequence[Mapping[str, Any]]) -> Any:
    """Returns what a JSON patch makes of a value.

    Raises:
        ConfigError: an operation that cannot be done: a test that fails, a place that is not there.
    """
    result = copy.deepcopy(value)
    for operation in operations:
        try:
            result = _operate(result, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ConfigError(f"json patch: {operation.get('op')} {operation.get('path')}: {error!r}") from error
    return result


def _operate(value: Any, operation: Mapping[str, Any]) -> Any:
    op, path = operation["op"], _pointer(operation["path"])
    if op == "test":
        if _at(value, path) != operation["value"]:
            raise ValueError("the value is another one")
        return value
    if op in ("move", "copy"):
        source = _pointer(operation["from"])
        moved = copy.deepcopy(_at(value, source))
        return _add(_remove(value, source) if op == "move" else value, path, moved)
    if op == "remove":
        return _remove(value, path)
    if op == "replace":
        _at(value, path)
        return _set(value, path, operation["value"])
    if op == "add":
        return _add(value, path, operation["value"])
    raise ValueError(f"unknown operation {op!r}")


def _pointer(text: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _at(value: Any, path: Sequence[str]) -> Any:
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _set(value: Any, path: Sequence[str], new: Any) -> Any:
    if not path:
        return copy.deepcopy(new)
    parent = _at(value, path[:-1])
    parent[int(path[-1]) if isinstance(parent, list) else path[-1]] = copy.deepcopy(new)
    return value


def _add(value: Any, path: Sequence[str], new: Any) -> Any:
    parent = _at(value, path[:-1]) if path else None
    if not isinstance(parent, list):
        return _set(value, path, new)
    place = len(parent) if path[-1] == "-" else int(path[-1])
    if place > len(parent):
        raise IndexError(place)
    parent.insert(place, copy.deepcopy(new))
    return value


def _remove(value: Any, path: Sequence[str]) -> Any:
    parent = _at(value, path[:-1])
    del parent[int(path[-1]) if isinstance(parent, list) else path[-1]]
    return value

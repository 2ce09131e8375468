"""Structural schemas of custom resources: what an API server with that definition refuses, and what it drops.

Works on the parsed definition; rules in CEL and in webhooks are not evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PRESERVE = "x-kubernetes-preserve-unknown-fields"
_INT_OR_STRING = "x-kubernetes-int-or-string"
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
_ALWAYS = ("apiVersion", "kind", "metadata")  # the server's own, whatever the definition says


def schema_of(definition: Mapping[str, Any], version: str) -> Mapping[str, Any]:
    """The structural schema of one version of a CustomResourceDefinition.

    Raises:
        KeyError: the definition has no such version, or does not serve it.
    """
    for item in definition["spec"]["versions"]:
        if item["name"] == version and item["served"]:
            schema: Mapping[str, Any] = item["schema"]["openAPIV3Schema"]
            return schema
    raise KeyError(version)


def prune(manifest: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a server would store, and the paths that it would drop without a word."""
    lost: list[str] = []
    kept = {key: value for key, value in manifest.items() if key in _ALWAYS}
    rest = {key: value for key, value in manifest.items() if key not in _ALWAYS}
    return {**kept, **_prune(rest, schema, "", lost)}, lost


def _prune(value: Any, schema: Mapping[str, Any], path: str, lost: list[str]) -> Any:
    if isinstance(value, list):
        items = _items(schema)
        return [_prune(item, items, f"{path}[{at}]", lost) for at, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, item in value.items():
        below = _below(schema, key)
        where = f"{path}.{key}" if path else key
        if below is None:
            lost.append(where)
        else:
            kept[key] = _prune(item, below, where, lost)
    return kept


def _below(schema: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The schema of a field; None where a server drops it."""
    properties: Mapping[str, Mapping[str, Any]] = schema.get("properties", {})
    if key in properties:
        return properties[key]
    more = schema.get("additionalProperties")
    if isinstance(more, Mapping):
        return more
    return {_PRESERVE: True} if schema.get(_PRESERVE) or more is True else None


def _items(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema.get("items", {_PRESERVE: True} if schema.get(_PRESERVE) else {})
    return found


def problems(manifest: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """What a strict server would refuse: unknown fields, and values that are missing or of the wrong kind."""
    rest = {key: value for key, value in manifest.items() if key not in _ALWAYS}
    plain = {**schema, "required": [name for name in schema.get("required", ()) if name not in _ALWAYS]}
    return list(_problems(rest, plain, ""))


def _problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if schema.get(_INT_OR_STRING):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{path}: expected a number or a text, found {value!r}"
    elif "type" in schema and not _has_type(value, schema["type"]):
        yield f"{path}: expected {schema['type']}, found {value!r}"
        return
    yield from _scalar_problems(value, schema, path)
    if isinstance(value, Mapping):
        yield from (f"{path}.{name}: missing" for name in schema.get("required", ()) if name not in value)
        for key, item in value.items():
            below = _below(schema, key)
            where = f"{path}.{key}" if path else key
            if below is None:
                yield f"{where}: unknown field"
            else:
                yield from _problems(item, below, where)
    if isinstance(value, list):
        for at, item in enumerate(value):
            yield from _problems(item, _items(schema), f"{path}[{at}]")


def _has_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and not (isinstance(value, bool) and name in ("integer", "number"))


def _scalar_problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: expected one of {schema['enum']}, found {value!r}"
    if isinstance(value, str):
        if "pattern" in schema and re.search(schema["pattern"], value) is None:
            yield f"{path}: {value!r} does not match {schema['pattern']}"
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{path}: {value!r} is too short or too long"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            yield f"{path}: {value} is out of range"
    if isinstance(value, list) and not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{path}: {len(value)} items are too few or too many"

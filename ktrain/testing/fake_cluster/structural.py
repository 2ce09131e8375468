"""What a schema makes of an object: unknown fields, defaults, and what is wrong, in the server's words."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from ktrain.testing.fake_cluster.schemas import Schema
from ktrain.testing.fake_cluster.status import INVALID, REQUIRED, UNSUPPORTED, FieldError, invalid_value

_GO_TYPES = {"string": "string", "boolean": "bool", "integer": "int64", "number": "float64"}
_QUANTITY = re.compile(r"^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$")
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
UNCHECKED = FieldError(
    INVALID,
    "<nil>",
    "null",
    "some validation rules were not checked because the object was invalid; correct the existing errors to complete"
    " validation",
)


def prune(schema: Schema, value: Any, path: str = "") -> list[str]:
    """Removes the fields that the schema does not know, in place; returns their paths in the order of the object."""
    if isinstance(value, list):
        item = schema.item()
        found = [prune(item, entry, f"{path}[{i}]") for i, entry in enumerate(value)] if item else []
        return [name for names in found for name in names]
    if not isinstance(value, dict) or schema.is_int_or_string:
        return []
    unknown = []
    for key in list(value):
        child = schema.child(key)
        name = f"{path}.{key}" if path else key
        if child is not None:
            unknown += prune(child, value[key], name)
        elif not schema.keeps_unknown:
            del value[key]
            unknown.append(name)
    return unknown


def fill(schema: Schema, value: Any) -> None:
    """Sets the schema's defaults where their parents are there, in place."""
    if isinstance(value, list):
        item = schema.item()
        for entry in value if item else ():
            fill(item, entry)  # type: ignore[arg-type]
    elif isinstance(value, dict):
        for key, child in schema.properties:
            if key not in value and "default" in child.node:
                value[key] = copy.deepcopy(child.node["default"])
        for key, entry in value.items():
            child_of = schema.child(key)
            if child_of is not None:
                fill(child_of, entry)


# ---------------------------------------------------------------------------- decoding, as Go does it


def decode_error(schema: Schema, value: Any) -> str | None:
    """Why a Go program could not read the object into its types; None where it can."""
    return next(_decode_errors(schema, value, schema.go_type, ""), None)


def _decode_errors(schema: Schema, value: Any, struct: str, path: str) -> Iterator[str]:
    if value is None:
        return
    if schema.is_int_or_string:
        if schema.go_type == "Quantity" and not _QUANTITY.match(str(value)):
            yield f"quantities must match the regular expression '{_QUANTITY.pattern}'"
        return
    if schema.go_type == "MicroTime" and isinstance(value, str) and not _MICRO_TIME.fullmatch(value):
        yield _time_error(value)
        return
    if schema.type and not _fits(schema.type, value):
        where = f"{struct}.{path}" if path else struct
        yield f"json: cannot unmarshal {_json_type(value)} into Go struct field {where} of type {_go_type(schema)}"
    elif isinstance(value, dict):
        own = schema.go_type or struct
        for key, entry in value.items():
            child = schema.child(key)
            if child is not None:
                below = path if schema.is_map else f"{path}.{key}" if path else key
                yield from _decode_errors(child, entry, struct if schema.is_map else own, below)
    elif isinstance(value, list):
        item = schema.item()
        for entry in value if item else ():
            yield from _decode_errors(item, entry, struct, path)  # type: ignore[arg-type]


def _time_error(value: str) -> str:
    layout = "2006-01-02T15:04:05.000000Z07:00"
    rest = value[19:] if len(value) > 19 else value
    return f'parsing time "{value}" as "{layout}": cannot parse "{rest}" as ".000000"'


def _fits(kind: str, value: Any) -> bool:
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    expected: dict[str, type] = {"string": str, "boolean": bool, "object": dict, "array": list}
    return isinstance(value, expected[kind])


def _json_type(value: Any) -> str:
    kinds = {str: "string", bool: "bool", dict: "object", list: "array"}
    return kinds.get(type(value), "number")


def _go_type(schema: Schema) -> str:
    if schema.type == "array":
        item = schema.item()
        return "[]" + (_go_type(item) if item else "interface {}")
    if schema.type == "object":
        return f"v1.{schema.go_type}" if schema.go_type else "map[string]string"
    return str(schema.node.get("format") or _GO_TYPES.get(schema.type, schema.type))


# ---------------------------------------------------------------------------- validation of custom resources


def violations(schema: Schema, value: Any, old: Any = None) -> list[FieldError]:
    """What a custom resource's schema finds wrong; `old` is the object before an update, for transition rules.

    Of the CEL rules only `self == oldSelf` is evaluated.
    """
    errors = list(_violations(schema, value, ""))
    if errors:
        return [*errors, UNCHECKED]
    return list(_changes(schema, value, old, ""))


def _violations(schema: Schema, value: Any, path: str) -> Iterator[FieldError]:
    if value is None:
        return
    if schema.type and not _fits(schema.type, value):
        kind = _json_type(value)
        yield FieldError(INVALID, path, json.dumps(kind), f'{path} in body must be of type {schema.type}: "{kind}"')
        return
    yield from _bounds(schema, value, path)
    if isinstance(value, dict):
        for key in schema.node.get("required") or ():
            if key not in value:
                yield FieldError(REQUIRED, f"{path}.{key}" if path else key)
        for key, entry in value.items():
            child = schema.child(key)
            if child is not None:
                yield from _violations(child, entry, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and schema.item() is not None:
        for i, entry in enumerate(value):
            yield from _violations(schema.item(), entry, f"{path}[{i}]")  # type: ignore[arg-type]


def _bounds(schema: Schema, value: Any, path: str) -> Iterator[FieldError]:
    node = schema.node
    if "enum" in node and value not in node["enum"]:
        supported = ", ".join(json.dumps(entry) for entry in node["enum"])
        yield FieldError(UNSUPPORTED, path, json.dumps(value), f"supported values: {supported}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < node.get("minimum", value):
            why = f"{path} in body should be greater than or equal to {node['minimum']}"
            yield invalid_value(path, value, why)
        if value > node.get("maximum", value):
            yield invalid_value(path, value, f"{path} in body should be less than or equal to {node['maximum']}")
    if isinstance(value, str):
        if "pattern" in node and not re.search(node["pattern"], value):
            yield invalid_value(path, value, f"{path} in body should match '{node['pattern']}'")
        if len(value) > node.get("maxLength", len(value)):
            yield invalid_value(path, value, f"may not be more than {node['maxLength']} bytes")
    if isinstance(value, list) and len(value) > node.get("maxItems", len(value)):
        yield invalid_value(path, len(value), f"{path} in body should have at most {node['maxItems']} items")


def _changes(schema: Schema, value: Any, old: Any, path: str) -> Iterator[FieldError]:
    """Fields that may not change and did."""
    if old is None or value == old:
        return
    for rule in schema.node.get("x-kubernetes-validations") or ():
        if rule["rule"].replace(" ", "") == "self==oldSelf":
            yield FieldError(INVALID, path, "", rule.get("message", f"failed rule: {rule['rule']}"))
            return
    if isinstance(value, dict) and isinstance(old, dict):
        for key, entry in value.items():
            child = schema.child(key)
            if child is not None:
                yield from _changes(child, entry, old.get(key), f"{path}.{key}" if path else key)

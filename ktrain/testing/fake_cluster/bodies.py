"""What a body holds: decoded, checked against the schema, pruned, with what is to be said about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktrain.errors import ConfigError
from ktrain.launcher.cluster.resources import Resource
from ktrain.testing.fake_cluster.requests import IGNORE, STRICT, Request, Target, parse_json
from ktrain.testing.fake_cluster.schemas import Schema
from ktrain.testing.fake_cluster.status import Refusal, bad_request, cannot_decode, unsupported_media_type
from ktrain.testing.fake_cluster.structural import decode_error, prune

Object = dict[str, Any]

_ACCEPTED = ("application/json", "application/yaml", "application/vnd.kubernetes.protobuf")
_LEFT_OUT_WHEN_EMPTY = ("labels", "annotations", "finalizers", "ownerReferences", "managedFields")
_ACCEPTED_CUSTOM = ("application/json", "application/yaml")


def decode(request: Request, resource: Resource) -> tuple[Object, list[str]]:
    """Returns the object of a body, and the fields that come twice in it.

    Raises:
        Refusal: 415 or 400, the body is not an object of the kind.
    """
    if request.content_type and request.content_type not in _ACCEPTED_CUSTOM:
        raise unsupported_media_type(_ACCEPTED_CUSTOM if resource.is_custom else _ACCEPTED)
    text = request.body.decode("utf-8", "replace")
    try:
        obj, twice = parse_json(text)
    except ConfigError as error:
        raise _unrecognised(resource, error, text) from error
    if not isinstance(obj, dict):
        raise _unrecognised(resource, ConfigError("json: cannot unmarshal into an object"), text)
    _check_kind(resource, obj)
    return obj, twice


def _unrecognised(resource: Resource, error: ConfigError, text: str) -> Refusal:
    what = f"the object provided is unrecognized (must be of type {resource.kind})"
    return bad_request(f"{what}: couldn't get version/kind; json parse error: {error} ({text})")


def _check_kind(resource: Resource, obj: Object) -> None:
    api_version, kind = obj.get("apiVersion"), obj.get("kind")
    if resource.is_custom:
        if api_version != resource.api_version:
            raise bad_request(
                f"the API version in the data ({api_version or ''}) does not match the expected API version"
                f" ({resource.api_version})"
            )
        if kind != resource.kind:
            raise bad_request(f"the kind in the data ({kind or ''}) does not match the expected kind ({resource.kind})")
    elif kind not in (None, resource.kind) or api_version not in (None, resource.api_version):
        version, package = resource.version, resource.group.partition(".")[0] or "core"
        why = f"converting (v1.{kind}) to ({package}.{resource.kind}): unknown conversion"
        raise bad_request(f'{kind} in version "{version}" cannot be handled as a {resource.kind}: {why}')


def check_place(target: Target, obj: Object) -> None:
    """Checks that an object is what the path says, and completes its namespace.

    Raises:
        Refusal: 400, another name or namespace.
    """
    metadata = obj.setdefault("metadata", {})
    for key in [key for key in _LEFT_OUT_WHEN_EMPTY if metadata.get(key, ...) in ([], {}, None)]:
        del metadata[key]
    if target.name is not None and metadata.get("name", target.name) != target.name:
        raise bad_request(
            f"the name of the object ({metadata['name']}) does not match the name on the URL ({target.name})"
        )
    if target.name is not None:
        metadata["name"] = target.name
    if not target.resource.namespaced:
        return
    if metadata.get("namespace", target.namespace) != target.namespace:
        raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
    metadata["namespace"] = target.namespace


def tidy(resource: Resource, schema: Schema | None, obj: Object, twice: list[str], validation: str) -> tuple[str, ...]:
    """Removes what the schema does not know, in place; returns the warnings that the answer carries.

    Raises:
        Refusal: 400, a field of another type (core kinds), or under Strict a field unknown or given twice.
    """
    if schema is not None and not resource.is_custom:
        wrong = decode_error(schema, obj)
        if wrong is not None:
            raise cannot_decode(resource, wrong)
    found = strict_errors(schema, obj, twice)
    if found and validation == STRICT:
        raise cannot_decode(resource, f"strict decoding error: {', '.join(found)}")
    return () if validation == IGNORE else tuple(found)


def strict_errors(schema: Schema | None, obj: Object, twice: list[str]) -> list[str]:
    """Removes what the schema does not know, in place; returns what Strict refuses, in the server's words."""
    untyped = {key: value for key, value in obj.items() if key not in ("apiVersion", "kind")}
    unknown = prune(schema, untyped) if schema is not None else []
    for key in [key for key in obj if key in unknown]:
        del obj[key]
    return [*(f'duplicate field "{path}"' for path in twice), *(f'unknown field "{path}"' for path in unknown)]


def plain(obj: Mapping[str, Any]) -> Object:
    """The object without what readers of a collection's items are spared: kind and version."""
    return {key: value for key, value in obj.items() if key not in ("apiVersion", "kind")}

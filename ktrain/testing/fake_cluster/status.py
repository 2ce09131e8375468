"""The Status objects that an API server answers with where it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ktrain.errors import KtrainError
from ktrain.launcher.cluster.resources import Resource

Object = dict[str, Any]

FORBIDDEN = "Forbidden"
INVALID = "Invalid value"
REQUIRED = "Required value"
UNSUPPORTED = "Unsupported value"
INTERNAL = "Internal error"
_REASONS = {
    FORBIDDEN: "FieldValueForbidden",
    INVALID: "FieldValueInvalid",
    REQUIRED: "FieldValueRequired",
    UNSUPPORTED: "FieldValueNotSupported",
    INTERNAL: "InternalError",
}


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field: the sort of error, the value as the server prints it, and why."""

    sort: str
    path: str
    value: str = ""
    why: str = ""

    @property
    def text(self) -> str:
        return ": ".join(part for part in (self.sort, self.value, self.why) if part)

    def cause(self) -> Object:
        return {"reason": _REASONS[self.sort], "message": self.text, "field": self.path}


def invalid_value(path: str, value: object, why: str) -> FieldError:
    return FieldError(INVALID, path, json.dumps(value, separators=(",", ":")), why)


@dataclass(eq=False)
class Refusal(KtrainError):
    """A request that is answered with a Status of failure. `details` are None where the server sends none.

    Controllers that write to the store of a fake cluster meet it as clients do.
    """

    code: int
    message: str
    reason: str = ""
    details: Object | None = None
    headers: dict[str, str] = field(default_factory=dict)
    metadata: Object = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message

    def body(self) -> Object:
        status: Object = {"kind": "Status", "apiVersion": "v1", "metadata": self.metadata, "status": "Failure"}
        status["message"] = self.message
        if self.reason:
            status["reason"] = self.reason
        if self.details is not None:
            status["details"] = self.details
        return {**status, "code": self.code}


def success(details: Object | None = None, code: int | None = None) -> Object:
    """The Status of a request that leaves no object to return."""
    status: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    status |= {"details": details} if details is not None else {}
    return status | ({"code": code} if code is not None else {})


def named(resource: Resource, name: str | None, *, kind: str | None = None) -> Object:
    """The `details` that name an object or a collection."""
    details = {"name": name} if name else {}
    details |= {"group": resource.group} if resource.group else {}
    return details | {"kind": kind or resource.plural}


def bad_request(message: str) -> Refusal:
    return Refusal(400, message, "BadRequest")


def not_found(resource: Resource, name: str) -> Refusal:
    return Refusal(404, f'{resource.qualified} "{name}" not found', "NotFound", named(resource, name))


def no_such_resource() -> Refusal:
    return Refusal(404, "the server could not find the requested resource", "NotFound", {})


def method_not_allowed() -> Refusal:
    return Refusal(405, "the server does not allow this method on the requested resource", "MethodNotAllowed", {})


def cannot_decode(resource: Resource, why: str) -> Refusal:
    kind = resource.kind
    return bad_request(f'{kind} in version "{resource.version}" cannot be handled as a {kind}: {why}')


def unsupported_media_type(accepted: Sequence[str]) -> Refusal:
    message = "the body of the request was in an unknown format - accepted media types include: "
    return Refusal(415, message + ", ".join(accepted), "UnsupportedMediaType")


def not_acceptable(offered: Sequence[str]) -> Refusal:
    message = "406: Not Acceptable\n\nAvailable representations: " + ", ".join(offered)
    return Refusal(406, message, "NotAcceptable", {})


def invalid(resource: Resource, name: str, errors: Sequence[FieldError], *, before: str = "") -> Refusal:
    """422 for an object of the kind; `before` is what an admission webhook puts before the server's words."""
    message = f'{before}{resource.qualified_kind} "{name}" is invalid: {_joined(errors)}'
    details = named(resource, name, kind=resource.kind)
    return Refusal(422, message, "Invalid", {**details, "causes": [error.cause() for error in errors]})


def invalid_options(kind: str, error: FieldError) -> Refusal:
    """422 for the options of a request."""
    message = f'{kind}.meta.k8s.io "" is invalid: {error.path}: {error.text}'
    return Refusal(422, message, "Invalid", {"group": "meta.k8s.io", "kind": kind, "causes": [error.cause()]})


def invalid_patch(patched: Object, why: str) -> Refusal:
    """422 for what a patch makes of an object, where that cannot be decoded."""
    value = json.dumps(json.dumps(patched, separators=(",", ":")))
    error = FieldError(INVALID, "patch", value, why)
    return Refusal(422, f' "" is invalid: patch: {error.text}', "Invalid", {"causes": [error.cause()]})


def _joined(errors: Sequence[FieldError]) -> str:
    texts = list(dict.fromkeys(f"{error.path}: {error.text}" for error in errors))
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
